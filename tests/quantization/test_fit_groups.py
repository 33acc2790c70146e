"""The exporter's weighted fit against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tacq_export.format.block_codec import CODECS, dequantize_blocks
from tacq_export.quantization.fit_groups import codes_for, dequantize_groups, fit_scale_bytes, round_to_nearest

BITS = [2, 3, 4]


def decoded(bits: int, byte: int) -> np.ndarray:
    """float64: the values that a group with this scale byte can have."""
    codec = CODECS[bits]
    return float(codec.scale_of_byte[byte]) * np.array(codec.levels[codec.codebook_of_byte[byte]], float)


def weighted_error(bits: int, group: np.ndarray, byte: int, importance: np.ndarray) -> float:
    return float((np.abs(group[:, None] - decoded(bits, byte)).min(1) ** 2 * importance).sum())


def samples(seed: int, n: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Groups of several shapes and sizes, and importances over four decades."""
    rng = np.random.default_rng(seed)
    groups = np.concatenate(
        [rng.normal(0, 0.05, (n // 3, 32)), rng.laplace(0, 0.3, (n // 3, 32)), rng.uniform(-0.01, 0.02, (n // 3, 32))]
    )
    return groups.astype(np.float32), (10 ** rng.uniform(-3, 1, groups.shape)).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_is_nearly_as_good_as_the_best_of_all_256_bytes(bits, weighted):
    """The window of scales costs next to nothing for 2 and 3 bits, and 4-bit groups some per cent of their small error.
    An importance over four decades moves the best scale further from the largest weight."""
    groups, importance = samples(bits)
    if not weighted:
        importance = np.ones_like(importance)
    found = fit_scale_bytes(bits, torch.from_numpy(groups), torch.from_numpy(importance) if weighted else None).numpy()
    errors = [
        weighted_error(bits, g, int(b), i)
        for g, b, i in zip(groups.astype(float), found, importance.astype(float), strict=True)
    ]
    least = [
        min(weighted_error(bits, g, b, i) for b in range(256))
        for g, i in zip(groups.astype(float), importance.astype(float), strict=True)
    ]
    assert np.mean(np.array(errors) / least) < {2: 1.05, 3: 1.05, 4: 1.1}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_the_fit_is_the_best_of_its_window(bits):
    """The candidates written out: every sign and codebook; scales around the first that does not clip the largest
    weight."""
    below, above = {2: (4, 1), 3: (6, 1), 4: (8, 4)}[bits]
    groups, importance = samples(10 + bits)
    found = fit_scale_bytes(bits, torch.from_numpy(groups), torch.from_numpy(importance)).numpy()
    codec = CODECS[bits]
    for g, byte, i in zip(groups.astype(float), found, importance.astype(float), strict=True):
        tried = []
        for book, levels in enumerate(codec.levels):
            reach = codec.magnitudes.astype(float) * max(map(abs, levels))
            first = int((reach < np.abs(g).max()).sum())
            ks = np.clip(np.arange(first - below, first + above + 1), 1, len(reach) - 1)
            tried += [sign | book << codec.scale_bits | int(k) for sign in (0, 128) for k in ks]
        # float32 sums of 32 terms: a relative error of some 1e-6
        assert weighted_error(bits, g, int(byte), i) <= min(weighted_error(bits, g, b, i) for b in tried) * (1 + 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_importance_0_leaves_a_weight_out(bits):
    """As for kept weights: whatever stands there, the others get the same grid, however large it is."""
    groups, importance = samples(20 + bits)
    left_out = np.zeros(groups.shape, bool)
    left_out[:, [0, 7, 31]] = True
    importance[left_out] = 0
    plain, wild = groups.copy(), groups.copy()
    plain[left_out] = 0
    wild[left_out] = np.where(np.arange(left_out.sum()) % 2, 100.0, -3.0)
    first, second = (fit_scale_bytes(bits, torch.from_numpy(g), torch.from_numpy(importance)) for g in (plain, wild))
    assert torch.equal(first, second)
    everything = fit_scale_bytes(bits, torch.from_numpy(wild), None)
    assert not torch.equal(first, everything), "the outliers change nothing even where they count"


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_zeros_and_groups_that_are_all_left_out_get_the_zero_scale(bits):
    groups = torch.zeros(2, 32)
    groups[1] = 0.3
    importance = torch.ones(2, 32)
    importance[1] = 0
    assert fit_scale_bytes(bits, groups, importance).tolist() == [0, 0]
    assert fit_scale_bytes(bits, groups[:1]).tolist() == [0]


@pytest.mark.parametrize("bits", BITS)
def test_one_importance_for_all_groups_is_that_of_each(bits):
    groups, importance = samples(30 + bits)
    one = torch.from_numpy(importance[0])
    groups = torch.from_numpy(groups)
    assert torch.equal(fit_scale_bytes(bits, groups, one), fit_scale_bytes(bits, groups, one.repeat(len(groups), 1)))


@pytest.mark.parametrize("bits", [3])
def test_chunks_change_nothing(bits):
    """More groups than are searched at once (8192)."""
    groups = torch.randn(8192 + 100, 32, generator=torch.Generator().manual_seed(bits)) * 0.1
    importance = torch.rand(groups.shape, generator=torch.Generator().manual_seed(9))
    assert torch.equal(
        fit_scale_bytes(bits, groups, importance)[8192:], fit_scale_bytes(bits, groups[8192:], importance[8192:])
    )


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_nearest_levels_under_every_scale_byte(bits):
    rng = np.random.default_rng(bits)
    scale_bytes = np.arange(256, dtype=np.uint8)
    spread = np.array([np.abs(decoded(bits, b)).max() for b in range(256)])
    weights = (rng.uniform(-1.2, 1.2, (256, 32)) * np.where(spread == 0, 1, spread)[:, None]).astype(np.float32)
    codes = codes_for(bits, torch.from_numpy(weights), torch.from_numpy(scale_bytes)).numpy()
    assert codes.dtype == np.uint8
    for byte in range(256):
        distance = np.abs(weights[byte].astype(float)[:, None] - decoded(bits, byte))
        taken = distance[np.arange(32), codes[byte]]
        assert (taken <= distance.min(1) * (1 + 1e-6) + 1e-9 * spread[byte]).all(), byte


@pytest.mark.parametrize("bits", BITS)
def test_huge_weights_take_the_outermost_level(bits):
    """Beyond the range of every table, and of float32 squares."""
    weights = torch.full((1, 32), 1e30)
    weights[0, 1] = -1e30
    byte = torch.tensor([5], dtype=torch.uint8)
    assert codes_for(bits, weights, byte)[0, :3].tolist() == [(1 << bits) - 1, 0, (1 << bits) - 1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 3, 128)])
def test_round_to_nearest_fits_every_group_on_its_own(bits, importance):
    weights = torch.randn(5, 128, generator=torch.Generator().manual_seed(bits)) * 0.07
    codes, scale_bytes = round_to_nearest(bits, weights, importance)
    assert codes.shape == (5, 128) and scale_bytes.shape == (5, 4)
    for row in range(5):
        for g in range(4):
            group = weights[row, 32 * g : 32 * g + 32][None]
            weight = None if importance is None else importance[32 * g : 32 * g + 32]
            byte = fit_scale_bytes(bits, group, weight)
            assert scale_bytes[row, g] == byte[0]
            assert torch.equal(codes[row, 32 * g : 32 * g + 32], codes_for(bits, group, byte)[0])


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_on_torch_is_dequantize_on_numpy(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (64, 128), dtype=np.uint8)
    scale_bytes = np.arange(256, dtype=np.uint8).reshape(64, 4)
    on_torch = dequantize_groups(bits, torch.from_numpy(codes), torch.from_numpy(scale_bytes)).numpy()
    assert np.array_equal(on_torch.view(np.uint32), dequantize_blocks(bits, codes, scale_bytes).view(np.uint32))
