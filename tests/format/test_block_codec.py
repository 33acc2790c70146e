"""The base codec against a loop over single weights, and plain rounding against brute force in float64."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest

from tacq_export.format import quantize_ref as reference
from tacq_export.format.block_codec import CODECS, RING, dequantize_blocks, level_indices, pack_blocks, unpack_blocks
from tacq_export.format.quantize_ref import quantize_ref

BITS = [2, 3, 4]
BLOCK_BYTES = {2: 18, 3: 26, 4: 34}
# Format version 2, written out again so that a changed number in the code is noticed.
LEVELS = {
    2: [-52, 36, -12, 13, -14, -31, 5, 63, 6, -6, 25, -24, 30, 11, -35, -5],
    3: [-63, -10, -29, -20, -27, -2, -17, -10, -16, -41, -9, -2, -8, -21, -1, -34]
    + [-1, 21, 6, 12, 6, 35, 14, 22, 16, 5, 26, 39, 28, 13, 51, 5],
    4: [-61, -47, -36, -28, -21, -14, -8, -2, 4, 10, 16, 23, 30, 39, 50, 63],
}
# The weights of a group of 32 in the order of its ring, written out.
RING_ORDER = [
    *(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
    *(16, 20, 24, 28, 17, 21, 25, 29, 18, 22, 26, 30, 19, 23, 27, 31),
]


def code_in_block(bits: int, block: bytes, i: int) -> int:
    """Code of weight i (0 to 63), bit by bit, after the layout in cpp_ext/tacq-common.h."""
    if bits == 4:
        return block[2 + 16 * (i // 32) + i % 16] >> (4 * (i // 16 % 2)) & 15
    w, v, b = i // 16, i // 4 % 4, i % 4
    code = block[2 + 4 * w + b] >> 2 * v & 3
    if bits == 3:
        code |= (block[18 + 4 * (w // 2) + b] >> (4 * (w % 2) + v) & 1) << 2
    return code


def scale_of(byte: int) -> float:
    """Signed scale of a scale byte: 0 for k = 0, else 2^-28 times 7/32 octave a step, with a linear mantissa."""
    octaves, rest = divmod(byte % 128 * 7, 32)
    return (-1 if byte & 128 else 1) * (2.0 ** (octaves - 28) * (1 + rest / 32) if byte % 128 else 0.0)


def level_of(bits: int, codes: list[int], i: int) -> int:
    """Level of weight i of a group of 32 codes."""
    if bits == 4:
        return LEVELS[4][codes[i]]
    before = RING_ORDER[RING_ORDER.index(i) - 1]  # of the first one, the last
    return LEVELS[bits][4 * codes[i] + codes[before] % 4]


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


def test_the_ring_visits_every_fourth_weight():
    assert RING.tolist() == RING_ORDER


@pytest.mark.parametrize("bits", BITS)
def test_every_scale_byte_decodes_to_the_documented_number(bits):
    for byte in range(256):
        assert struct.pack("<f", CODECS[bits].scale_of_byte[byte] + 0.0) == struct.pack("<f", scale_of(byte) + 0.0), (
            byte
        )


@pytest.mark.parametrize("bits", BITS)
def test_scales_ascend_from_exactly_zero(bits):
    codec = CODECS[bits]
    assert codec.magnitudes[0] == 0.0
    assert (np.diff(codec.magnitudes) > 0).all()
    zero = dequantize_blocks(bits, np.arange(64, dtype=np.uint8) % (1 << bits), np.zeros(2, np.uint8))
    assert (zero == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_upper_half_of_a_scale_says_all(bits):
    """Kernels multiply in 16 bits (cpp_ext/tacq-simd.h)."""
    assert (CODECS[bits].magnitudes.view(np.uint32) & 0xFFFF == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_those_of_the_page_and_fit_kernels(bits):
    assert list(CODECS[bits].levels) == LEVELS[bits]
    assert max(map(abs, LEVELS[bits])) == 63  # level + 64 is a signed byte above 0, and 2 * 127 * 127 fits 16 bits


@pytest.mark.parametrize("bits", BITS)
def test_scales_cover_the_range_that_models_need(bits):
    """Groups of a standard deviation of 2^-21 to 2^3 have nearly the same relative error."""
    rng = np.random.default_rng(0)

    def relative_error(sigma: float) -> float:
        weights = rng.normal(0, sigma, (100, 64)).astype(np.float32)
        return float(
            np.square(weights - dequantize_blocks(bits, *quantize_ref(bits, weights))).sum() / np.square(weights).sum()
        )

    middle = relative_error(2.0**-5)
    assert max(relative_error(2.0**e) for e in (-21, -18, -11, -7, -1, 0, 1, 3)) < 1.1 * middle


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_scale_times_level_of_each_weight(bits):
    codes, scale_bytes = random_blocks(bits, 4, 128)
    values = dequantize_blocks(bits, codes, scale_bytes)
    assert values.dtype == np.float32
    for row, i in np.ndindex(codes.shape):
        group = codes[row, i // 32 * 32 : i // 32 * 32 + 32].tolist()
        exact = scale_of(int(scale_bytes[row, i // 32])) * level_of(bits, group, i % 32)  # 24-bit products
        assert float(values[row, i]) == exact


@pytest.mark.parametrize("bits", [2, 3])
def test_the_windows_of_a_dword_are_the_indices(bits):
    """What kernels do: y = x << 2 | other >> 30, and the low halves of the bytes of y, x, y >> 4, x >> 4."""
    codes, scale_bytes = random_blocks(bits, 5, 64)
    data = pack_blocks(bits, codes, scale_bytes)
    x = np.ascontiguousarray(data[:, 2:18]).view("<u4")
    y = x << 2 | x[:, [1, 0, 3, 2]] >> 30
    windows = np.stack([y, x, y >> 4, x >> 4], axis=-1)[..., None].view(np.uint8) & 15  # [row, w, v, b]
    assert np.array_equal(windows.reshape(5, 64), level_indices(bits, codes) % 16)
    assert np.array_equal(level_indices(bits, codes) // 16, codes // 4)


KINDS = {
    "normal": lambda rng: rng.normal(0, 0.05, (2, 64)),
    "uniform": lambda rng: rng.uniform(-0.3, 0.3, (2, 64)),
    "laplace": lambda rng: rng.laplace(0, 0.02, (2, 64)),
    "skewed": lambda rng: -np.abs(rng.normal(0, 0.1, (2, 64))),
    "one outlier": lambda rng: rng.normal(0, 0.01, (2, 64)) + 0.5 * (np.arange(64) % 32 == 3),
    "tiny": lambda rng: rng.normal(0, 1e-8, (2, 64)),
    "large": lambda rng: rng.normal(0, 8, (2, 64)),
    "clipped": lambda rng: rng.normal(0, 500, (2, 64)),
}


def squared_error(bits: int, group: np.ndarray, byte: int) -> float:
    """The least of a group (float64) under one scale byte. Trellis: the cheapest closed path, as the trace of products
    of matrices in which sums are minima and products are sums."""
    errors = (group[:, None] - scale_of(byte) * np.array(LEVELS[bits], float)) ** 2
    if bits == 4:
        return float(errors.min(axis=1).sum())
    steps = errors.reshape(32, -1, 4, 4).min(axis=1)  # [weight, state, state before]
    paths = np.where(np.eye(4, dtype=bool), 0.0, np.inf)
    for i in RING_ORDER:
        paths = (steps[i][:, :, None] + paths[None]).min(axis=1)
    return float(paths.diagonal().min())


# How many scales below and above the one that a group's size asks for are tried: part of the reference codec.
SEARCHED = {2: (3, 3), 3: (3, 3), 4: (8, 2)}


def searched_bytes(bits: int, group: np.ndarray) -> list[int]:
    """The scale bytes that the reference quantizer looks at: both signs, a window of scales. A trellis: around the one
    that the power asks for, and up to the one that does not clip the peak."""
    below, above = SEARCHED[bits]

    def reaching(level: float, wanted: float) -> int:
        return next((k for k in range(128) if scale_of(k) * level >= wanted), 127)

    first = last = reaching(63.0, np.abs(group).max())
    if bits < 4:
        first = reaching(float(np.sqrt(np.mean(np.square(LEVELS[bits])))), float(np.sqrt(np.mean(group**2))))
    last = first + above if bits == 4 else max(first + above, last)
    return [sign | k for sign in (0, 128) for k in range(max(1, first - below), min(127, last) + 1)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_ref_finds_the_least_error_of_both_signs_and_all_scales(bits, kind):
    weights = KINDS[kind](np.random.default_rng(7)).astype(np.float32)
    values = dequantize_blocks(bits, *quantize_ref(bits, weights)).astype(np.float64)
    found = ((weights - values) ** 2).reshape(-1, 32).sum(1)
    groups = weights.reshape(-1, 32).astype(np.float64)
    # quantize_ref takes differences in float32 (relative error 2^-24 each), so that C and Python agree.
    np.testing.assert_allclose(
        found, [min(squared_error(bits, g, b) for b in searched_bytes(bits, g)) for g in groups], rtol=1e-5
    )


@pytest.mark.parametrize("bits", [2, 3])
def test_the_best_ring_is_that_of_trying_all(bits, monkeypatch):
    """Rings of four weights, every one tried: the same error, from codes that have it."""
    monkeypatch.setattr(reference, "GROUP_SIZE", 4)
    monkeypatch.setattr(reference, "RING", np.array([0, 2, 1, 3]))
    groups = np.random.default_rng(2).normal(0, 30, (40, 4)).astype(np.float32)
    err, codes = reference._best_ring(CODECS[bits], groups, np.ones(len(groups), np.float32))
    rings = np.array(list(itertools.product(range(1 << bits), repeat=4)))  # in the order of the ring
    levels = np.array(LEVELS[bits])[4 * rings + np.roll(rings, 1, axis=1) % 4]
    wanted = ((groups[:, None, [0, 2, 1, 3]] - levels) ** 2).sum(axis=2)
    np.testing.assert_allclose(err, wanted.min(axis=1), rtol=1e-6)
    at = (codes[:, [0, 2, 1, 3]] << bits * np.arange(4)[::-1]).sum(axis=1)
    assert np.array_equal(at, wanted.argmin(axis=1))


@pytest.mark.parametrize("bits", BITS)
def test_the_window_of_scales_loses_next_to_nothing(bits):
    """Against every scale byte there is, on normal groups."""
    groups = np.random.default_rng(1).normal(0, 0.05, (16, 32)).astype(np.float32)
    values = dequantize_blocks(bits, *quantize_ref(bits, groups.reshape(-1, 64))).reshape(-1, 32)
    least = sum(min(squared_error(bits, g, byte) for byte in range(256)) for g in groups.astype(np.float64))
    assert ((groups - values.astype(np.float64)) ** 2).sum() <= 1.001 * least


def test_quantize_ref_takes_the_nearest_code_of_tacq4():
    weights = np.random.default_rng(3).normal(0, 0.05, (2, 128)).astype(np.float32)
    codes, scale_bytes = quantize_ref(4, weights)
    for (row, i), code in np.ndenumerate(codes):
        byte = int(scale_bytes[row, i // 32])
        distance = np.abs(float(weights[row, i]) - scale_of(byte) * np.array(LEVELS[4], float))
        assert distance[code] <= distance.min() * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("bits", BITS)
def test_values_that_the_format_holds_come_back_unchanged(bits):
    """A decoded block quantizes to the same values again, where its largest level is in use: TACQ4 looks around the
    scale that this one says, a trellis around the one that the group's power says."""
    codes, scale_bytes = random_blocks(bits, 8, 64)
    scale_bytes[scale_bytes % 128 == 0] += 1
    codes.reshape(-1, 32)[:, 5] = LEVELS[4].index(63) if bits == 4 else codes.reshape(-1, 32)[:, 5]
    values = dequantize_blocks(bits, codes, scale_bytes)
    assert np.array_equal(dequantize_blocks(bits, *quantize_ref(bits, values)), values)


@pytest.mark.parametrize("bits", BITS)
def test_zero_groups_tiny_and_huge_weights(bits):
    weights = np.zeros((1, 64), np.float32)
    codes, scale_bytes = quantize_ref(bits, weights)
    assert (scale_bytes == 0).all() and (codes == 0).all()
    assert (dequantize_blocks(bits, codes, scale_bytes) == 0).all()
    weights[0, 40] = 1e-42  # a denormal: its group rounds to something no further away than the smallest scale
    values = dequantize_blocks(bits, *quantize_ref(bits, weights))
    assert (values[0, :32] == 0).all() and np.abs(values).max() <= scale_of(1) * 63
    weights[0, 40] = -1e4  # clipped to the largest value: the error of the 31 zeros is small beside it
    values = dequantize_blocks(bits, *quantize_ref(bits, weights))
    assert values[0, 40] == -scale_of(127) * 63


@pytest.mark.parametrize(("bits", "first"), [(2, 127 - 3), (3, 127 - 3), (4, 127 - 8)])
def test_the_first_candidate_wins_a_tie(bits, first):
    """Beside 1e30 every level is 0 in float32, so all errors are equal: sign +, the lowest scale of the window."""
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
