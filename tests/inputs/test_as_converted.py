"""Weights as the converter writes them: Falcon-H1's multipliers in the weights, the padding token's row."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_architectures import tiny_architecture, write_architecture
from tiny_hf import Listener
from transformers import FalconH1ForCausalLM

from tacq_export import ExportConfig, export
from tacq_export.format.gguf_file import open_gguf, tensor_values
from tacq_export.format.inspect_gguf import inspect_gguf
from tacq_export.inputs.as_converted import fold_multipliers, restore_padding_row
from tacq_export.inputs.load_torch import load_from_hugging_face
from tacq_export.inputs.make_reference import make_reference
from tacq_export.reporting import Reporter

TOKENS = torch.arange(3, 40)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_a_folded_falcon_h1_is_the_same_function(tied, biases):
    config = tiny_architecture("FalconH1ForCausalLM").config
    settings = {"tie_word_embeddings": tied, "attention_bias": biases, "projectors_bias": biases, "mlp_bias": biases}
    torch.manual_seed(0)
    made = config.to_dict() | settings | {"attention_in_multiplier": 1.25, "vocab_size": 320, "pad_token_id": None}
    model = FalconH1ForCausalLM(type(config)(**made)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2) if "A_log" not in name else parameter.add_(0.1)
        before, values = logits(model), {name: p.clone() for name, p in model.named_parameters()}
        fold_multipliers(model)
        assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
        for name in ("layers.0.mamba.in_proj.weight", "layers.0.self_attn.k_proj.weight", "embed_tokens.weight"):
            assert not torch.equal(model.get_parameter(f"model.{name}"), values[f"model.{name}"]), name
        once = logits(model)
        fold_multipliers(model)
        assert torch.equal(logits(model), once), "a constant counts twice"


def test_other_models_are_not_folded(load_tiny):
    model = load_tiny("llama").model
    before = logits(model)
    fold_multipliers(model)
    assert torch.equal(logits(model), before)


def test_falcon_h1_is_exported_with_all_its_matrices(runtime, tmp_path, tiny_task):
    write_architecture(tmp_path / "model", "FalconH1ForCausalLM")
    listener = Listener()
    outfile = tmp_path / "out.gguf"
    export(ExportConfig(str(tmp_path / "model"), tiny_task, outfile, base_type="tacq4", no_kept=True), listener)
    kinds = {t.name: t.type for t in inspect_gguf(outfile).tensors}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ssm_in", "ssm_out", "ffn_gate", "ffn_up", "ffn_down")
    assert all(kinds[f"blk.{i}.{part}.weight"] == "TACQ4" for i in (0, 1) for part in parts)
    assert kinds["output.weight"] == kinds["token_embd.weight"] == "TACQ4"
    assert any(line.startswith("torch and llama.cpp agree") for line in listener.lines)


@pytest.fixture
def youtu(tmp_path):
    """A class of transformers that zeroes the padding row after it has loaded it, and its float GGUF."""
    write_architecture(tmp_path / "model", "YoutuForCausalLM")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"] == 50256
    make_reference(str(tmp_path / "model"), tmp_path / "float.gguf", Reporter())
    return load_from_hugging_face(tmp_path / "model", Reporter()), open_gguf(tmp_path / "float.gguf")


def test_the_row_of_the_padding_token_is_the_checkpoints(youtu):
    model, reference = youtu
    embedding = model.get_input_embeddings()
    stored = next(tensor_values(t) for t in reference.tensors if t.name == "token_embd.weight")
    before = embedding.weight.detach().clone()
    assert not before[50256].any() and stored[50256].any()
    restore_padding_row(model, reference)
    assert torch.equal(embedding.weight.half(), torch.from_numpy(stored.copy()).half())
    others = torch.arange(len(before)) != 50256
    assert torch.equal(embedding.weight[others], before[others]), "the other rows keep all their bits"
    with torch.no_grad():
        embedding.weight[50256] = 1.0
    restore_padding_row(model, reference)
    assert bool((embedding.weight[50256] == 1).all()), "a row that is there is left alone"
