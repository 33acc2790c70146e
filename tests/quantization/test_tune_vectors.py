"""Tuning of norms and biases: which they are, its loss and gradients against whole models, and what comes of it in a
file."""

from __future__ import annotations

import copy
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from tiny_hf import ARCHITECTURES, TEXTS, Listener, own_copy

import tacq_export.quantization.tune_vectors
from tacq_export.config import ExportConfig
from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import open_gguf, raw_bytes, tensor_values
from tacq_export.inputs.load_task import load_task
from tacq_export.inputs.tokenize_task import tokenize_for_loss
from tacq_export.pipeline import export
from tacq_export.quantization.quantize_model import head_tensor
from tacq_export.quantization.tune_vectors import LinkedVector, VectorTuner, link_vectors, plan_tuning, save_head_inputs
from tacq_export.reporting import Reporter

F32 = gguf.GGMLQuantizationType.F32


def states_of(loaded, tmp_path) -> list[torch.Tensor]:
    save_head_inputs(loaded, TEXTS, ExportConfig("model", tmp_path, tmp_path), tmp_path, Reporter())
    return tacq_export.quantization.tune_vectors.load_file(
        tmp_path / tacq_export.quantization.tune_vectors.HEAD_INPUTS
    )["head_inputs"].split([len(t) for t in TEXTS])


def disturbed(load_tiny, architecture: str, tmp_path):
    """(model with other matrices, the float model's head inputs and head)"""
    loaded = own_copy(load_tiny, architecture)
    states, head = states_of(loaded, tmp_path), head_tensor(loaded).weight.clone()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.dim() == 2:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return loaded, states, head


def whole_loss(float_model, other_model, text: list[int], begin: int) -> torch.Tensor:
    """The same from two models' logits, float64."""
    with torch.no_grad():
        aim = float_model(input_ids=torch.tensor([text])).logits[0, begin - 1 : -1].double().log_softmax(-1)
    own = other_model(input_ids=torch.tensor([text])).logits[0, begin - 1 : -1].double().log_softmax(-1)
    return (aim.exp() * (aim - own)).sum()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_vectors_of_a_file_are_linked(load_tiny, architecture):
    loaded = load_tiny(architecture)
    vectors = link_vectors(loaded)
    assert [v.name for v in vectors] == [t.name for t in loaded.reference.tensors if len(t.shape) == 1]
    assert (
        len({id(v.parameter) for v in vectors}) == len(vectors) == {"llama": 5, "qwen2": 11, "gemma3": 13}[architecture]
    )
    for vector in vectors:
        assert np.abs(vector.values(vector.parameter.detach() - 0.25) - vector.stored - 0.25).max() < 1e-6


def test_a_vector_in_another_order_is_not_linked(load_tiny):
    loaded = own_copy(load_tiny, "llama")
    norm = loaded.model.get_decoder().layers[0].input_layernorm.weight
    norm.data = torch.linspace(0.5, 1.5, len(norm))
    assert "blk.0.attn_norm.weight" not in [v.name for v in link_vectors(loaded)] and len(link_vectors(loaded)) == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", [256, 2])
def test_loss_and_gradients_are_those_of_whole_models(load_tiny, architecture, positions, tmp_path, monkeypatch):
    """States are float16: 1e-3 of the loss, 1 % of the largest gradient."""
    monkeypatch.setattr(tacq_export.quantization.tune_vectors, "POSITIONS", positions)
    loaded, states, head = disturbed(load_tiny, architecture, tmp_path)
    begins = [3, 1, 1]
    tuner = VectorTuner(loaded, head, states, TEXTS, begins, bf16=False)
    assert tuner.n_predictions(range(3)) == sum(len(t) - b for t, b in zip(TEXTS, begins, strict=False))
    vectors = link_vectors(loaded) or pytest.fail("none")
    own = copy.deepcopy(loaded.model)
    expected = [
        float(whole_loss(load_tiny(architecture).model, own, text, begin).detach())
        for text, begin in zip(TEXTS, begins, strict=False)
    ]
    assert [tuner.loss(i) for i in range(3)] == pytest.approx(expected, rel=1e-3) and min(expected) > 1e-3
    names = {id(p): name for name, p in loaded.model.named_parameters()}
    for vector in vectors:
        vector.parameter.requires_grad_(True)
        own.get_parameter(names[id(vector.parameter)]).requires_grad_(True)
    tuner.loss(0, share=0.5)
    (0.5 * whole_loss(load_tiny(architecture).model, own, TEXTS[0], begins[0])).backward()
    for vector in vectors:
        gradient = own.get_parameter(names[id(vector.parameter)]).grad
        assert float((vector.parameter.grad - gradient).abs().max()) <= 0.01 * float(gradient.abs().max()) + 1e-7, (
            vector.name
        )


def test_an_epoch_lowers_the_loss_and_changes_vectors_alone(load_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tacq_export.quantization.tune_vectors, "BATCH", 1)
    loaded, states, head = disturbed(load_tiny, "qwen2", tmp_path)
    tuner, vectors = VectorTuner(loaded, head, states, TEXTS, None, bf16=False), link_vectors(loaded)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    loss = tuner.mean_loss(range(3))
    losses = [x for _ in range(4) for x in tuner.run(vectors, [0, 1, 2], seed=0)]
    assert len(losses) == 12 and tuner.mean_loss(range(3)) < 0.99 * loss
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.dim() == 2 or not before[name].any()), (
            "a vector of zeros has no size to take a step of"
        )
        assert not parameter.requires_grad and parameter.grad is None


@pytest.fixture
def config(tiny_gguf, tiny_task, tmp_path):
    return lambda name, **options: ExportConfig(
        str(tiny_gguf), tiny_task, tmp_path / name, n_samples=4, seq_len=32, device="cpu", refine_sweeps=0, **options
    )


def test_a_tuned_export(config, tmp_path, monkeypatch):
    """Of the same size, with the same matrices and other norms; an interrupted one goes on to the same bytes."""
    said = Listener()
    plain, tuned = export(config("plain.gguf"), Reporter()), export(config("tuned.gguf", tune=True), said)
    assert tuned.file_bytes == plain.file_bytes
    assert any("Tuning of 5 norms and biases: KL of 1 examples that were left out" in line for line in said.lines)
    before, after = ({t.name: t for t in open_gguf(r.outfile).tensors} for r in (plain, tuned))
    assert list(before) == list(after)
    changed = [name for name in before if not np.array_equal(raw_bytes(before[name]), raw_bytes(after[name]))]
    assert changed == [name for name, t in before.items() if len(t.shape) == 1] and all(
        after[name].tensor_type == F32 for name in changed
    )
    assert max(np.abs(tensor_values(after[n]) - tensor_values(before[n])).max() for n in changed) < 0.05, (
        "a step of half a percent"
    )
    with monkeypatch.context() as patch:
        patch.setattr(VectorTuner, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(config("again.gguf", tune=True), Reporter())
    export(config("again.gguf", tune=True, resume=True), Reporter())
    assert (tmp_path / "again.gguf").read_bytes() == tuned.outfile.read_bytes()


def test_a_tuning_that_does_not_help_is_not_written(config, monkeypatch):
    losses = iter([0.5, 0.5])
    monkeypatch.setattr(VectorTuner, "mean_loss", lambda *_: next(losses))
    said = Listener()
    plain, tuned = export(config("plain.gguf"), Reporter()), export(config("tuned.gguf", tune=True), said)
    assert any("0.5000 -> 0.5000, which does not help: they are written as they were." in line for line in said.lines)
    assert plain.outfile.read_bytes() == tuned.outfile.read_bytes()


@pytest.mark.parametrize(
    "n_samples, there",
    [(7, "there is one behind the first 7 of the task 'sums'"), (8, "there are none behind the first 8")],
)
def test_it_needs_examples_that_were_not_calibrated_on(config, n_samples, there):
    with pytest.raises(
        TacqError,
        match=f"--tune needs at least two examples that the calibration has not seen, and {there}.*smaller --n-samples",
    ):
        export(replace(config("x.gguf", tune=True), n_samples=n_samples, dry_run=True), Reporter())


@pytest.mark.parametrize("loss", ["text", "answer"])
def test_it_is_on_the_examples_behind_the_first(load_tiny, config, loss):
    """At most as many as the first; where answers count, each with its own beginning."""
    loaded, wanted = load_tiny("llama"), replace(config("x.gguf", tune=True), n_samples=3, loss=loss)
    task = load_task(wanted.task)
    texts, begins = tokenize_for_loss(loss, task, loaded.tokenizer, 8, 32)
    tuning = plan_tuning(loaded, task, 3, wanted)
    assert (
        tuning.texts == texts[3:6]
        and tuning.begins == (begins and begins[3:6])
        and (tuning.begins is None) == (loss == "text")
    )


def test_a_vector_keeps_what_torch_does_not_have():
    vector = LinkedVector("norm", torch.nn.Parameter(torch.tensor([0.5, -0.25])), np.array([1.5, 0.75], np.float32))
    assert vector.values(torch.tensor([0.25, -0.25])).tolist() == [1.75, 0.75]
