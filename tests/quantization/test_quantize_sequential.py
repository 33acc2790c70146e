"""The block-by-block walk against whole models: what matrices see, the target that makes up for it, and whether it
does."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_hf import ARCHITECTURES, TEXTS, own_copy

from tacq_export.calibration.calibrate import calibrate
from tacq_export.calibration.hessian import inverse_hessian_cholesky, shrink
from tacq_export.calibration.walk_blocks import blocks_of
from tacq_export.config import ExportConfig
from tacq_export.format.tensor_types import TYPES_BY_NAME
from tacq_export.inputs.link_tensors import LinkedTensor
from tacq_export.planning.select_weights import TensorSelection
from tacq_export.quantization.quantize_model import (
    finished_weights,
    from_gguf_rows,
    head_tensor,
    quantize_matrices,
    to_gguf_rows,
)
from tacq_export.quantization.quantize_sequential import QuantizedWalk, Seen, quantize_in_order
from tacq_export.quantization.trial_errors import TRIAL
from tacq_export.reporting import Reporter
from tacq_export.workdir import WorkDir


def inputs(model, module_name: str) -> np.ndarray:
    """float64 [tokens of all texts, columns]"""
    caught = []
    handle = model.get_submodule(module_name).register_forward_pre_hook(
        lambda m, args: caught.append(args[0][0].double().numpy())
    )
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.tensor([text]))
    handle.remove()
    return np.concatenate(caught)


def some_weights() -> torch.Tensor:
    return torch.rand(sum(map(len, TEXTS)), generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_matrix_sees(load_tiny, architecture):
    """In the second block, with the first one's matrices and the block's own first ones changed: H and C of the inputs
    of two whole models. float32 through two blocks: 1e-4 of the largest."""
    loaded, changed = own_copy(load_tiny, architecture), own_copy(load_tiny, architecture)
    blocks = blocks_of(loaded)
    assert [block for block, _ in blocks] == list(loaded.model.get_decoder().layers)
    assert [t.name for _, tensors in blocks for t in tensors] == [
        t.name for t in loaded.linear if "blk.0" in t.name
    ] + [t.name for t in loaded.linear if "blk.1" in t.name]
    generator = torch.Generator().manual_seed(3)
    walk = QuantizedWalk(loaded, [block for block, _ in blocks], TEXTS, bf16=False)
    new = {t.name: t.weight + 0.1 * t.weight.std() * torch.randn(t.shape, generator=generator) for t in loaded.linear}
    weights = some_weights()
    for _, tensors in blocks:
        order = [
            next(t for t in tensors if t.name.split(".")[2] == part)
            for part in ("attn_q", "attn_output", "ffn_up", "ffn_down")
        ]
        walk.enter([_siblings(tensors, t)[0] for t in order])
        for tensor in order:
            seen = walk.see(_siblings(tensors, tensor), weights)
            x, z = inputs(load_tiny(architecture).model, tensor.module_name), inputs(changed.model, tensor.module_name)
            h, c = np.einsum("t,ti,tj->ij", weights, z, z), np.einsum("t,ti,tj->ij", weights, x - z, z)
            np.testing.assert_allclose(seen.hessian.numpy(), h, atol=1e-4 * np.abs(h).max())
            assert list(seen.cross) == [t.name for t in _siblings(tensors, tensor)]
            for t in _siblings(tensors, tensor):
                np.testing.assert_allclose(
                    seen.cross[t.name].numpy(), t.weight.numpy() @ c, atol=1e-4 * np.abs(t.weight.numpy() @ h).max()
                )
            for t, twin in zip(loaded.linear, changed.linear, strict=False):
                if t in _siblings(tensors, tensor):
                    t.put(new[t.name])
                    twin.module.weight.data.copy_(new[t.name])
        walk.leave()
    assert np.abs(x - z).max() > 1e-3, "the two models differ"


def _siblings(tensors, tensor) -> list[LinkedTensor]:
    """Matrices with the same input as `tensor`."""
    for group in (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
        if tensor.name.split(".")[2] in group:
            return [t for t in tensors if t.name.split(".")[2] in group]
    return [tensor]


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_the_target_is_the_weighted_least_squares_solution(shrinkage):
    """V minimizes sum_t w_t |W x_t - V z_t|^2 + (V - W) D (V - W)^T, where D is diagonal, damping and shrinkage; with
    half the compensation the target lies half way."""
    rng = np.random.default_rng(4)
    x = rng.normal(0, 1, (50, 64))
    z, w, weight = x + rng.normal(0, 0.3, x.shape), rng.exponential(1, 50), rng.normal(0, 1, (7, 64))
    h, c = np.einsum("t,ti,tj->ij", w, z, z), np.einsum("t,ti,tj->ij", w, x - z, z)
    seen = Seen(shrink(torch.from_numpy(h).float(), 32, shrinkage), {"w": torch.from_numpy(weight @ c).float()})
    tensor, upper = (
        SimpleNamespace(name="w", weight=torch.from_numpy(weight).float()),
        inverse_hessian_cholesky(seen.hessian, 0.05),
    )
    found = seen.target(tensor, upper, 1.0).double().numpy()
    # Stationary: sum_t w_t (V z_t - W x_t) z_t^T + (V - W) D = 0
    diagonal = 2 * shrinkage * np.diag(h) + 0.05 * (1 + 2 * shrinkage) * np.diag(h).mean()  # 64 columns, 32 tokens
    pull = np.einsum("t,tr,tj->rj", w, z @ found.T - x @ weight.T, z) + diagonal * (found - weight)
    assert np.abs(pull).max() < 1e-4 * np.abs(weight @ h).max()
    np.testing.assert_allclose(
        seen.target(tensor, upper, 0.5).numpy(), (weight + found) / 2, atol=1e-6 * np.abs(weight).max()
    )
    np.testing.assert_array_equal(seen.target(tensor, upper, 0.0), tensor.weight)


def quantized_model(loaded, tmp_path, hessian_inputs: str, bits: int = 2, hessian: str = "plain"):
    """Work folder with all matrices of the blocks quantized."""
    calibration = calibrate(
        loaded,
        head_tensor(loaded),
        TEXTS,
        None,
        TRIAL,
        ExportConfig("m", "t", "o.gguf"),
        tmp_path / "calibration",
        Reporter(),
    )
    work = WorkDir(tmp_path / hessian_inputs)
    (work.path / "tensors").mkdir(parents=True, exist_ok=True)
    nothing = torch.empty(0, dtype=torch.int64)
    selection = {t.name: TensorSelection(TYPES_BY_NAME[f"TACQ{bits}"], nothing, 0) for t in loaded.linear}
    config = ExportConfig("m", "t", "o.gguf", hessian_inputs=hessian_inputs, hessian=hessian)
    quantize_matrices(loaded, calibration, TEXTS, selection, config, work, Reporter())
    return work


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_matrices_make_up_for_those_before_them(load_tiny, tmp_path, architecture):
    """The last matrix's outputs on the calibration texts are nearer to the float model's: by a third at the least
    here."""
    wrong = {}
    for hessian_inputs in ("float", "quantized"):
        loaded = own_copy(load_tiny, architecture)
        last = next(t for t in loaded.linear if t.name == "blk.1.ffn_down.weight")
        exact = inputs(loaded.model, last.module_name) @ last.weight.double().numpy().T
        work = quantized_model(loaded, tmp_path, hessian_inputs)
        if hessian_inputs == "float":  # leaves the modules alone
            for tensor in loaded.linear:
                tensor.put(finished_weights(tensor, work))
        got = inputs(loaded.model, last.module_name) @ last.weight.double().numpy().T
        wrong[hessian_inputs] = np.square(got - exact).sum() / np.square(exact).sum()
    assert 0 < wrong["quantized"] < 0.67 * wrong["float"]


def test_what_was_done_before_an_interruption_counts(load_tiny, tmp_path):
    """Five matrices are there already: the others become the very same bytes."""
    whole = quantized_model(own_copy(load_tiny, "llama"), tmp_path / "a", "quantized", hessian="gradient")
    begun = tmp_path / "b" / "quantized" / "tensors"
    begun.mkdir(parents=True)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up"):
        for ending in (".bin", ".json"):
            file = f"blk.0.{name}.weight{ending}"
            (begun / file).write_bytes((whole.path / "tensors" / file).read_bytes())
    again = quantized_model(own_copy(load_tiny, "llama"), tmp_path / "b", "quantized", hessian="gradient")
    files = sorted(p.name for p in (whole.path / "tensors").glob("*.bin"))
    assert len(files) == 14
    for file in files:
        assert (whole.path / "tensors" / file).read_bytes() == (again.path / "tensors" / file).read_bytes()


def test_rows_go_to_the_file_and_back(load_tiny):
    tensor = next(t for t in load_tiny("llama").linear if t.rows is not None)
    assert torch.equal(from_gguf_rows(to_gguf_rows(tensor.weight, tensor), tensor), tensor.weight)
    assert not torch.equal(to_gguf_rows(tensor.weight, tensor), tensor.weight)


def test_the_model_is_left_without_hooks_when_it_fails(load_tiny, tmp_path):
    loaded = own_copy(load_tiny, "qwen2")
    calibration = calibrate(
        loaded, head_tensor(loaded), TEXTS, None, TRIAL, ExportConfig("m", "t", "o.gguf"), tmp_path, Reporter()
    )

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_in_order(
            loaded,
            calibration,
            TEXTS,
            ExportConfig("m", "t", "o.gguf"),
            lambda t: True,
            fail,
            fail,
            lambda t: None,
            Reporter(),
        )
    for module in loaded.model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in module.__dict__


def test_a_matrix_outside_blocks_is_left_to_the_float_model_s_inputs(load_tiny, tmp_path):
    """It is not visited block by block, but is in the calibration, and so is quantized behind the blocks as the head
    is."""
    loaded = own_copy(load_tiny, "qwen2")
    outside = replace(loaded, linear=[*loaded.linear, head_tensor(loaded)], head=None)
    visited = []
    calibration = calibrate(
        loaded, head_tensor(loaded), TEXTS, None, TRIAL, ExportConfig("m", "t", "o.gguf"), tmp_path, Reporter()
    )
    quantize_in_order(
        outside,
        calibration,
        TEXTS,
        ExportConfig("m", "t", "o.gguf"),
        lambda t: True,
        lambda t, *_: visited.append(t.name),
        None,
        lambda t: None,
        Reporter(),
    )
    assert sorted(visited) == sorted(t.name for t in loaded.linear)
    assert blocks_of(outside)[1][1] == blocks_of(loaded)[1][1]
