"""The base codec against a loop over single weights and against brute force in float64."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tacq_export.format.block_codec import CODECS, dequantize_blocks, pack_blocks, quantize_ref, unpack_blocks

BITS = [2, 3, 4]
BLOCK_BYTES = {2: 18, 3: 26, 4: 34}
# Format version 1, written out again so that a changed number in the code is noticed.
LEVELS = {
    2: [[-17, -4, 6, 19], [-14, -2, 8, 22], [-10, 0, 10, 26], [-31, -3, 5, 25]],
    3: [[-49, -28, -14, -3, 7, 18, 33, 55], [-40, -21, -8, 1, 12, 25, 42, 63]],
    4: [[-57, -41, -31, -23, -16, -9, -3, 0, 5, 11, 16, 22, 29, 37, 47, 63]],
}
# Exponent of F(0), and by how much the bit pattern of F grows with k, in octaves: an octave is 2^23 bit patterns.
SCALE = {2: (5, -14, 3 / 8), 3: (6, -15, 3 / 16), 4: (7, -15, 3 / 32)}


def code_in_block(bits: int, block: bytes, i: int) -> int:
    """Code of weight i (0 to 63), bit by bit, after the layout in cpp_ext/tacq-common.h."""
    lane, j = divmod(i, 16)
    if bits == 4:
        return block[2 + 16 * (lane // 2) + j] >> (4 * (lane % 2)) & 15
    code = block[2 + j] >> (2 * lane) & 3
    if bits == 3:
        code |= (block[18 + j % 8] >> (2 * lane + j // 8) & 1) << 2
    return code


def scale_of(bits: int, byte: int) -> float:
    """Signed scale of a scale byte: F(k) - F(0), F logarithmic with a linear mantissa."""
    k_bits, exponent, step = SCALE[bits]
    k = byte % (1 << k_bits)
    octaves = int(k * step // 1)
    f = 2.0 ** (exponent + octaves) * (1 + k * step - octaves)
    return (-1 if byte & 128 else 1) * (f - 2.0**exponent)


def book_of(bits: int, byte: int) -> list[int]:
    return LEVELS[bits][byte % 128 >> SCALE[bits][0]]


def random_blocks(bits: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(bits)
    return rng.integers(0, 1 << bits, shape, dtype=np.uint8), rng.integers(
        0, 256, (*shape[:-1], shape[-1] // 32), dtype=np.uint8
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(64,), (5, 192), (2, 3, 64)])
def test_pack_and_unpack_are_inverses(bits, shape):
    codes, scale_bytes = random_blocks(bits, *shape)
    data = pack_blocks(bits, codes, scale_bytes)
    assert data.dtype == np.uint8 and data.shape == (*shape[:-1], shape[-1] // 64 * BLOCK_BYTES[bits])
    back = unpack_blocks(bits, data)
    assert np.array_equal(back[0], codes) and np.array_equal(back[1], scale_bytes)
    noise = np.random.default_rng(9).integers(0, 256, data.shape, dtype=np.uint8)  # every byte string is a legal block
    assert np.array_equal(pack_blocks(bits, *unpack_blocks(bits, noise)), noise)


@pytest.mark.parametrize("bits", BITS)
def test_layout_is_that_of_the_loop_over_weights(bits):
    codes, scale_bytes = random_blocks(bits, 3, 128)
    size = BLOCK_BYTES[bits]
    for row, data in enumerate(pack_blocks(bits, codes, scale_bytes)):
        for block in range(2):
            content = data[block * size : (block + 1) * size].tobytes()
            assert list(content[:2]) == scale_bytes[row, 2 * block : 2 * block + 2].tolist()
            assert [code_in_block(bits, content, i) for i in range(64)] == codes[
                row, 64 * block : 64 * block + 64
            ].tolist()


@pytest.mark.parametrize("bits", BITS)
def test_every_scale_byte_decodes_to_the_documented_number(bits):
    codec = CODECS[bits]
    for byte in range(256):
        expected = scale_of(bits, byte)
        assert struct.pack("<f", codec.scale_of_byte[byte] + 0.0) == struct.pack("<f", expected + 0.0), byte
        assert codec.codebooks[codec.codebook_of_byte[byte]].tolist() == book_of(bits, byte)


@pytest.mark.parametrize("bits", BITS)
def test_scales_ascend_from_exactly_zero(bits):
    codec = CODECS[bits]
    assert codec.magnitudes[0] == 0.0
    assert (np.diff(codec.magnitudes) > 0).all()
    zero = dequantize_blocks(bits, np.arange(64, dtype=np.uint8) % (1 << bits), np.zeros(2, np.uint8))
    assert (zero == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_scales_cover_the_range_that_models_need(bits):
    """DESIGN section 3: groups of a standard deviation of 2^-11 to 2. At the ends of a range steps are coarser and
    weights are clipped; the relative error may be 15 % above that in the middle (measured: 10 % for 2 bits, 9 % for 3
    and 4)."""
    rng = np.random.default_rng(0)

    def relative_error(sigma: float) -> float:
        weights = rng.normal(0, sigma, (500, 64)).astype(np.float32)
        return float(
            np.square(weights - dequantize_blocks(bits, *quantize_ref(bits, weights))).sum() / np.square(weights).sum()
        )

    middle = relative_error(2.0**-5)
    assert max(relative_error(2.0**e) for e in (-11, -10, -9, -7, -3, -1, 0, 1)) < 1.15 * middle


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_scale_times_level_of_each_weight(bits):
    codes, scale_bytes = random_blocks(bits, 4, 128)
    values = dequantize_blocks(bits, codes, scale_bytes)
    assert values.dtype == np.float32
    for (row, i), code in np.ndenumerate(codes):
        byte = int(scale_bytes[row, i // 32])
        assert float(values[row, i]) == scale_of(bits, byte) * book_of(bits, byte)[code]  # exact: 24-bit products


# How many scales below and above the first that does not clip the largest weight are tried: part of the reference
# codec.
SEARCHED = {2: (6, 1), 3: (10, 3), 4: (16, 4)}
KINDS = {
    "normal": lambda rng: rng.normal(0, 0.05, (3, 64)),
    "uniform": lambda rng: rng.uniform(-0.3, 0.3, (3, 64)),
    "laplace": lambda rng: rng.laplace(0, 0.02, (3, 64)),
    "skewed": lambda rng: -np.abs(rng.normal(0, 0.1, (3, 64))),
    "one outlier": lambda rng: rng.normal(0, 0.01, (3, 64)) + 0.5 * (np.arange(64) % 32 == 3),
    "tiny": lambda rng: rng.normal(0, 0.0008, (3, 64)),
    "large": lambda rng: rng.normal(0, 1.5, (3, 64)),
    "clipped": lambda rng: rng.normal(0, 5, (3, 64)),
}


def squared_error(bits: int, group: np.ndarray, byte: int) -> float:
    """Of a group (float64) rounded to the nearest levels under one scale byte."""
    return float(
        (np.abs(group[:, None] - scale_of(bits, byte) * np.array(book_of(bits, byte), float)).min(1) ** 2).sum()
    )


def searched_bytes(bits: int, group: np.ndarray) -> list[int]:
    """The scale bytes that the reference quantizer looks at: all signs and codebooks, a window of scales."""
    k_bits, (below, above) = SCALE[bits][0], SEARCHED[bits]
    found = []
    for book, levels in enumerate(LEVELS[bits]):
        reach = [scale_of(bits, k) * max(map(abs, levels)) for k in range(1 << k_bits)]
        first = next((k for k, r in enumerate(reach) if r >= np.abs(group).max()), len(reach) - 1)
        ks = range(max(1, first - below), min(len(reach) - 1, first + above) + 1)
        found += [sign | book << k_bits | k for sign in (0, 128) for k in ks]
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_ref_finds_the_least_error_of_all_signs_codebooks_and_scales(bits, kind):
    weights = KINDS[kind](np.random.default_rng(7)).astype(np.float32)
    values = dequantize_blocks(bits, *quantize_ref(bits, weights)).astype(np.float64)
    found = ((weights - values) ** 2).reshape(-1, 32).sum(1)
    groups = weights.reshape(-1, 32).astype(np.float64)
    # quantize_ref takes differences in float32 (relative error 2^-24 each), so that C and Python agree.
    np.testing.assert_allclose(
        found, [min(squared_error(bits, g, b) for b in searched_bytes(bits, g)) for g in groups], rtol=1e-5
    )


@pytest.mark.parametrize(("bits", "share"), [(2, 0.001), (3, 0.001), (4, 0.001)])
def test_the_window_of_scales_loses_next_to_nothing(bits, share):
    """Against every scale byte there is, on normal groups (measured on these 80: nothing to 0.1 % more squared
    error)."""
    groups = np.random.default_rng(1).normal(0, 0.05, (80, 32)).astype(np.float32)
    values = dequantize_blocks(bits, *quantize_ref(bits, groups.reshape(-1, 64))).reshape(-1, 32)
    least = sum(min(squared_error(bits, g, byte) for byte in range(256)) for g in groups.astype(np.float64))
    assert ((groups - values.astype(np.float64)) ** 2).sum() <= (1 + share) * least


@pytest.mark.parametrize("bits", BITS)
def test_quantize_ref_takes_the_nearest_code(bits):
    weights = np.random.default_rng(3).normal(0, 0.05, (2, 128)).astype(np.float32)
    codes, scale_bytes = quantize_ref(bits, weights)
    for (row, i), code in np.ndenumerate(codes):
        byte = int(scale_bytes[row, i // 32])
        distance = np.abs(float(weights[row, i]) - scale_of(bits, byte) * np.array(book_of(bits, byte), float))
        assert distance[code] <= distance.min() * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("bits", BITS)
def test_values_that_the_format_holds_come_back_unchanged(bits):
    """Any decoded block quantizes to the same values again, as long as its largest level is in use."""
    codes, scale_bytes = random_blocks(bits, 8, 64)
    widest = [int(np.argmax(np.abs(book_of(bits, int(byte))))) for byte in scale_bytes.reshape(-1)]
    codes.reshape(-1, 32)[:, 5] = widest
    values = dequantize_blocks(bits, codes, scale_bytes)
    assert np.array_equal(dequantize_blocks(bits, *quantize_ref(bits, values)), values)


@pytest.mark.parametrize("bits", BITS)
def test_zero_groups_tiny_and_huge_weights(bits):
    weights = np.zeros((1, 64), np.float32)
    codes, scale_bytes = quantize_ref(bits, weights)
    assert (scale_bytes == 0).all() and (dequantize_blocks(bits, codes, scale_bytes) == 0).all()
    weights[0, 40] = 1e-42  # a denormal: its group rounds to something no further away than the smallest scale
    values = dequantize_blocks(bits, *quantize_ref(bits, weights))
    assert (values[0, :32] == 0).all() and np.abs(values).max() <= scale_of(bits, 1) * 63
    weights[0, 40] = -1e3  # clipped to the largest value of that sign: the error of the 31 zeros is small beside it
    values = dequantize_blocks(bits, *quantize_ref(bits, weights))
    assert values[0, 40] == -scale_of(bits, (1 << SCALE[bits][0]) - 1) * max(
        abs(level) for book in LEVELS[bits] for level in book
    )


@pytest.mark.parametrize(("bits", "first"), [(2, 31 - 6), (3, 63 - 10), (4, 127 - 16)])
def test_the_first_candidate_wins_a_tie(bits, first):
    """Beside 1e30 every level is 0 in float32, so all errors are equal: sign +, codebook 0, the lowest scale of the
    window."""
    codes, scale_bytes = quantize_ref(bits, np.full((1, 64), 1e30, np.float32))
    assert scale_bytes.tolist() == [[first, first]] and (codes == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(bad):
    weights = np.ones((1, 64), np.float32)
    weights[0, 3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_ref(2, weights)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="96 is not a multiple of 64"):
        quantize_ref(2, np.ones((1, 96), np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        pack_blocks(2, np.zeros((1, 96), np.uint8), np.zeros((1, 3), np.uint8))
    with pytest.raises(ValueError, match="do not fit"):
        pack_blocks(2, np.zeros((1, 64), np.uint8), np.zeros((1, 3), np.uint8))
    with pytest.raises(ValueError, match="17 bytes are not a multiple of the block's 18"):
        unpack_blocks(2, np.zeros(17, np.uint8))
