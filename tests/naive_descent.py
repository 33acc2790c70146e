"""The quantizer's choice of scale byte and codes, done naively in float64: one row, one weight, one candidate after the
other.

Written from the docstrings of group_descent.c and quantize_gptq.py, with explicit matrices: what the tests hold the C
against. naive_trellis.py has the choice for types whose codes form a trellis.
"""

from __future__ import annotations

import numpy as np
from naive_trellis import best_ring

from tacq_export.format.block_codec import CODECS

WINDOW = (4, 3)  # scales of TACQ4 below and above the least that does not clip


def values_of_byte(byte: int) -> np.ndarray:
    """float64 [16]: what the codes of a TACQ4 group mean under a scale byte."""
    return float(CODECS[4].scale_of_byte[byte]) * np.array(CODECS[4].levels, float)


def candidate_bytes(peak: float) -> list[int]:
    """Both signs, and the window of scales around the least one under which `peak` is not clipped."""
    reach = CODECS[4].magnitudes.astype(float) * max(map(abs, CODECS[4].levels))
    reach[-1] = np.inf  # beyond the range the largest scale has to do
    least = max(int(np.flatnonzero(reach >= peak)[0]), 1)
    ks = [k for k in range(least - WINDOW[0], least + WINDOW[1] + 1) if 1 <= k < len(reach)]
    return [sign | k for sign in (0, 128) for k in ks]


def descend(byte: int, h: np.ndarray, gradient: np.ndarray, values: np.ndarray, kept: np.ndarray, passes: int):
    """(codes, base values, values) after `passes` over one group: each weight in turn gets the level of least loss, a
    kept one the least loss itself."""
    grid = values_of_byte(byte)
    v, codes = values.copy(), np.zeros(len(values), np.uint8)
    for _ in range(passes):
        for j in range(len(v)):
            wanted = v[j] - (gradient[j] + h[j] @ (v - values)) / h[j, j]
            codes[j] = np.abs(grid - wanted).argmin()
            v[j] = wanted if kept[j] else grid[codes[j]]
    return codes, grid[codes], v


def loss_change(h: np.ndarray, gradient: np.ndarray, step: np.ndarray) -> float:
    return float(gradient @ step + 0.5 * step @ h @ step)


def best_group(
    bits: int,
    h: np.ndarray,
    gradient: np.ndarray,
    values: np.ndarray,
    kept: np.ndarray,
    present: int | None,
    codes: np.ndarray,
    passes: int = 2,
):
    """(byte, codes, base values, values) of one group of one row.

    present: the byte it has, None if it has none yet; codes: those under it. A group keeps what it has unless that
    lowers the loss.
    """
    if CODECS[bits].trellis:
        return best_ring(bits, h, gradient, values, kept, present, codes, passes)
    shown = (values - gradient / h.diagonal() if present is None else values)[~kept]
    peak = np.abs(shown).max() if len(shown) else 0.0
    bytes_tried = candidate_bytes(peak) if peak > 0 else []
    if present is not None and CODECS[bits].scale_of_byte[present] != 0:
        bytes_tried.append(present)
    best, byte = (np.inf if present is None else 0.0), None
    for tried in bytes_tried:
        change = loss_change(h, gradient, descend(tried, h, gradient, values, kept, 1)[2] - values)
        if change < best:
            best, byte = change, tried
    if byte is not None:
        return byte, *descend(byte, h, gradient, values, kept, passes)
    if present is None:
        return 0, np.zeros(len(values), np.uint8), np.zeros(len(values)), np.where(kept, values, 0.0)
    return present, codes, values_of_byte(present)[codes], values


def damped(hessian: np.ndarray, damping: float) -> np.ndarray:
    h = np.array(hessian, float)
    h[np.diag_indices(len(h))] = np.where(h.diagonal() == 0, 1.0, h.diagonal())
    return h + damping * h.diagonal().mean() * np.eye(len(h))


def loss_of(weights: np.ndarray, values: np.ndarray, h: np.ndarray) -> np.ndarray:
    """float64 [rows]: the diagonal of D H D^T."""
    d = np.asarray(values, float) - np.asarray(weights, float)
    return np.einsum("ri,ij,rj->r", d, h, d)


def naive_gptq(
    bits: int,
    weights: np.ndarray,
    hessian: np.ndarray,
    kept: np.ndarray | None,
    damping: float,
    sweeps: int,
    feed_forward: bool = True,
):
    """{codes, scale_bytes, base, values} of one matrix; every linear system is solved anew."""
    h, w = damped(hessian, damping), np.asarray(weights, float)
    rows, columns = w.shape
    kept = np.zeros(w.shape, bool) if kept is None else kept
    out = {
        "codes": np.zeros(w.shape, np.uint8),
        "scale_bytes": np.zeros((rows, columns // 32), np.uint8),
        "base": np.zeros(w.shape),
        "values": np.zeros(w.shape),
    }

    def put(r: int, g: int, own: slice, found: tuple) -> None:
        out["scale_bytes"][r, g], out["codes"][r, own], out["base"][r, own], out["values"][r, own] = found

    target = w.copy()
    for g in range(columns // 32):
        own, later = slice(32 * g, 32 * g + 32), slice(32 * g + 32, columns)
        follow = -np.linalg.solve(
            h[later, later], h[later, own]
        )  # later columns of least loss, for an error of this group
        matrix = h[own, own] + h[own, later] @ follow if feed_forward else h[own, own]
        for r in range(rows):
            put(r, g, own, best_group(bits, matrix, np.zeros(32), target[r, own], kept[r, own], None, None))
            if feed_forward:
                target[r, later] += follow @ (out["values"][r, own] - target[r, own])
    for _ in range(sweeps):
        for g in range(columns // 32):
            own = slice(32 * g, 32 * g + 32)
            gradient = (out["values"] - w) @ h[:, own]
            for r in range(rows):
                present = int(out["scale_bytes"][r, g])
                put(
                    r,
                    g,
                    own,
                    best_group(
                        bits,
                        h[own, own],
                        gradient[r],
                        out["values"][r, own],
                        kept[r, own],
                        present,
                        out["codes"][r, own],
                    ),
                )
    return out
