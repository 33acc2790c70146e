"""Plain rounding against the best of all scale bytes in float64, and the torch decoder against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tacq_export.format.block_codec import CODECS, RING, dequantize_blocks
from tacq_export.quantization.fit_groups import dequantize_groups, round_to_nearest

BITS = [2, 3, 4]


def samples(seed: int, n: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, 32]: groups of several shapes and sizes; float32 [32]: importances over two decades."""
    rng = np.random.default_rng(seed)
    groups = np.concatenate(
        [rng.normal(0, 0.05, (n // 3, 32)), rng.laplace(0, 0.3, (n // 3, 32)), rng.uniform(-0.01, 0.02, (n // 3, 32))]
    )
    return groups.astype(np.float32), (10 ** rng.uniform(-1, 1, 32)).astype(np.float32)


def least_error(bits: int, groups: np.ndarray, byte: int, importance: np.ndarray) -> np.ndarray:
    """float64 [groups]: the least weighted squared error that codes can have under a scale byte. By the shortest closed
    path over all codes, from every state that the last code can leave."""
    codec = CODECS[bits]
    values = float(codec.scale_of_byte[byte]) * np.array(codec.levels, float)
    if not codec.trellis:
        return ((groups[:, :, None] - values).__abs__().min(2) ** 2 * importance).sum(1)
    x, w = groups[:, RING], importance[RING]
    best = np.full(len(groups), np.inf)
    for start in range(4):
        cost = np.full((len(groups), 4), np.inf)
        cost[:, start] = 0
        for j in range(32):
            new = np.full_like(cost, np.inf)
            for code in range(1 << bits):
                for before in range(4):
                    step = cost[:, before] + w[j] * (x[:, j] - values[4 * code + before]) ** 2
                    new[:, code % 4] = np.minimum(new[:, code % 4], step)
            cost = new
        best = np.minimum(best, cost[:, start])
    return best


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_rounding_is_nearly_as_good_as_the_best_of_all_256_bytes(bits, weighted):
    """The window of scales, and closing only the best paths, cost some per cent at most."""
    groups, importance = samples(bits)
    importance = importance if weighted else np.ones_like(importance)
    given = torch.from_numpy(importance) if weighted else None
    codes, scale_bytes = round_to_nearest(bits, torch.from_numpy(groups), given)
    values = dequantize_groups(bits, codes, scale_bytes).double().numpy()
    errors = ((groups - values) ** 2 * importance).sum(1)
    x, w = groups.astype(float), importance.astype(float)
    least = np.min([least_error(bits, x, byte, w) for byte in range(256)], axis=0)
    assert (errors >= least * (1 - 1e-5)).all(), "codes or scales mean something else than they say"
    assert np.mean(errors / least) < 1.04


@pytest.mark.parametrize("bits", [2, 3])
def test_the_codes_are_the_best_under_the_byte_that_was_taken(bits):
    groups, importance = samples(10 + bits)
    codes, scale_bytes = round_to_nearest(bits, torch.from_numpy(groups), torch.from_numpy(importance))
    values = dequantize_groups(bits, codes, scale_bytes).double().numpy()
    errors = ((groups - values) ** 2 * importance).sum(1)
    for r, byte in enumerate(scale_bytes[:, 0].tolist()):
        least = least_error(bits, groups[r : r + 1].astype(float), byte, importance.astype(float))[0]
        assert errors[r] == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 3, 128)])
def test_every_group_is_rounded_on_its_own(bits, importance):
    weights = torch.randn(5, 128, generator=torch.Generator().manual_seed(bits)) * 0.07
    codes, scale_bytes = round_to_nearest(bits, weights, importance)
    assert codes.shape == (5, 128) and scale_bytes.shape == (5, 4)
    for row in range(5):
        for g in range(4):
            own = slice(32 * g, 32 * g + 32)
            alone = round_to_nearest(bits, weights[row : row + 1, own], None if importance is None else importance[own])
            assert torch.equal(alone[0][0], codes[row, own]) and alone[1][0, 0] == scale_bytes[row, g]


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_zeros_get_the_zero_scale(bits):
    codes, scale_bytes = round_to_nearest(bits, torch.zeros(2, 64))
    assert not codes.any() and not scale_bytes.any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("outlier", [10, 100, 1000])
def test_an_outlier_is_not_clipped(bits, outlier):
    """One weight is many times larger than the others: the scale is looked for up to the one that reaches it."""
    groups = np.random.default_rng(3).normal(0, 0.01, (20, 32)).astype(np.float32)
    groups[:, 5] = 0.01 * outlier * np.linspace(0.7, 1.3, 20)
    values = dequantize_groups(bits, *round_to_nearest(bits, torch.from_numpy(groups))).double().numpy()
    least = np.min([least_error(bits, groups.astype(float), byte, np.ones(32)) for byte in range(256)], axis=0)
    assert (((groups - values) ** 2).sum(1) / least).mean() < 1.1


@pytest.mark.parametrize("bits", BITS)
def test_dequantize_on_torch_is_dequantize_on_numpy(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (64, 128), dtype=np.uint8)
    scale_bytes = np.arange(256, dtype=np.uint8).reshape(64, 4)
    on_torch = dequantize_groups(bits, torch.from_numpy(codes), torch.from_numpy(scale_bytes)).numpy()
    assert np.array_equal(on_torch.view(np.uint32), dequantize_blocks(bits, codes, scale_bytes).view(np.uint32))
