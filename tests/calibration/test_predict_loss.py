"""Predicted losses against the sums over tokens and outputs that they stand for, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_hf import tiny_model

from tacq_export.calibration import predict_loss
from tacq_export.calibration.gradients import EMBEDDING_OUTPUT, accumulate_gradients
from tacq_export.calibration.predict_loss import (
    SAMPLE_ROWS,
    embedding_loss,
    kept_shares,
    options_for,
    predict_losses,
    sample_rows,
)
from tacq_export.calibration.score_weights import saliency
from tacq_export.format.block_codec import dequantize_blocks
from tacq_export.format.tensor_types import TYPES_BY_NAME
from tacq_export.inputs.link_tensors import LinkedTensor
from tacq_export.quantization.fit_groups import round_to_nearest
from tacq_export.quantization.quantize_gptq import quantize_gptq
from tacq_export.quantization.trial_errors import TRIAL
from tacq_export.reporting import Reporter

DENSITIES = (1, 2, 3, 4, 6, 8, 12, 16)
TOKENS = 50


def matrix(rows: int, columns: int, seed: int = 0) -> LinkedTensor:
    module = torch.nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05)
    return LinkedTensor("m", "m", module, None)


def statistics(rows: int, columns: int, seed: int = 1):
    """Inputs [tokens, columns], what each token counts [tokens], mean 1, and energies of the rows [rows]; float64."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(1, TOKENS)
    return (
        rng.normal(0, 1, (TOKENS, columns)) * (np.arange(columns) % 5 + 1),
        weights / weights.mean(),
        rng.exponential(3, rows),
    )


def quantized(bits: int, weight: torch.Tensor, hessian: torch.Tensor) -> np.ndarray:
    result = quantize_gptq(bits, weight, hessian, None, 0.0, sweeps=1, feed_forward=False)
    return dequantize_blocks(bits, result.codes.numpy(), result.scale_bytes.numpy()).astype(float)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (SAMPLE_ROWS, 128), (1, 64)])
def test_with_all_rows_it_is_the_sum_over_tokens_and_outputs(rows, columns):
    """1/(2 T) sum_t sum_r g_tr^2 (D x_t)_r^2 for g_tr^2 = a_r w_t, which is what the prediction takes the gradients to
    be."""
    tensor = matrix(rows, columns)
    x, w, energy = statistics(rows, columns)
    hessian = torch.from_numpy(np.einsum("ti,tj->ij", x, x)).float()
    inputs = torch.from_numpy(x).float().split([20, 1, TOKENS - 21])
    found = predict_losses(
        TRIAL, tensor, hessian, inputs, torch.from_numpy(7 * w).float(), torch.from_numpy(energy).float()
    )  # only shares of w's mean count
    assert list(found) == [2, 3, 4]
    for bits, loss in found.items():
        d = tensor.weight.double().numpy() - quantized(bits, tensor.weight, hessian)
        expected = sum(w[t] * energy[r] / TOKENS * (d[r] @ x[t]) ** 2 for t in range(TOKENS) for r in range(rows)) / (
            2 * TOKENS
        )
        assert loss == pytest.approx(expected, rel=1e-4)  # float32 sums of some thousand terms


def test_a_sample_of_rows_stands_for_all_of_them():
    """400 rows alike: 96 of them say the same within their spread, here 5 %."""
    tensor, (x, _w, energy) = matrix(400, 64), statistics(400, 64)
    hessian = torch.from_numpy(np.einsum("ti,tj->ij", x, x)).float()
    found = predict_losses(
        TRIAL, tensor, hessian, [torch.from_numpy(x).float()], torch.ones(TOKENS), torch.from_numpy(energy).float()
    )
    for bits, loss in found.items():
        d = tensor.weight.double().numpy() - quantized(bits, tensor.weight, hessian)
        of_rows = np.einsum("ri,ij,rj->r", d, hessian.double().numpy(), d)
        assert loss == pytest.approx((energy * of_rows).sum() / (2 * TOKENS**2), rel=0.05)


def test_rows_with_most_of_the_energy_stand_for_themselves():
    """One row in fifty has a thousand times the energy: those rows are in the sample, and the estimate is within 2
    %."""
    tensor, (x, _, energy) = matrix(400, 64), statistics(400, 64)
    hessian = torch.from_numpy(np.einsum("ti,tj->ij", x, x)).float()
    energy[7::50] *= 1000
    energy = torch.from_numpy(energy).float()
    rows, stands_for = sample_rows(energy)
    assert (
        len(rows) == SAMPLE_ROWS == len(stands_for)
        and (rows.diff() > 0).all()
        and set(range(7, 400, 50)) <= set(rows.tolist())
    )
    assert float(stands_for.sum()) == pytest.approx(float(energy.sum()), rel=1e-5)
    top = energy.argsort(descending=True)[: SAMPLE_ROWS // 3]
    assert torch.equal(stands_for[torch.isin(rows, top)], energy[top.sort().values])
    for bits, loss in predict_losses(
        TRIAL, tensor, hessian, [torch.from_numpy(x).float()], torch.ones(TOKENS), energy
    ).items():
        d = tensor.weight.double().numpy() - quantized(bits, tensor.weight, hessian)
        of_rows = np.einsum("ri,ij,rj->r", d, hessian.double().numpy(), d)
        assert loss == pytest.approx((energy.double().numpy() * of_rows).sum() / (2 * TOKENS**2), rel=0.02)


def test_a_sample_larger_than_the_matrix_is_all_of_it():
    energy = torch.tensor([3.0, 1.0, 2.0])
    rows, stands_for = sample_rows(energy, 5)
    assert rows.tolist() == [0, 1, 2] and torch.equal(stands_for, energy)


def test_a_matrix_that_the_loss_does_not_feel_costs_nothing():
    tensor, (x, _, _) = matrix(32, 64), statistics(32, 64)
    hessian = torch.from_numpy(np.einsum("ti,tj->ij", x, x)).float()
    assert predict_losses(
        TRIAL, tensor, hessian, [torch.from_numpy(x).float()], torch.ones(TOKENS), torch.zeros(32)
    ) == {2: 0.0, 3: 0.0, 4: 0.0}


def room_of(rows: int, columns: int, p: int) -> int:
    return max((rows * columns // 64 * p - 16 - 4 * (rows + 1)) // 4, 0)


@pytest.mark.parametrize(
    ("rows", "columns", "score"), [(64, 256, "tacq"), (190, 128, "obs"), (96, 256, "magnitude"), (8, 64, "tacq")]
)
def test_shares_are_what_keeping_weights_takes_off_the_loss(rows, columns, score):
    """The rows are quantized with and without the most salient weights kept, as many as the sections hold."""
    tensor = matrix(rows, columns)
    x, _, energy = statistics(rows, columns)
    hessian = torch.from_numpy(np.einsum("ti,tj->ij", x, x) + 20 * np.eye(columns)).float()
    energy = torch.from_numpy(energy).float()
    statistic = (
        None if score == "magnitude" else torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) ** 4
    )
    found = kept_shares(TRIAL, tensor, hessian, energy, score, statistic, 0)
    assert list(found) == [2, 3, 4] and found[4] == found[3]
    sample, stands_for = sample_rows(energy, SAMPLE_ROWS // 2)
    weight = tensor.weight[sample]

    def loss(bits, mask):
        result = quantize_gptq(bits, weight, hessian, mask, 0.0, sweeps=1, feed_forward=False)
        q = dequantize_blocks(bits, result.codes.numpy(), result.scale_bytes.numpy()).astype(float)
        d = weight.double().numpy() - q - (0 if mask is None else result.kept_values.double().numpy())
        return (np.einsum("ri,ij,rj->r", d, hessian.double().numpy(), d) * stands_for.double().numpy()).sum()

    for bits in (2, 3):
        error = weight - torch.from_numpy(dequantize_blocks(bits, *(x.numpy() for x in round_to_nearest(bits, weight))))
        salient = saliency(score, "m", weight, None if statistic is None else statistic[sample], error).reshape(-1)
        for i, p in enumerate(DENSITIES):
            n = round(room_of(rows, columns, p) / (rows * columns) * len(salient))
            if n == 0:
                assert found[bits][i] == 0 or room_of(rows, columns, p) > 0
            elif p in predict_loss.SHARES_AT:
                mask = torch.zeros(len(salient), dtype=torch.bool)
                mask[salient.argsort(descending=True, stable=True)[:n]] = True
                assert found[bits][i] == pytest.approx(
                    1 - loss(bits, mask.reshape(weight.shape)) / loss(bits, None), rel=1e-3, abs=1e-5
                )
        assert found[bits] == sorted(found[bits]) and found[bits][0] >= 0 and found[bits][-1] < 1
        assert found[bits][-1] > 0.1 or rows == 8, "a quarter of all bits spent on kept weights saves something"


def test_between_measured_densities_the_share_is_a_power_of_the_number_kept():
    measured = {0.002: 0.1, 0.008: 0.2, 0.032: 0.3}
    between = predict_loss._between
    assert [between(measured, d) for d in measured] == pytest.approx([0.1, 0.2, 0.3])
    assert between(measured, 0.004) == pytest.approx(0.02**0.5)  # halfway in logarithms
    assert between(measured, 0.0005) == pytest.approx(0.05) and between(measured, 0) == 0.0 == between(
        {0.01: 0.0}, 0.01
    ) == between({}, 0.01)


def test_weights_that_the_loss_does_not_feel_are_not_worth_keeping():
    tensor = matrix(64, 64)
    assert kept_shares(TRIAL, tensor, torch.eye(64), torch.zeros(64), "magnitude", None, 0) == {
        bits: [0.0] * 8 for bits in (2, 3, 4)
    }


def test_every_type_is_an_option_with_its_size_and_what_keeping_leaves():
    tensor, loss = matrix(64, 256), {2: 8.0, 3: 2.0, 4: 0.5}
    shares = {bits: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7] for bits in loss}  # the smallest section holds nothing
    options = {o.type.name: o for o in options_for(tensor, loss, shares)}
    assert set(options) == {f"TACQ{b}" for b in loss} | {f"TACQ{b}_S{p}" for b in loss for p in DENSITIES[1:]}
    for name, option in options.items():
        bits, p = option.type.bits, option.type.p
        assert (
            option.n_bytes == 64 * 256 // 64 * ({2: 18, 3: 26, 4: 34}[bits] + p) == TYPES_BY_NAME[name].nbytes(64 * 256)
        )
        assert option.loss == pytest.approx(loss[bits] * (1 - (shares[bits][DENSITIES.index(p)] if p else 0)))
    assert [o.type.name for o in options_for(tensor, loss, {})] == ["TACQ2", "TACQ3", "TACQ4"]


def test_a_matrix_too_wide_for_column_indices_gets_base_types_only():
    wide = matrix(2, 65536 + 64)
    assert [o.type.name for o in options_for(wide, {2: 1.0, 3: 0.5, 4: 0.2}, {b: [0.5] * 8 for b in (2, 3, 4)})] == [
        "TACQ2",
        "TACQ3",
        "TACQ4",
    ]


TEXTS = [[1, 5, 9, 20, 5, 5, 4], [1, 300, 12]]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # Gemma's embedding multiplies by the root of its width
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_loss_of_an_embedding_is_that_of_what_it_puts_out(architecture, bits):
    """1/(2 T) sum_t sum_j a_j (y' - y)_tj^2, y' what a module with the rounded weights really puts out."""
    model = tiny_model(architecture).requires_grad_(False)
    module = model.get_input_embeddings()
    energy = accumulate_gradients(model, [], [], module, TEXTS, 1, Reporter())[f"{EMBEDDING_OUTPUT}/rows"]
    found = embedding_loss(TRIAL, LinkedTensor("token_embd.weight", "embed", module, None), energy, TEXTS, bits)
    outputs = lambda: np.concatenate([module(torch.tensor(text)).double().numpy() for text in TEXTS])  # noqa: E731
    exact = outputs()
    module.weight.copy_(
        torch.from_numpy(dequantize_blocks(bits, *(x.numpy() for x in round_to_nearest(bits, module.weight))))
    )
    n = len(exact)
    assert found == pytest.approx(((outputs() - exact) ** 2 @ (energy.double().numpy() / n)).sum() / (2 * n), rel=1e-3)


def test_widths_are_those_of_the_types():
    assert predict_loss.BITS == (2, 3, 4)
