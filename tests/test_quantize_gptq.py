"""GPTQ against Optimal Brain Quantization done naively: one column at a time, float64, explicit inverse Hessian."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tacq_export import quantize_model
from tacq_export.block_codec import CODECS
from tacq_export.config import ExportConfig
from tacq_export.errors import TacqError
from tacq_export.fit_groups import dequantize_groups, fit_scale_bytes, round_to_nearest
from tacq_export.pipeline import export
from tacq_export.quantize_gptq import inverse_hessian_cholesky, quantize_gptq
from tacq_export.write_gguf import open_gguf, tensor_values

ROWS, COLUMNS, DAMPING = 16, 192, 0.01  # more columns than are updated one by one (128), and not a multiple of them
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


def obq(bits: int, weights: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor | None, damping: float) -> dict[str, np.ndarray]:
    """Frantar & Alistarh (OBQ) with a fixed order of columns: round column i, then w_j -= e_i / Hinv_ii * Hinv_ij for all
    later j, then remove i from the inverse by one step of elimination. The grid of a group is the fit of the updated weights
    (fit_scale_bytes has its own tests), weighted by diag(H), kept weights left out."""
    codec = CODECS[bits]
    w = weights.double().numpy().copy()
    rows, columns = w.shape
    h = hessian.double().numpy().copy()
    h[np.diag_indices(columns)] += damping * np.diag(h).mean()
    inverse = np.linalg.inv(h)
    codes, scale_bytes = np.zeros((rows, columns), np.uint8), np.zeros((rows, columns // 32), np.uint8)
    base, reached = np.zeros((rows, columns)), np.zeros((rows, columns))
    for i in range(columns):
        if i % 32 == 0:
            importance = hessian.diagonal()[i : i + 32].float().repeat(rows, 1)
            if kept is not None:
                importance = importance * ~kept[:, i : i + 32]
            scale_bytes[:, i // 32] = fit_scale_bytes(bits, torch.from_numpy(w[:, i : i + 32]).float(), importance).numpy()
        for row in range(rows):
            byte = int(scale_bytes[row, i // 32])
            values = float(codec.scale_of_byte[byte]) * np.array(codec.levels[codec.codebook_of_byte[byte]], float)
            codes[row, i] = np.abs(w[row, i] - values).argmin()
            base[row, i] = values[codes[row, i]]
            reached[row, i] = w[row, i]
            if kept is None or not kept[row, i]:
                w[row, i + 1 :] -= (w[row, i] - base[row, i]) / inverse[i, i] * inverse[i, i + 1 :]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return {"codes": codes, "scale_bytes": scale_bytes, "base": base, "reached": reached}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("with_kept", [False, True])
def test_gptq_is_obq_column_by_column(bits, with_kept):
    """Codes and grids are the very same: float32 and float64 differ by some 1e-6 of a weight, and no weight of this seed
    lies so near to the border between two codes."""
    weights, hessian, kept = problem(bits)
    kept = kept if with_kept else None
    expected = obq(bits, weights, hessian, kept, DAMPING)
    result = quantize_gptq(bits, weights, hessian, kept, DAMPING)
    assert np.array_equal(result.scale_bytes.numpy(), expected["scale_bytes"])
    in_use = np.repeat(expected["scale_bytes"], 32, axis=1) != 0  # under the zero scale every code means 0
    assert in_use.mean() > 0.98
    assert np.array_equal(result.codes.numpy()[in_use], expected["codes"][in_use])
    if kept is None:
        assert result.kept_values is None
        return
    # Errors fed forward pile up over 192 columns; 2e-6 is 1e-4 of a weight.
    rebuilt = (dequantize_groups(bits, result.codes, result.scale_bytes) + result.kept_values).numpy()
    mask = kept.numpy()
    np.testing.assert_allclose(rebuilt[mask], expected["reached"][mask], atol=2e-6)
    assert (result.kept_values.numpy()[~mask] == 0).all()
    assert np.array_equal(rebuilt[~mask], expected["base"][~mask].astype(np.float32))
    assert (expected["scale_bytes"][3, 1] == 0) and (rebuilt[3, 32:64] == result.kept_values[3, 32:64].numpy()).all()


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
    result = quantize_gptq(bits, weights, torch.diag(diagonal), None, DAMPING)
    codes, scale_bytes = round_to_nearest(bits, weights, diagonal)
    assert torch.equal(result.codes, codes) and torch.equal(result.scale_bytes, scale_bytes)


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
    given, own = quantize_gptq(2, weights, hessian, None, DAMPING, upper=upper), quantize_gptq(2, weights, hessian, None, DAMPING)
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


@pytest.mark.parametrize("bad", ["negative", "nan"])
def test_a_hessian_that_is_not_positive_definite_is_refused_by_name(bad):
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 5.0 if bad == "negative" else float("nan")
    with pytest.raises(TacqError, match=r"tensor 'blk.3.ffn_down.weight': the Hessian is not positive definite; use more or longer examples, or a damping above 0.01$"):
        quantize_gptq(2, torch.randn(4, 64), hessian, None, 0.01, "blk.3.ffn_down.weight")


def test_the_same_input_gives_the_same_bytes():
    weights, hessian, kept = problem(66)
    first, second = (quantize_gptq(2, weights, hessian, kept, DAMPING) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.kept_values, second.kept_values)


def test_an_exported_file_holds_what_gptq_gave_in_the_rows_of_the_gguf(tiny_gguf, tiny_task, tmp_path, monkeypatch):
    """Codes, scales and kept differences of every matrix, through packing, permuting (Llama's q and k) and writing."""
    results = {}

    def watched(bits, weights, hessian, kept, damping, name, upper):
        results[name] = quantize_gptq(bits, weights, hessian, kept, damping, name, upper)
        return results[name]

    monkeypatch.setattr(quantize_model, "quantize_gptq", watched)
    outfile = tmp_path / "out.gguf"
    export(ExportConfig(model=str(tiny_gguf), task=tiny_task, outfile=outfile, ratio=0.02, n_samples=3, seq_len=32, device="cpu", output_tensor_type="q8_0", refine_sweeps=0))
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
    assert np.array_equal(tensor_values(tensors["token_embd.weight"]), dequantize_groups(4, *round_to_nearest(4, embedding)).numpy())
    assert tensors["output.weight"].tensor_type.name == "Q8_0"
    for name, tensor in reference.items():
        if len(tensor.shape) == 1:
            assert tensors[name].data.tobytes() == tensor.data.tobytes(), name
