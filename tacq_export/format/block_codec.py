"""The base codec: blocks of 64 weights, a scale byte for 32, and 2-, 3- or 4-bit codes into a table of small integers.

In TACQ2 and TACQ3 a weight's level is looked up with its code and the low two bits of the code before it
(trellis-coded quantization: Marcellin and Fischer 1990; the bitshift form of QTIP, arXiv 2406.11235). The codes of a
group of 32 form a ring, so that a group decodes alone.

Pure functions on numpy arrays; `pack_blocks` and `unpack_blocks` are inverses. The same numbers and the same bytes as
`cpp_ext/tacq-common.h` and `cpp_ext/tacq-quants.c`, bit for bit (tests/format/test_python_equals_c.py).
cpp_ext/FORMAT.md has the byte specification, `tools/fit_tables.py` the measurements that chose the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .tensor_types import BLOCK_SIZE, GROUP_SIZE

# The order in which the ring of a group visits its weights: 0 4 8 12, 1 5 9 13, ... of 16, then the same of the other
# 16. Four weights that are neighbours are then in the same place of four neighbouring bytes.
RING = np.arange(GROUP_SIZE).reshape(2, 4, 4).transpose(0, 2, 1).reshape(-1)
STATES = 4  # that a code leaves for the next one: its low two bits

_SCALE_ORIGIN = (127 - 28) << 23  # the bit pattern of 2^-28
_SCALE_STEP = 7 << 18  # 7/32 octave
K_MAX = 127


def scale_magnitudes(origin: int = _SCALE_ORIGIN, step: int = _SCALE_STEP) -> np.ndarray:
    """float32 [128]: the scale without sign for each k. The arguments are bit patterns of a float."""
    values = (
        (origin + np.arange(K_MAX + 1, dtype=np.uint32) * np.uint32(step)).astype(np.uint32).view(np.float32).copy()
    )
    values[0] = 0
    return values


@dataclass(frozen=True)
class BlockCodec:
    """The numbers of one base type.

    levels: of a TACQ4 code; of a TACQ2 or TACQ3 code and the one before it, at 4 * code + (code before) % 4.
    A scale byte holds a sign (bit 7) and `k` (bits 0 to 6). The scale is 0 for k = 0, else the float32 whose bits
    are origin + k * step: logarithmic steps with a linear mantissa. `search_below` and `search_above` are how many
    steps around the scale that a group asks for the reference quantizer looks (quantize_ref.py).
    """

    bits: int
    levels: tuple[int, ...]
    search_below: int
    search_above: int

    @property
    def block_bytes(self) -> int:
        return 2 + 8 * self.bits

    @property
    def trellis(self) -> bool:
        """Whether a level depends on the code before."""
        return len(self.levels) > 1 << self.bits

    @property
    def largest(self) -> int:
        """The largest magnitude of a level."""
        return max(abs(level) for level in self.levels)

    @cached_property
    def table(self) -> np.ndarray:
        """float32 [len(levels)]."""
        return np.array(self.levels, dtype=np.float32)

    @cached_property
    def magnitudes(self) -> np.ndarray:
        """float32 [128]: the scale without sign for each k."""
        return scale_magnitudes()

    @cached_property
    def scale_of_byte(self) -> np.ndarray:
        """float32 [256]: the signed scale of every scale byte."""
        return np.concatenate([self.magnitudes, -self.magnitudes])


CODECS = {
    2: BlockCodec(
        bits=2,
        levels=(-52, 36, -12, 13, -14, -31, 5, 63, 6, -6, 25, -24, 30, 11, -35, -5),
        search_below=3,
        search_above=3,
    ),
    3: BlockCodec(
        bits=3,
        levels=(
            *(-63, -10, -29, -20, -27, -2, -17, -10, -16, -41, -9, -2, -8, -21, -1, -34),
            *(-1, 21, 6, 12, 6, 35, 14, 22, 16, 5, 26, 39, 28, 13, 51, 5),
        ),
        search_below=3,
        search_above=3,
    ),
    4: BlockCodec(
        bits=4,
        levels=(-61, -47, -36, -28, -21, -14, -8, -2, 4, 10, 16, 23, 30, 39, 50, 63),
        search_below=8,
        search_above=2,
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
    s = scale_bytes.reshape(*lead, n // BLOCK_SIZE, 2)
    if bits == 4:
        c = codes.reshape(*lead, n // BLOCK_SIZE, 2, 2, 16)
        parts = [s, (c[..., 0, :] | (c[..., 1, :] << 4)).reshape(*s.shape[:-1], 32)]
    else:
        c = codes.reshape(*lead, n // BLOCK_SIZE, 4, 4, 4)  # [..., block, w, v, b]: weight 16 w + 4 v + b
        v = np.arange(4, dtype=np.uint8)[:, None]
        parts = [s, np.bitwise_or.reduce((c & 3) << 2 * v, axis=-2).reshape(*s.shape[:-1], 16)]
        if bits == 3:
            high = np.bitwise_or.reduce((c >> 2) << v, axis=-2)  # [..., block, w, b], 4 bits
            parts.append((high[..., 0::2, :] | (high[..., 1::2, :] << 4)).reshape(*s.shape[:-1], 8))
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
        v = np.arange(4, dtype=np.uint8)[:, None]
        c = (b[..., 2:18].reshape(*lead, n_blocks, 4, 1, 4) >> 2 * v) & 3
        if bits == 3:
            h = b[..., 18:26].reshape(*lead, n_blocks, 2, 1, 4)
            high = np.concatenate([h, h >> 4], axis=-2).reshape(*lead, n_blocks, 4, 1, 4)
            c = c | ((high >> v) & 1) << 2
    return np.ascontiguousarray(c).reshape(*lead, n_blocks * BLOCK_SIZE), np.ascontiguousarray(scale_bytes)


def level_indices(bits: int, codes: np.ndarray) -> np.ndarray:
    """int64 [..., n]: where each weight's level is in `BlockCodec.levels`.

    codes: uint8 [..., n], n a multiple of 32.
    """
    if not CODECS[bits].trellis:
        return codes.astype(np.int64)
    ring = codes.reshape(*codes.shape[:-1], -1, GROUP_SIZE)[..., RING].astype(np.int64)
    found = np.empty_like(ring)
    found[..., RING] = STATES * ring + np.roll(ring, 1, axis=-1) % STATES
    return found.reshape(codes.shape)


def dequantize_blocks(bits: int, codes: np.ndarray, scale_bytes: np.ndarray) -> np.ndarray:
    """float32 [..., n] from codes [..., n] and scale bytes [..., n / 32]. The product is exact in float32."""
    codec = CODECS[bits]
    scales = np.repeat(codec.scale_of_byte[scale_bytes], GROUP_SIZE, axis=-1)
    return scales * codec.table[level_indices(bits, codes)]
