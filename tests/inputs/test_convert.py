"""The converter sees config.json as it was written for it, whichever transformers wrote the folder."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_hf import write_bpe_tokenizer, write_model_folder
from transformers import (
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import field_value, open_gguf
from tacq_export.inputs import convert
from tacq_export.inputs.convert import convert_to_f16
from tacq_export.inputs.convert_launcher import (
    _permute_rotated_part,
    _transpose_packed_experts,
    _with_own_splitting,
    cut_padding,
    merged_config,
    with_older_names,
)
from tacq_export.inputs.make_reference import check_reference_loads
from tacq_export.reporting import Reporter
from tacq_export.runtime.llama_logits import LlamaLogits

VOCAB = 50257  # no multiple of 8 or 16, to which the converter rounds vocabularies of state-space models up
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": VOCAB - 1,
    "eos_token_id": VOCAB - 1,
}
LAYERS = ["mamba", "attention", "mamba", "attention"]
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MODELS = {
    "pythia": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "granite-4-h": lambda: GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **SIZES,
            **MAMBA,
            num_key_value_heads=2,
            layer_types=LAYERS,
            num_local_experts=0,
            shared_intermediate_size=128,
        )
    ),
    "nemotron-h": lambda: NemotronHForCausalLM(
        NemotronHConfig(
            **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"},
            num_key_value_heads=2,
            head_dim=16,
            layers_block_type=["mamba", "attention", "mlp", "mamba"],
            mamba_num_heads=8,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=2,
        )
    ),
    "qwen3-next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES,
            **LINEAR,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        )
    ),
}


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.dim() > 1
            ):  # rounded to F16: both sides have the very same numbers, and choose the same experts
                parameter.copy_(parameter.normal_(0, 0.08).half().float())
    return model


@pytest.mark.parametrize("name", MODELS)
def test_what_is_converted_is_the_model_that_torch_runs(runtime, tmp_path, name):
    """Written by transformers 5, with its names and values only."""
    model = tiny(name)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    write_bpe_tokenizer(folder)
    reference = tmp_path / "reference.gguf"
    convert_to_f16(folder, 1, None, reference, Reporter())
    check_reference_loads(reference)
    tokens = list(range(100, 4000, 97))
    with LlamaLogits(reference, len(tokens), threads=1) as llama:
        ours = torch.from_numpy(np.concatenate([chunk.copy() for _, chunk in llama.chunks(tokens)]))
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([tokens])).logits[0]
    log_p, log_q = torch.log_softmax(theirs, -1), torch.log_softmax(ours, -1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 1e-5


def test_older_names_are_added_and_nothing_that_is_there_is_changed():
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    got = with_older_names({"model_type": "gpt_neox", "rope_parameters": rope, "rotary_emb_base": 7})
    assert (got["rotary_pct"], got["rope_theta"], got["rotary_emb_base"]) == (0.25, 5000.0, 7)
    assert with_older_names({"model_type": "deepseek_v3"})["scoring_func"] == "sigmoid"
    assert with_older_names({"model_type": "deepseek_v3", "scoring_func": "softmax"})["scoring_func"] == "softmax"
    assert "scoring_func" not in with_older_names({"model_type": "deepseek_v2"})
    hybrid = with_older_names({"model_type": "nemotron_h", "layers_block_type": ["linear_attention", "mlp", "moe"]})
    assert (hybrid["hybrid_override_pattern"], hybrid["num_hidden_layers"]) == ("M-E", 3)
    falcon = {"model_type": "falcon", "multi_query": True, "num_kv_heads": 71}
    assert with_older_names(falcon)["num_kv_heads"] == 1
    assert with_older_names(falcon | {"new_decoder_architecture": True})["num_kv_heads"] == 71
    assert with_older_names({"model_type": "afmoe"})["route_norm"] is True
    assert with_older_names({"model_type": "afmoe", "route_norm": False})["route_norm"] is False
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    assert with_older_names({"model_type": "solar_open"} | plain)["partial_rotary_factor"] == 1.0
    assert with_older_names({"model_type": "glm4v_text", "rope_parameters": rope})["partial_rotary_factor"] == 0.25
    assert "partial_rotary_factor" not in with_older_names({"model_type": "glm4"} | plain)
    wrapped = with_older_names({"text_config": {"model_type": "gpt2", "n_positions": 99}})
    assert wrapped["text_config"]["n_ctx"] == 99


def test_mimo_has_its_sizes_and_windows_under_the_names_of_its_own_config():
    rope = {"full_attention": {"rope_theta": 5e6, "partial_rotary_factor": 0.25}, "sliding_attention": {}}
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "rope_parameters": rope, "swa_head_dim": 7}
    sizes = {"head_dim": 32, "v_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    got = with_older_names({"model_type": "mimo_v2_flash"} | kinds | sizes)
    assert (got["hybrid_layer_pattern"], got["topk_method"], got["swa_head_dim"]) == ([0, 1], "noaux_tc", 7)
    assert (got["swa_v_head_dim"], got["swa_num_attention_heads"], got["swa_num_key_value_heads"]) == (16, 4, 4)
    assert got["rope_parameters"] == rope | {"partial_rotary_factor": 0.25} and "partial_rotary_factor" not in rope


def test_rows_of_a_half_rotated_head_are_ordered_for_its_rotation():
    """llama.cpp turns rows 2i and 2i + 1 of a head together; torch turns i and i + half of what is rotated."""

    class Llama:
        @staticmethod
        def permute(weights, n_head, n_head_kv):
            n_head = n_head_kv or n_head
            return weights.reshape(n_head, 2, len(weights) // n_head // 2, -1).swapaxes(1, 2).reshape(weights.shape)

    _permute_rotated_part(Llama, 4)
    heads = torch.arange(16.0)[:, None]  # two heads of 8 rows
    assert Llama.permute(heads, 2, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]
    assert Llama.permute(heads[:8], 2, 1)[:, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]


def test_packed_experts_are_converted_from_either_layout():
    class Model:
        hparams = {"hidden_size": 6, "moe_intermediate_size": 4}

        def modify_tensors(self, data, name, block):
            return tuple(data.shape)

    _transpose_packed_experts(Model)
    for name, hub in (("gate_up_proj", (3, 6, 8)), ("down_proj", (3, 4, 6))):
        for shape in (hub, (hub[0], hub[2], hub[1])):
            assert Model().modify_tensors(torch.zeros(shape), f"model.layers.0.mlp.experts.{name}", 0) == hub
    assert Model().modify_tensors(torch.zeros(3, 8, 6), "model.layers.0.mlp.gate_up_proj", 0) == (3, 8, 6)


def test_configs_of_models_that_work_are_as_they_were():
    config = Gemma3TextConfig().to_dict() | {"rope_theta": 1.0}
    assert with_older_names(config) == config


def test_config_json_goes_over_the_defaults_but_null_replaces_nothing():
    defaults = {"a": 1, "head_dim": 16, "text_config": {"x": 1, "y": 2}, "window": None}
    raw = {"a": 3, "head_dim": None, "text_config": {"y": 5}, "rotary_pct": 0.5, "window": None}
    assert merged_config(defaults, raw) == {
        "a": 3, "head_dim": 16, "text_config": {"x": 1, "y": 5}, "window": None, "rotary_pct": 0.5,
    }  # fmt: skip


def test_only_padding_is_cut_off_a_vocabulary():
    assert cut_padding(["a", "b", "[PAD2]", b"[PAD3]"], 2) == ["a", "b"]
    assert cut_padding(["a", "b", "c", "[PAD3]"], 2) == ["a", "b", "c", "[PAD3]"]
    assert cut_padding(["a"], 5) == ["a"]


def failing(monkeypatch, log: str, folder: Path) -> str:
    done = subprocess.CompletedProcess([], 1, "", log)
    monkeypatch.setattr(convert.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(TacqError) as error:
        convert_to_f16(folder, 1, None, folder / "reference.gguf", Reporter())
    assert "\n" not in str(error.value) and not list(folder.glob(".*"))
    return str(error.value)


def test_the_converters_reasons(tmp_path, monkeypatch):
    message = failing(
        monkeypatch, "WARNING: x\nNotImplementedError: BPE pre-tokenizer was not recognized - up", tmp_path
    )
    assert "its tokenizer is none that llama.cpp recognizes, by the tokens of a test text" in message
    log = 'Traceback\n  File "a.py", line 3, in f\n    assert head_dim is not None\nAssertionError\n'
    assert "AssertionError of 'assert head_dim is not None'" in failing(monkeypatch, log, tmp_path)
    assert "(KeyError: 'n_ctx')" in failing(monkeypatch, "Traceback\nKeyError: 'n_ctx'\n", tmp_path)
    assert "(no output)" in failing(monkeypatch, "", tmp_path)


def test_the_tokenizer_is_the_folders_own_and_not_that_of_its_model_type(tmp_path):
    """transformers 5 splits digits one by one in any folder of a Qwen2."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(folder)
    write_bpe_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    assert len(AutoTokenizer.from_pretrained(folder).encode("33333")) == 5
    convert_to_f16(folder, 1, None, tmp_path / "reference.gguf", Reporter())
    reader = open_gguf(tmp_path / "reference.gguf")
    assert field_value(reader, "tokenizer.ggml.pre") == "gpt-2"
    auto = SimpleNamespace(from_pretrained=AutoTokenizer.from_pretrained)
    _with_own_splitting(auto)
    found = auto.from_pretrained(folder)
    assert len(found.encode("33333")) == 2 and found.add_bos_token, "BOS is wanted, and not among the tokens"


def test_a_tokenizer_that_llama_cpp_does_not_recognize(tmp_path):
    folder = tmp_path / "model"
    tiny("pythia").save_pretrained(folder)
    write_bpe_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:1000]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TacqError, match="its tokenizer is none that llama.cpp recognizes"):
        convert_to_f16(folder, 1, None, tmp_path / "reference.gguf", Reporter())


def test_a_reference_that_llama_cpp_does_not_run_is_refused_with_its_reason(runtime, tiny_gguf, tmp_path):
    from tacq_export.format.write_gguf import copied, write_gguf

    reader = open_gguf(tiny_gguf)
    without = [copied(t) for t in reader.tensors if t.name != "blk.1.ffn_up.weight"]
    write_gguf(tmp_path / "less.gguf", reader, without, {}, Reporter())
    with pytest.raises(TacqError) as error:
        check_reference_loads(tmp_path / "less.gguf")
    message = str(error.value)
    assert "Our llama.cpp cannot run the float copy of this model" in message and "blk.1.ffn_up.weight" in message
    heads = int(field_value(reader, "llama.attention.head_count"))
    write_gguf(
        tmp_path / "heads.gguf",
        reader,
        [copied(t) for t in reader.tensors],
        {"llama.attention.head_count": heads + 1},
        Reporter(),
    )
    with pytest.raises(TacqError, match="cannot run the float copy of this model"):
        check_reference_loads(tmp_path / "heads.gguf")


def test_a_folder_is_converted_as_before(tmp_path, load_tiny):
    folder = write_model_folder(tmp_path / "model", "llama")
    convert_to_f16(folder, 1, None, tmp_path / "reference.gguf", Reporter())
    assert (tmp_path / "reference.gguf").read_bytes() == load_tiny("llama").reference_path.read_bytes()
