"""Plain rounding to the base types: the Python twin of `quantize_row_tacq<b>_ref` in cpp_ext/tacq-quants.c.

The same bytes for the same floats. Errors are summed in float64 in a fixed order, and the first of equal candidates
wins, so that C and Python cannot differ. It is the yardstick of the codec and of llama-quantize; exports search with
the matrix's Hessian instead (tacq_export/quantization).
"""

from __future__ import annotations

import numpy as np

from .block_codec import CODECS, K_MAX, RING, STATES, BlockCodec
from .tensor_types import BLOCK_SIZE, GROUP_SIZE


def quantize_ref(bits: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale bytes of least squared error among those tried: both signs, and a window of scales.

    weights: float32 [..., n], n a multiple of 64, finite. Returns (codes uint8 [..., n], scale bytes uint8 [..., n /
    32]). A group of zeros gets the scale byte 0 and the codes 0.
    """
    codec = CODECS[bits]
    w = np.ascontiguousarray(weights, dtype=np.float32)
    if w.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"row width {w.shape[-1]} is not a multiple of {BLOCK_SIZE}")
    if not np.isfinite(w).all():
        raise ValueError("weights hold NaN or Inf")
    groups = w.reshape(-1, GROUP_SIZE)
    best_err = np.full(len(groups), np.inf)
    best_byte = np.zeros(len(groups), dtype=np.uint8)
    best_codes = np.zeros(groups.shape, dtype=np.uint8)
    some = np.abs(groups).max(axis=1) > 0
    first, last = _window(codec, groups)
    for sign in (0, 1):
        for offset in range(int((last - first).max()) + 1):
            k = first + offset
            where = np.flatnonzero(some & (k >= 1) & (k <= last))
            if len(where) == 0:
                continue
            byte = ((sign << 7) | k[where]).astype(np.uint8)
            scale = codec.scale_of_byte[byte]
            err, codes = (_best_ring if codec.trellis else _nearest)(codec, groups[where], scale)
            better = err < best_err[where]
            where = where[better]
            best_err[where], best_byte[where], best_codes[where] = err[better], byte[better], codes[better]
    return best_codes.reshape(w.shape), best_byte.reshape(*w.shape[:-1], -1)


def _window(codec: BlockCodec, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [groups], int64 [groups]): the first and the last k to try. TACQ4: around the least that does not clip.
    Trellis: around the least under which the mean square of the table is not below that of the group, and at least up
    to the one that does not clip."""
    peak = np.searchsorted(codec.magnitudes * np.float32(codec.largest), np.abs(groups).max(axis=1))
    if not codec.trellis:
        peak = np.minimum(peak, K_MAX)
        return peak - codec.search_below, np.minimum(peak + codec.search_above, K_MAX)
    power = np.zeros(len(groups))
    for i in range(GROUP_SIZE):
        power += groups[:, i].astype(np.float64) * groups[:, i].astype(np.float64)
    squares = sum(level * level for level in codec.levels)
    reach = codec.magnitudes.astype(np.float64) * codec.magnitudes.astype(np.float64) * float(squares)
    usual = np.minimum(np.searchsorted(reach, power * (len(codec.levels) / GROUP_SIZE)), K_MAX)
    return usual - codec.search_below, np.minimum(np.maximum(usual + codec.search_above, peak), K_MAX)


def _nearest(codec: BlockCodec, groups: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(squared error float64 [groups], codes uint8 [groups, 32]): the nearest level of each weight."""
    diff = np.abs(groups[:, :, None] - (scale[:, None] * codec.table)[:, None, :])
    codes = diff.argmin(axis=2).astype(np.uint8)
    least = np.take_along_axis(diff, codes[:, :, None].astype(np.int64), axis=2)[:, :, 0].astype(np.float64)
    err = np.zeros(len(groups))
    for i in range(GROUP_SIZE):
        err += least[:, i] * least[:, i]
    return err, codes


def _best_ring(codec: BlockCodec, groups: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(squared error float64 [groups], codes uint8 [groups, 32]): the best path that ends in the state it began in, by
    Viterbi's algorithm from every state."""
    n, n_high = len(groups), (1 << codec.bits) // STATES
    values = (scale[:, None] * codec.table).reshape(n, n_high, STATES, STATES)  # [group, high bit, state, state before]
    x = groups[:, RING]
    cost = np.full((n, STATES, STATES), np.inf)  # [group, begun in, state]
    cost[:, range(STATES), range(STATES)] = 0.0
    came = np.empty((GROUP_SIZE, n, STATES, STATES), dtype=np.uint8)  # state before, and 4 * the high bit
    for j in range(GROUP_SIZE):
        diff = np.abs(x[:, j, None, None, None] - values)
        high = diff.argmin(axis=1)
        least = diff.min(axis=1).astype(np.float64)
        paths = cost[:, :, None, :] + (least * least)[:, None, :, :]  # [group, begun in, state, state before]
        before = paths.argmin(axis=3)
        cost = np.take_along_axis(paths, before[..., None], axis=3)[..., 0]
        chosen = np.take_along_axis(np.broadcast_to(high[:, None], paths.shape), before[..., None], axis=3)[..., 0]
        came[j] = before | chosen * STATES
    closed = cost[:, range(STATES), range(STATES)]
    start = closed.argmin(axis=1)
    state, codes, every = start.copy(), np.empty((n, GROUP_SIZE), dtype=np.uint8), np.arange(n)
    for j in reversed(range(GROUP_SIZE)):
        step = came[j, every, start, state]
        codes[:, RING[j]] = state | (step & STATES)
        state = step % STATES
    return closed[every, start], codes
