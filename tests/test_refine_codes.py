"""Coordinate descent after GPTQ against a naive loop in float64, and what it may and may not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tacq_export.block_codec import CODECS
from tacq_export.fit_groups import dequantize_groups
from tacq_export.quantize_gptq import quantize_gptq
from tacq_export.refine_codes import refine_codes

DAMPING = 0.01


def problem(columns: int = 192, rows: int = 6, share_kept: float = 0.03):
    """Correlated inputs, as in a real layer, so that errors can make up for each other."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(400, columns, generator=g) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=g) / 4)
    weights = 0.05 * torch.randn(rows, columns, generator=g)
    kept = torch.rand(rows, columns, generator=g) < share_kept
    return weights, x.t() @ x, kept


def damped(hessian: torch.Tensor) -> np.ndarray:
    h = hessian.double().numpy()
    return h + DAMPING * np.diag(h).mean() * np.eye(len(h))


def loss(weights, quantized, hessian) -> float:
    d = weights.double().numpy() - quantized.double().numpy()
    return float(np.einsum("ri,ij,rj->", d, damped(hessian), d))


def values_of(bits, result) -> torch.Tensor:
    values = dequantize_groups(bits, result.codes, result.scale_bytes)
    return values if result.kept_values is None else values + result.kept_values


def naive_sweep(bits, weights, hessian, result, kept):
    """One weight after the other in float64: all gradients from nothing, the nearest of all levels by looking at each."""
    h, w, q = damped(hessian), weights.double().numpy(), values_of(bits, result).double().numpy()
    codec = CODECS[bits]
    codes = result.codes.numpy().copy()
    for r in range(w.shape[0]):
        for j in range(w.shape[1]):
            best = q[r, j] + (w[r] - q[r]) @ h[:, j] / h[j, j]
            byte = int(result.scale_bytes[r, j // 32])
            levels = float(codec.scale_of_byte[byte]) * codec.codebooks[codec.codebook_of_byte[byte]].astype(float)
            codes[r, j] = np.abs(levels - best).argmin()
            q[r, j] = best if kept is not None and kept[r, j] else levels[codes[r, j]]
    return codes, q


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("with_kept", [False, True])
def test_a_sweep_is_that_of_the_naive_loop(bits, with_kept):
    weights, hessian, kept = problem()
    kept = kept if with_kept else None
    before = quantize_gptq(bits, weights, hessian, kept, DAMPING)
    after = refine_codes(bits, weights, hessian, before, kept, 1, DAMPING)
    codes, values = naive_sweep(bits, weights, hessian, before, kept)
    assert (after.codes.numpy() != before.codes.numpy()).sum() > 10  # it has something to do
    # float32 sums may round a weight that lies between two levels the other way, and those after it in its row follow.
    assert (after.codes.numpy() == codes).mean() > 0.99
    assert loss(weights, values_of(bits, after), hessian) == pytest.approx(loss(weights, torch.from_numpy(values), hessian), rel=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_loss_falls_with_every_sweep_until_nothing_moves(bits):
    weights, hessian, kept = problem()
    result = quantize_gptq(bits, weights, hessian, kept, DAMPING)
    losses = [loss(weights, values_of(bits, result), hessian)]
    for _ in range(30):
        result = refine_codes(bits, weights, hessian, result, kept, 1, DAMPING)
        losses.append(loss(weights, values_of(bits, result), hessian))
    # 1e-4: the rounding of float32 gradients where next to nothing moves.
    assert all(b <= a * (1 + 1e-4) for a, b in zip(losses, losses[1:]))
    assert losses[1] < 0.99 * losses[0] and losses[-1] > 0.995 * losses[-2]


def test_scale_bytes_stay_and_kept_values_belong_to_kept_weights():
    weights, hessian, kept = problem()
    before = quantize_gptq(2, weights, hessian, kept, DAMPING)
    after = refine_codes(2, weights, hessian, before, kept, 3, DAMPING)
    assert torch.equal(after.scale_bytes, before.scale_bytes)
    assert (after.kept_values[~kept] == 0).all() and (after.kept_values[kept] != 0).any()
    assert after.error < before.error


def test_no_sweep_changes_nothing():
    weights, hessian, kept = problem()
    before = quantize_gptq(3, weights, hessian, kept, DAMPING)
    assert refine_codes(3, weights, hessian, before, kept, 0) is before


def test_an_input_that_was_never_used_is_harmless():
    weights, hessian, kept = problem()
    hessian[5] = hessian[:, 5] = 0
    before = quantize_gptq(2, weights, hessian, None, DAMPING)
    after = refine_codes(2, weights, hessian, before, None, 2, DAMPING)
    assert torch.isfinite(values_of(2, after)).all()
