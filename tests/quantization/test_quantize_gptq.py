"""GPTQ by groups and its sweeps against the same done naively in float64, with explicit linear systems
(naive_descent.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from naive_descent import damped, loss_of, naive_gptq

from tacq_export.calibration.hessian import inverse_hessian_cholesky, shrink
from tacq_export.config import ExportConfig
from tacq_export.errors import TacqError
from tacq_export.format.block_codec import dequantize_blocks
from tacq_export.format.gguf_file import open_gguf, tensor_values
from tacq_export.pipeline import export
from tacq_export.quantization import quantize_rows
from tacq_export.quantization.fit_groups import dequantize_groups, round_to_nearest
from tacq_export.quantization.quantize_gptq import quantize_gptq, relative_error

ROWS, COLUMNS, DAMPING = 16, 192, 0.01  # six groups
BITS = [2, 3, 4]


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, the Hessian of correlated inputs, and a mask of kept weights with whole groups and single ones in it."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(ROWS, COLUMNS, generator=g) * 0.05
    mix = torch.randn(COLUMNS, COLUMNS, generator=g) / COLUMNS**0.5 + torch.eye(COLUMNS)
    inputs = torch.randn(600, COLUMNS, generator=g) @ mix * (torch.arange(COLUMNS) % 7 + 1)
    kept = torch.rand(ROWS, COLUMNS, generator=g) < 0.03
    kept[3, 32:64] = True
    return weights, inputs.t() @ inputs, kept


def values_of(bits: int, result) -> torch.Tensor:
    values = dequantize_groups(bits, result.codes, result.scale_bytes)
    return values if result.kept_values is None else values + result.kept_values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("with_kept", [False, True])
@pytest.mark.parametrize(("feed_forward", "sweeps"), [(True, 0), (False, 0), (True, 1), (True, 3)])
def test_codes_scales_and_kept_values_are_those_of_the_naive_loop(bits, with_kept, feed_forward, sweeps):
    """float32 loses some 1e-6 of a loss or of a weight: where two bytes or two codes are nearer than that, the other
    one may be taken, and the groups after it in its row follow. It happens to none of the 96 groups of these seeds
    (losses agree to 1e-8); one row of 16 may go another way on a machine that rounds otherwise."""
    weights, hessian, kept = problem(bits)
    kept = kept if with_kept else None
    expected = naive_gptq(
        bits, weights.numpy(), hessian.numpy(), None if kept is None else kept.numpy(), DAMPING, sweeps, feed_forward
    )
    result = quantize_gptq(bits, weights, hessian, kept, DAMPING, sweeps=sweeps, feed_forward=feed_forward)
    same_byte = result.scale_bytes.numpy() == expected["scale_bytes"]
    same_codes = (result.codes.numpy() == expected["codes"]).reshape(ROWS, -1, 32).all(2)
    assert (same_byte & same_codes).all(1).sum() >= ROWS - 1
    h = damped(hessian.numpy(), DAMPING)
    found, naive = (
        loss_of(weights.numpy(), v, h) for v in (values_of(bits, result).double().numpy(), expected["values"])
    )
    assert found.sum() == pytest.approx(naive.sum(), rel=5e-3)
    rows = (same_byte & same_codes).all(1)  # in which nothing went the other way
    np.testing.assert_allclose(found[rows], naive[rows], rtol=1e-3)
    if kept is None:
        assert result.kept_values is None
        return
    mask = kept.numpy()
    rebuilt = values_of(bits, result).numpy()
    # Errors fed forward pile up over 192 columns: 1e-4 of a weight.
    np.testing.assert_allclose(rebuilt[rows][mask[rows]], expected["values"][rows][mask[rows]], atol=5e-6)
    assert (result.kept_values.numpy()[~mask] == 0).all() and (result.kept_values.numpy()[mask] != 0).any()
    assert expected["scale_bytes"][3, 1] == 0 == int(result.scale_bytes[3, 1]), (
        "a group that is kept as a whole needs no scale"
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("with_kept", [False, True])
def test_the_damped_loss_never_rises_from_sweep_to_sweep(bits, with_kept):
    """No more than the rounding of float32 gradients; the first sweep gains most, and the last next to nothing."""
    weights, hessian, kept = problem(30 + bits)
    h = damped(hessian.numpy(), DAMPING)
    losses = []
    for sweeps in range(9):
        result = quantize_gptq(bits, weights, hessian, kept if with_kept else None, DAMPING, sweeps=sweeps)
        losses.append(loss_of(weights.numpy(), values_of(bits, result).double().numpy(), h))
    losses = np.array(losses)
    assert (losses[1:] <= losses[:-1] * (1 + 1e-4)).all()
    total = losses.sum(1)
    assert total[1] < 0.99 * total[0] and total[0] - total[1] > total[1] - total[2] and total[-1] > 0.99 * total[-2]


def test_feeding_errors_forward_pays():
    weights, hessian, _ = problem(50)
    with_it, without = (
        quantize_gptq(2, weights, hessian, None, DAMPING, sweeps=0, feed_forward=f).error for f in (True, False)
    )
    assert with_it < 0.9 * without


@pytest.mark.parametrize("bits", BITS)
def test_no_single_change_of_a_code_lowers_the_loss_after_many_sweeps(bits):
    """A fixed point of coordinate descent, tried weight by weight with all levels."""
    weights, hessian, kept = (x[:4] if i != 1 else x for i, x in enumerate(problem(70 + bits)))
    result = quantize_gptq(bits, weights, hessian, kept, DAMPING, sweeps=60)
    h = damped(hessian.numpy(), DAMPING)
    d = (values_of(bits, result) - weights).double().numpy()
    gradient, total = d @ h, np.einsum("ri,ij,rj->", d, h, d)
    best = 0.0
    for r, j in np.argwhere(~kept.numpy()):
        g, own = j // 32, slice(j // 32 * 32, j // 32 * 32 + 32)
        tried = result.codes[r, own].numpy()[None].repeat(1 << bits, 0)
        tried[:, j % 32] = np.arange(1 << bits)
        bytes_of_all = np.full((1 << bits, 1), int(result.scale_bytes[r, g]), np.uint8)
        grid = dequantize_blocks(bits, tried, bytes_of_all).astype(float)
        steps = np.where(kept[r, own].numpy(), 0.0, grid - grid[result.codes[r, j]])  # of the code behind it, too
        best = min(best, float((2 * steps @ gradient[r, own] + ((steps @ h[own, own]) * steps).sum(1)).min()))
    assert best > -1e-5 * total
    # At a kept weight of a group with a scale, nothing is left of the gradient.
    used = kept.numpy() & np.repeat(result.scale_bytes.numpy() != 0, 32, axis=1)
    assert np.abs(gradient[used]).max() < 1e-3 * np.abs(gradient).max()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_the_number_of_threads_changes_no_bit(rows):
    g = torch.Generator().manual_seed(rows)
    weights, hessian = torch.randn(rows, COLUMNS, generator=g) * 0.05, problem(2)[1]
    kept = torch.rand(rows, COLUMNS, generator=g) < 0.03
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(quantize_gptq(2, weights, hessian, kept, DAMPING))
    finally:
        torch.set_num_threads(before)
    one, two = results
    assert (
        torch.equal(one.codes, two.codes)
        and torch.equal(one.scale_bytes, two.scale_bytes)
        and torch.equal(one.kept_values, two.kept_values)
    )


def test_rows_of_zeros_stay_zero():
    weights, hessian, _ = problem(51)
    weights[2] = 0
    weights[5, 64:96] = 0
    result = quantize_gptq(2, weights, hessian, None, DAMPING)
    assert (result.scale_bytes[2] == 0).all() and (values_of(2, result)[2] == 0).all()
    zero = quantize_gptq(2, torch.zeros_like(weights), hessian, None, DAMPING)
    assert (zero.scale_bytes == 0).all() and zero.error == 0


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_the_weighted_one_and_lower_than_that_of_plain_rounding(bits):
    weights, hessian, kept = problem(40 + bits)

    def relative(quantized: torch.Tensor) -> float:
        d, w, h = (x.double().numpy() for x in (weights - quantized, weights, hessian))
        return float(np.trace(d @ h @ d.T) / np.trace(w @ h @ w.T))

    result = quantize_gptq(bits, weights, hessian, None, DAMPING)
    ours = relative(dequantize_groups(bits, result.codes, result.scale_bytes))
    assert result.error == pytest.approx(ours, rel=1e-3)  # float32 products of 192 columns
    plain = relative(dequantize_groups(bits, *round_to_nearest(bits, weights, hessian.diagonal().float())))
    assert ours < 0.8 * plain
    with_kept = quantize_gptq(bits, weights, hessian, kept, DAMPING)
    kept_error = relative(dequantize_groups(bits, with_kept.codes, with_kept.scale_bytes) + with_kept.kept_values)
    assert with_kept.error == pytest.approx(kept_error, rel=1e-3)
    assert kept_error < ours


@pytest.mark.parametrize("bits", BITS)
def test_without_correlation_gptq_is_plain_rounding(bits):
    """H diagonal: nothing to feed forward."""
    weights = problem(60)[0]
    diagonal = torch.linspace(1, 9, COLUMNS)
    result = quantize_gptq(bits, weights, torch.diag(diagonal), None, DAMPING, sweeps=0)
    codes, scale_bytes = round_to_nearest(bits, weights, diagonal)
    assert torch.equal(result.codes, codes) and torch.equal(result.scale_bytes, scale_bytes)
    swept = quantize_gptq(bits, weights, torch.diag(diagonal), None, DAMPING)
    assert 0.99 * result.error < swept.error <= result.error, "a sweep looks around the scale that was found"


def test_all_weights_kept_is_exact():
    """Every error is zero, so no weight moves and base + difference is the weight (one float32 rounding apart)."""
    weights, hessian, _ = problem(61)
    result = quantize_gptq(2, weights, hessian, torch.ones(ROWS, COLUMNS, dtype=torch.bool), DAMPING)
    rebuilt = dequantize_groups(2, result.codes, result.scale_bytes) + result.kept_values
    np.testing.assert_allclose(rebuilt.numpy(), weights.numpy(), rtol=1e-6, atol=1e-9)
    assert result.error < 1e-10


def test_the_weights_and_the_hessian_are_not_changed():
    weights, hessian, kept = problem(62)
    before = weights.clone(), hessian.clone(), kept.clone()
    quantize_gptq(2, weights, hessian, kept, DAMPING)
    assert all(torch.equal(a, b) for a, b in zip(before, (weights, hessian, kept), strict=True))


def test_a_given_cholesky_is_used():
    weights, hessian, _ = problem(63)
    upper = inverse_hessian_cholesky(hessian, DAMPING)
    given, own = (
        quantize_gptq(2, weights, hessian, None, DAMPING, upper=upper),
        quantize_gptq(2, weights, hessian, None, DAMPING),
    )
    assert torch.equal(given.codes, own.codes)


def test_cholesky_is_that_of_the_damped_inverse():
    hessian = problem(64)[1].double().numpy()
    damped = hessian + 0.05 * np.diag(hessian).mean() * np.eye(COLUMNS)
    upper = inverse_hessian_cholesky(torch.from_numpy(hessian), 0.05).double().numpy()
    assert np.array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(COLUMNS), atol=1e-4)  # stored as float32


def test_an_input_that_is_never_used_does_not_disturb():
    """Its diagonal is 0; the official code puts 1 there. Its column has no error to feed forward and stays finite."""
    weights, hessian, _ = problem(65)
    hessian[10, :] = hessian[:, 10] = 0
    result = quantize_gptq(3, weights, hessian, None, DAMPING)
    values = dequantize_groups(3, result.codes, result.scale_bytes)
    assert torch.isfinite(values).all() and 0 < result.error < 0.05
    everything = quantize_gptq(3, weights, torch.zeros(COLUMNS, COLUMNS), None, DAMPING)
    assert torch.isfinite(dequantize_groups(3, everything.codes, everything.scale_bytes)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_shrunk_hessian_of_few_inputs_gives_less_error_on_others(bits):
    """Inputs of one correlated distribution: quantized with the Hessian of 1.5 times as many as there are columns, the
    error on 20,000 others falls by a twentieth at the least (here a tenth)."""
    rng = np.random.default_rng(68)
    mixing = rng.normal(0, 1, (COLUMNS, COLUMNS)) / np.sqrt(COLUMNS) + np.eye(COLUMNS)
    few, many = (torch.from_numpy(rng.normal(0, 1, (n, COLUMNS)) @ mixing).float() for n in (COLUMNS * 3 // 2, 20_000))
    weights, elsewhere = torch.from_numpy(rng.normal(0, 0.02, (96, COLUMNS))).float(), many.t() @ many
    wrong = []
    for shrinkage in (0.0, 0.5):
        hessian = few.t() @ few
        before = hessian.clone()
        assert shrink(hessian, len(few), shrinkage) is hessian
        np.testing.assert_allclose(
            (hessian - before).numpy(),
            shrinkage * COLUMNS / len(few) * torch.diag(before.diagonal()).numpy(),
            rtol=1e-5,
        )
        result = quantize_gptq(bits, weights, hessian, None, DAMPING)
        wrong.append(relative_error(weights, dequantize_groups(bits, result.codes, result.scale_bytes), elsewhere))
    assert wrong[1] < 0.95 * wrong[0]


@pytest.mark.parametrize("bad", ["negative", "nan"])
def test_a_hessian_that_is_not_positive_definite_is_refused_by_name(bad):
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 5.0 if bad == "negative" else float("nan")
    with pytest.raises(
        TacqError,
        match=r"tensor 'blk.3.ffn_down.weight': the Hessian is not positive definite; use more or longer examples, or "
        r"a damping above 0.01$",
    ):
        quantize_gptq(2, torch.randn(4, 64), hessian, None, 0.01, "blk.3.ffn_down.weight")


def test_the_same_input_gives_the_same_bytes():
    weights, hessian, kept = problem(66)
    first, second = (quantize_gptq(2, weights, hessian, kept, DAMPING) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.kept_values, second.kept_values)


def test_an_exported_file_holds_what_gptq_gave_in_the_rows_of_the_gguf(tiny_gguf, tiny_task, tmp_path, monkeypatch):
    """Codes, scales and kept differences of every matrix, through packing, permuting (Llama's q and k) and writing."""
    results = {}

    def watched(bits, weights, hessian, kept, damping, name, *rest):
        results[name] = quantize_gptq(bits, weights, hessian, kept, damping, name, *rest)
        return results[name]

    monkeypatch.setattr(quantize_rows, "quantize_gptq", watched)
    outfile = tmp_path / "out.gguf"
    export(
        ExportConfig(
            model=str(tiny_gguf),
            task=tiny_task,
            outfile=outfile,
            ratio=0.02,
            n_samples=3,
            seq_len=32,
            device="cpu",
            output_tensor_type="q8_0",
            refine_sweeps=1,
        )
    )
    tensors = {t.name: t for t in open_gguf(outfile).tensors}
    reference = {t.name: t for t in open_gguf(tiny_gguf).tensors}
    assert len(results) == 14 and any(t.tensor_type.name.startswith("TACQ2_S") for t in tensors.values())
    for name, result in results.items():
        expected = dequantize_groups(2, result.codes, result.scale_bytes)
        if result.kept_values is not None:
            assert (result.kept_values != 0).any()
            expected = expected + result.kept_values.half().float()
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[2])
        if heads:  # row (head, half, i) becomes row (head, i, half)
            expected = expected.reshape(heads, 2, 8, 64).transpose(1, 2).reshape(expected.shape)
        assert np.array_equal(tensor_values(tensors[name]), expected.numpy()), name
    embedding = torch.from_numpy(tensor_values(reference["token_embd.weight"]))
    assert np.array_equal(
        tensor_values(tensors["token_embd.weight"]), dequantize_groups(4, *round_to_nearest(4, embedding)).numpy()
    )
    assert tensors["output.weight"].tensor_type.name == "Q8_0"
    for name, tensor in reference.items():
        if len(tensor.shape) == 1:
            assert tensors[name].data.tobytes() == tensor.data.tobytes(), name
