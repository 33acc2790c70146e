"""The base codec: blocks of 64 weights, one scale byte per 32, 2-, 3- or 4-bit codes into small integer codebooks.

Pure functions on numpy arrays; `pack_blocks` and `unpack_blocks` are inverses. The same numbers and the same bytes as
`cpp_ext/tacq-common.h` and `cpp_ext/tacq-quants.c`, bit for bit (tests/format/test_python_equals_c.py).
cpp_ext/FORMAT.md has the byte specification, `tools/fit_codebooks.py` the measurements that chose the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .tensor_types import BLOCK_SIZE, GROUP_SIZE


@dataclass(frozen=True)
class BlockCodec:
    """The numbers of one base type.

    A scale byte holds a sign (bit 7), the codebook (the next bits) and `k` (the low `scale_bits` bits). The scale is
    `F(k) - F(0)` with `F(k)` the float whose bit pattern is `scale_origin + k * scale_step`: logarithmic steps with a
    linear mantissa, and exactly 0 for k = 0. `search_below` and `search_above` are how many steps from the smallest
    scale that does not clip the reference quantizer looks.
    """

    bits: int
    levels: tuple[tuple[int, ...], ...]
    scale_bits: int
    scale_origin: int
    scale_step: int
    search_below: int
    search_above: int

    @property
    def block_bytes(self) -> int:
        return 2 + 8 * self.bits

    @cached_property
    def codebooks(self) -> np.ndarray:
        """float32 [codebooks, 2**bits], each ascending."""
        return np.array(self.levels, dtype=np.float32)

    @cached_property
    def magnitudes(self) -> np.ndarray:
        """float32 [2**scale_bits]: the scale without sign for each k."""
        patterns = self.scale_origin + np.arange(1 << self.scale_bits, dtype=np.uint32) * np.uint32(self.scale_step)
        values = patterns.astype(np.uint32).view(np.float32)
        return values - values[0]

    @cached_property
    def scale_of_byte(self) -> np.ndarray:
        """float32 [256]: the signed scale of every scale byte."""
        byte = np.arange(256)
        return (
            np.where(byte & 0x80, np.float32(-1), np.float32(1)) * self.magnitudes[byte & ((1 << self.scale_bits) - 1)]
        )

    @cached_property
    def codebook_of_byte(self) -> np.ndarray:
        """int64 [256]: the codebook of every scale byte."""
        return (np.arange(256) & 0x7F) >> self.scale_bits


def _float_bits(exponent: int) -> int:
    return (127 + exponent) << 23


CODECS = {
    2: BlockCodec(
        bits=2,
        levels=((-17, -4, 6, 19), (-14, -2, 8, 22), (-10, 0, 10, 26), (-31, -3, 5, 25)),
        scale_bits=5,
        scale_origin=_float_bits(-14),
        scale_step=12 << 18,
        search_below=6,
        search_above=1,
    ),
    3: BlockCodec(
        bits=3,
        levels=((-49, -28, -14, -3, 7, 18, 33, 55), (-40, -21, -8, 1, 12, 25, 42, 63)),
        scale_bits=6,
        scale_origin=_float_bits(-15),
        scale_step=3 << 19,
        search_below=10,
        search_above=3,
    ),
    4: BlockCodec(
        bits=4,
        levels=((-57, -41, -31, -23, -16, -9, -3, 0, 5, 11, 16, 22, 29, 37, 47, 63),),
        scale_bits=7,
        scale_origin=_float_bits(-15),
        scale_step=3 << 18,
        search_below=16,
        search_above=4,
    ),
}


def pack_blocks(bits: int, codes: np.ndarray, scale_bytes: np.ndarray) -> np.ndarray:
    """Bytes of a tensor's blocks.

    codes: uint8 [..., n], n a multiple of 64, each < 2**bits; scale_bytes: uint8 [..., n / 32].
    Returns uint8 [..., n / 64 * block_bytes].
    """
    lead, n = codes.shape[:-1], codes.shape[-1]
    if n % BLOCK_SIZE or scale_bytes.shape != (*lead, n // GROUP_SIZE):
        raise ValueError(f"codes {codes.shape} and scale bytes {scale_bytes.shape} do not fit blocks of {BLOCK_SIZE}")
    c = codes.reshape(*lead, n // BLOCK_SIZE, 4, 16)  # [..., block, l, j]: weight l * 16 + j
    s = scale_bytes.reshape(*lead, n // BLOCK_SIZE, 2)
    if bits == 4:
        low, high = c[..., 0::2, :], c[..., 1::2, :]
        parts = [s, (low | (high << 4)).reshape(*c.shape[:-2], 32)]
    else:
        shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
        parts = [s, np.bitwise_or.reduce((c & 3) << shifts, axis=-2)]
        if bits == 3:
            high = c >> 2
            first, second = high[..., :8], high[..., 8:]
            parts.append(np.bitwise_or.reduce((first << shifts) | (second << (shifts + 1)), axis=-2))
    return np.concatenate(parts, axis=-1).astype(np.uint8).reshape(*lead, -1)


def unpack_blocks(bits: int, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack_blocks`: uint8 [..., bytes] -> codes uint8 [..., n], scale bytes uint8 [..., n / 32]."""
    block_bytes = CODECS[bits].block_bytes
    lead = data.shape[:-1]
    if data.shape[-1] % block_bytes:
        raise ValueError(f"{data.shape[-1]} bytes are not a multiple of the block's {block_bytes}")
    b = data.reshape(*lead, -1, block_bytes)
    n_blocks = b.shape[-2]
    scale_bytes = b[..., :2].reshape(*lead, n_blocks * 2)
    if bits == 4:
        q = b[..., 2:34].reshape(*lead, n_blocks, 2, 1, 16)
        c = np.concatenate([q & 15, q >> 4], axis=-2)
    else:
        shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
        c = (b[..., None, 2:18] >> shifts) & 3
        if bits == 3:
            h = b[..., None, 18:26]
            c = c | (np.concatenate([(h >> shifts) & 1, (h >> (shifts + 1)) & 1], axis=-1) << 2)
    return np.ascontiguousarray(c).reshape(*lead, n_blocks * BLOCK_SIZE), np.ascontiguousarray(scale_bytes)


def dequantize_blocks(bits: int, codes: np.ndarray, scale_bytes: np.ndarray) -> np.ndarray:
    """float32 [..., n] from codes [..., n] and scale bytes [..., n / 32]. The product is exact in float32."""
    codec = CODECS[bits]
    groups = codes.reshape(*codes.shape[:-1], -1, GROUP_SIZE)
    levels = codec.codebooks[codec.codebook_of_byte[scale_bytes][..., None], groups]
    return (codec.scale_of_byte[scale_bytes][..., None] * levels).reshape(codes.shape)


def quantize_ref(bits: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Plain rounding, the Python twin of `quantize_row_tacq<bits>_ref`: the same bytes for the same floats.

    weights: float32 [..., n], n a multiple of 64, finite. Returns (codes uint8 [..., n], scale bytes uint8 [..., n /
    32]). Each group takes the sign, codebook and k of least squared error; errors are summed in order, in float64, and
    the first candidate wins a tie, so that C and Python cannot differ.
    """
    codec = CODECS[bits]
    w = np.ascontiguousarray(weights, dtype=np.float32)
    if w.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"row width {w.shape[-1]} is not a multiple of {BLOCK_SIZE}")
    if not np.isfinite(w).all():
        raise ValueError("weights hold NaN or Inf")
    groups = w.reshape(-1, GROUP_SIZE)
    peak = np.abs(groups).max(axis=1)
    k_max = (1 << codec.scale_bits) - 1
    best_err = np.full(len(groups), np.inf)
    best_byte = np.zeros(len(groups), dtype=np.uint8)
    zero_code = int(np.argmin(np.abs(codec.codebooks[0])))
    best_codes = np.full(groups.shape, zero_code, dtype=np.uint8)
    for sign in (0, 1):
        for book, levels in enumerate(codec.codebooks):
            reach = codec.magnitudes * np.abs(levels).max()
            k_high = np.minimum(np.searchsorted(reach, peak), k_max)
            for offset in range(-codec.search_below, codec.search_above + 1):
                k = k_high + offset
                tried = (peak > 0) & (k >= 1) & (k <= k_max)
                if not tried.any():
                    continue
                byte = (sign << 7) | (book << codec.scale_bits) | k[tried]
                values = codec.scale_of_byte[byte][:, None] * levels
                diff = np.abs(groups[tried][:, :, None] - values[:, None, :])
                codes = diff.argmin(axis=2)
                least = np.take_along_axis(diff, codes[:, :, None], axis=2)[:, :, 0].astype(np.float64)
                err = np.zeros(len(least))
                for i in range(GROUP_SIZE):
                    err += least[:, i] * least[:, i]
                where = np.flatnonzero(tried)
                better = err < best_err[where]
                where = where[better]
                best_err[where] = err[better]
                best_byte[where] = byte[better]
                best_codes[where] = codes[better]
    return best_codes.reshape(w.shape), best_byte.reshape(*w.shape[:-1], -1)
