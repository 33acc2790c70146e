"""The search for the codes of a trellis group (tacq_export/quantization/group_trellis.c) again, naively in float64: one
path, one weight, one candidate after the other, every loss from the whole matrix."""

from __future__ import annotations

import numpy as np

from tacq_export.format.block_codec import CODECS, RING, dequantize_blocks

WINDOW = (2, 2)  # scales below and above the one that the group's size asks for
CLOSED = 2  # scales whose paths are closed from every state


def ring_values(bits: int, byte: int, codes: np.ndarray) -> np.ndarray:
    """float64 [32]: what `codes` (in the order of the weights) mean under a scale byte."""
    return dequantize_blocks(bits, codes.astype(np.uint8), np.array([byte], np.uint8)).astype(float)


def candidate_bytes(bits: int, target: np.ndarray, present: int | None) -> list[int]:
    """Both signs; scales around the one under which the table has the mean square of `target` (the weights that are not
    kept), and up to the one that does not clip the largest; or around the present one."""
    codec = CODECS[bits]
    size = codec.magnitudes.astype(float)
    first = last = 0 if present is None else present & 127
    if first == 0:
        usual = np.sqrt(np.mean(target**2) / np.mean(np.square(codec.levels)))
        first = last = min([k for k in range(1, 128) if size[k] >= usual], default=127)
        widest = np.abs(target).max() / codec.largest
        last = max(last, min([k for k in range(1, 128) if size[k] >= widest], default=127) - WINDOW[1])
    ks = [k for k in range(first - WINDOW[0], last + WINDOW[1] + 1) if 1 <= k <= 127]
    return [sign | k for sign in (0, 128) for k in ks]


def fed_forward(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, d) of h = m^T d m, m unit lower triangular: the loss of errors e is the sum of d (m e)^2."""
    lower = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1].T  # h = lower^T lower
    return lower / lower.diagonal()[:, None], lower.diagonal() ** 2


def paths(bits: int, scale: float, m, d, target, kept, begun: tuple[int, ...]):
    """The best path into each state from one of the states `begun`: [(cost, codes, state begun in)] or None."""
    levels = scale * np.array(CODECS[bits].levels, float).reshape(-1, 4, 4)  # [high bit, state, state before]
    survivors = [(0.0, [], [], s) if s in begun else None for s in range(4)]
    for j in range(32):
        following = []
        for state in range(4):
            best = None
            for before, survivor in enumerate(survivors):
                if survivor is None:
                    continue
                cost, errors, codes, start = survivor
                fed = float(m[j, :j] @ np.array(errors)) if errors else 0.0
                choices = [float(e) - target[j] for e in levels[:, state, before]]
                high = 0 if kept[j] else int(np.argmin([(e + fed) ** 2 for e in choices]))
                error = -fed if kept[j] else choices[high]
                new = (cost + d[j] * (error + fed) ** 2, [*errors, error], [*codes, 4 * high + state], start)
                if best is None or new[0] < best[0]:
                    best = new
            following.append(best)
        survivors = following
    return [None if s is None else (s[0], np.array(s[2]), s[3]) for s in survivors]


def best_ring(bits, h, gradient, values, kept, present, codes, passes):
    """(byte, codes, base values, values) of one group of one row; arguments as naive_descent.best_group."""
    h_ring, target = h[np.ix_(RING, RING)], (values - np.linalg.solve(h, gradient))[RING]
    free = ~kept[RING]
    if not free.any() or not target[free].any():
        if present is None:
            return 0, np.zeros(32, np.uint8), np.zeros(32), values
        return present, codes, ring_values(bits, present, codes), values
    m, d = fed_forward(h_ring)
    tried = candidate_bytes(bits, target[free], present)
    best, bounds = (np.inf, 0, None), {}
    for byte in tried:
        scale = float(CODECS[bits].scale_of_byte[byte])
        found = paths(bits, scale, m, d, target, kept[RING], (0, 1, 2, 3))
        bounds[byte] = min(cost for cost, _, _ in found)
        for state, (cost, path, start) in enumerate(found):
            if start == state and cost < best[0]:
                best = (cost, byte, path)
    for byte in sorted(tried, key=lambda b: bounds[b])[:CLOSED]:
        if bounds[byte] >= best[0]:
            break
        scale = float(CODECS[bits].scale_of_byte[byte])
        for state in range(4):
            closed = paths(bits, scale, m, d, target, kept[RING], (state,))[state]
            if closed is not None and closed[0] < best[0]:
                best = (closed[0], byte, closed[1])
    byte, path = best[1], best[2]
    m, _ = fed_forward(h_ring)
    e = ring_values(bits, byte, spread(path))[RING] - target
    e[~free] = 0
    for j in np.flatnonzero(~free):
        e[j] = -m[j, :j] @ e[:j]
    found = polish(bits, byte, h_ring, target, kept[RING], path, e, passes)

    def gain(after: np.ndarray) -> float:
        return gradient @ (after - values) + 0.5 * (after - values) @ h @ (after - values)

    if present is None or gain(found[2]) < 0:
        return byte, *found
    if kept.any():  # the present codes, but kept weights may still move
        found = polish(bits, present, h_ring, target, kept[RING], codes[RING], values[RING] - target, passes)
        if gain(found[2]) < 0:
            return present, *found
    return present, codes, ring_values(bits, present, codes), values


def spread(x: np.ndarray) -> np.ndarray:
    """From the order of the ring to that of the weights."""
    out = np.empty_like(x)
    out[RING] = x
    return out


def polish(bits, byte, h, target, kept, path, e, passes):
    """(codes, base values, values) in the order of the weights, after `passes` over the codes of a path. Arguments in
    the order of the ring; e: the errors to begin with."""

    def errors(path: np.ndarray, e: np.ndarray) -> np.ndarray:
        return np.where(kept, e, ring_values(bits, byte, spread(path))[RING] - target)

    for _ in range(passes):
        moved = False
        for j in range(32):
            best, chosen = 0.5 * e @ h @ e, path
            for code in range(1 << bits):
                other = path.copy()
                other[j] = code
                now = errors(other, e)
                loss = 0.5 * now @ h @ now
                if code != path[j] and loss < best - 1e-15:
                    best, chosen = loss, other
            moved |= chosen is not path
            path = chosen
            e = errors(path, e)
            if kept[j]:
                e[j] -= (h[j] @ e) / h[j, j]
        if not moved and not kept.any():
            break
    codes = spread(path).astype(np.uint8)
    base = ring_values(bits, byte, codes)
    return codes, base, np.where(spread(kept), spread(target + e), base)
