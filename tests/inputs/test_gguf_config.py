"""A GGUF as a torch model: what transformers drops is put back, proven by llama.cpp's logits; the rest is refused by
name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from sharp_models import TEXT, both_sides, converted

from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import open_gguf
from tacq_export.format.write_gguf import PlannedTensor, copied, write_gguf
from tacq_export.inputs.check_function import measure
from tacq_export.inputs.gguf_config import MODEL_TYPES, config_from_gguf
from tacq_export.inputs.gguf_differences import window_lengths
from tacq_export.inputs.load_gguf import load_gguf_model
from tacq_export.reporting import Reporter

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + 0.1 * i for i in range(8)],
    "long_factor": [1 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 256,
}
GRANITE = {
    "attention_multiplier": 0.1,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True}
# (model_type, settings of the folder's config, what the config made of the GGUF must hold)
KINDS = {
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}, {}),
    "linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "yarn": ("llama", {"rope_parameters": YARN}, {}),
    "attention biases": ("llama", {"attention_bias": True}, {"attention_bias": True, "mlp_bias": False}),
    "mlp biases": ("llama", {"mlp_bias": True}, {"attention_bias": False, "mlp_bias": True}),
    "head_dim and eps": (
        "llama",
        {"head_dim": 32, "rms_norm_eps": 1e-2},
        {"head_dim": 32, "rms_norm_eps": pytest.approx(1e-2)},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}, {"head_dim": 32, "sliding_window": None}),
    "gemma2": (
        "gemma2",
        GEMMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
        {"query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 7},
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 64,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        },
    ),
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}, {}),
    "granite's scales": ("granite", GRANITE, {name: pytest.approx(value) for name, value in GRANITE.items()}),
    "no rope in every 4th": ("smollm3", {}, {"no_rope_layers": [1, 1, 1, 0]}),
    "partial rotation, norms with 1 added": (
        "nemotron",
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "experts": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, {"num_local_experts": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_model_of_a_gguf_is_the_one_that_llama_cpp_runs(runtime, tmp_path, kind):
    name, settings, expected = KINDS[kind]
    original, path = converted(tmp_path, name, **settings)
    model = load_gguf_model(path).eval()
    for attribute, value in expected.items():
        assert getattr(model.config, attribute) == value, attribute
    original_values = dict(original.named_parameters())
    for parameter, values in model.named_parameters():
        # Norms that are stored with 1 added come back to rounding.
        assert torch.allclose(values, original_values[parameter].half().float(), rtol=1e-3, atol=1e-6), parameter
    agreement = measure(both_sides(model, path), TEXT, threads=1)
    experts = name == "mixtral"  # a router may pick another expert where two are as likely
    assert (np.median if experts else np.mean)(agreement.kl) < 5e-5, "the function is another one"
    assert np.median(agreement.error) < 5e-3
    assert agreement.positions.max() >= 255, "beyond the windows and short factors of these models"


def write_header(path: Path, architecture: str, keys: dict, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {"block_count": 2, "context_length": 512, "embedding_length": 64, "feed_forward_length": 128}
    for key, value in (sizes | {"attention.head_count": 4, "attention.head_count_kv": 2} | keys).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    for name, values in ({"token_embd.weight": np.zeros((320, 64), np.float32)} | tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_of(tmp_path: Path, architecture: str, keys: dict | None = None, tensors: dict | None = None):
    return config_from_gguf(open_gguf(write_header(tmp_path / "header.gguf", architecture, keys or {}, tensors or {})))


def test_rope_factors_of_a_tensor_are_taken_as_they_are(tmp_path):
    factors = np.array([1, 1, 1.5, 2, 4, 8, 8, 8], np.float32)
    rope = config_of(tmp_path, "llama", tensors={"rope_freqs.weight": factors}).rope_parameters
    assert rope["rope_type"] == "longrope" and rope["attention_factor"] == 1.0
    assert rope["long_factor"] == rope["short_factor"] == factors.tolist()


def test_yarn_has_llama_cpps_attention_factor(tmp_path):
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64}
    rope = config_of(tmp_path, "llama", keys).rope_parameters
    assert rope["factor"] == 8.0 and rope["original_max_position_embeddings"] == 64
    assert rope["attention_factor"] == pytest.approx(1 + 0.1 * math.log(8))
    rope = config_of(tmp_path, "llama", keys | {"rope.scaling.yarn_log_multiplier": 1.0}).rope_parameters
    assert rope["attention_factor"] == pytest.approx(1.0)


def test_scaling_of_type_none_is_none_whatever_its_factor(tmp_path):
    rope = config_of(tmp_path, "llama", {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}).rope_parameters
    assert rope["rope_type"] == "default" and rope["rope_theta"] == 10000.0


@pytest.mark.parametrize(("architecture", "wide"), [("gemma2", 46), ("gemma3", 62)])
def test_googles_27b_has_another_query_scale(tmp_path, architecture, wide):
    keys = {"attention.key_length": 32, "attention.sliding_window": 64, "attention.layer_norm_rms_epsilon": 1e-6}
    assert config_of(tmp_path, architecture, keys).query_pre_attn_scalar == 32
    assert config_of(tmp_path, architecture, keys | {"block_count": wide}).query_pre_attn_scalar == 16


def test_a_softcap_that_the_file_does_not_name_is_llama_cpps(tmp_path):
    """src/llama-hparams.h: 30 for the logits, 50 for attention; Gemma 3 alone sets it to none."""
    keys = {"attention.key_length": 32, "attention.sliding_window": 64}
    config = config_of(tmp_path, "gemma2", keys)
    assert (config.final_logit_softcapping, config.attn_logit_softcapping) == (30.0, 50.0)
    assert config_of(tmp_path, "gemma2", keys | {"final_logit_softcapping": 20.0}).final_logit_softcapping == 20.0
    assert config_of(tmp_path, "gemma3", keys).final_logit_softcapping is None


def test_a_window_that_llama_cpp_does_not_apply_is_none(tmp_path):
    assert config_of(tmp_path, "phi3", {"attention.sliding_window": 64}).sliding_window is None
    config = config_of(tmp_path, "gpt-oss", {"attention.sliding_window": 64, "block_count": 3,
                                             "attention.key_length": 64})  # fmt: skip
    assert config.sliding_window == 64
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    reference = open_gguf(tmp_path / "header.gguf")
    assert window_lengths(reference, config) == [64]


def test_a_pattern_of_windows_in_the_file_is_taken(tmp_path):
    keys = {"attention.sliding_window": 64, "attention.sliding_window_pattern": [False, True]}
    config = config_of(tmp_path, "olmo2", keys)
    assert config.model_type == "olmo3" and config.layer_types == ["full_attention", "sliding_attention"]


def test_experts_make_a_mixtral_of_llama(tmp_path):
    config = config_of(tmp_path, "llama", {"expert_count": 8, "expert_used_count": 2})
    assert (config.model_type, config.num_local_experts, config.num_experts_per_tok) == ("mixtral", 8, 2)


def test_minicpm_is_granite_with_other_constants(tmp_path):
    config = config_of(tmp_path, "minicpm", {"embedding_scale": 12.0, "residual_scale": 0.3, "logit_scale": 9.0})
    assert config.model_type == "granite" and config.attention_multiplier == 0.25
    assert (config.embedding_multiplier, config.logits_scaling) == (12.0, 9.0)
    assert config.residual_multiplier == pytest.approx(0.3)


def test_every_architecture_of_the_table_is_known_to_both_sides(tmp_path):
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    for architecture, kind in MODEL_TYPES.items():
        assert architecture in gguf.MODEL_ARCH_NAMES.values(), architecture
        assert CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING, kind


def refused(path: Path) -> str:
    with pytest.raises(TacqError) as error:
        load_gguf_model(path)
    message = str(error.value)
    assert "\n" not in message and "Hugging Face folder" in message
    return message


def test_an_architecture_without_a_counterpart_is_refused(tmp_path):
    assert "'rwkv6'" in refused(write_header(tmp_path / "a.gguf", "rwkv6", {}, {}))


def test_a_key_that_differs_from_block_to_block_is_refused(tmp_path):
    message = refused(write_header(tmp_path / "a.gguf", "llama", {"feed_forward_length": [128, 256]}, {}))
    assert "llama.feed_forward_length" in message and "[128, 256]" in message


def rewritten(source: Path, path: Path, tensors: list[PlannedTensor] | None = None, keys: dict | None = None) -> Path:
    reader = open_gguf(source)
    write_gguf(path, reader, tensors or [copied(t) for t in reader.tensors], keys or {}, Reporter())
    return path


def test_a_missing_tensor_and_one_too_many_are_named(tiny_gguf, tmp_path):
    planned = [copied(tensor) for tensor in open_gguf(tiny_gguf).tensors]
    missing = [tensor for tensor in planned if tensor.name != "blk.1.ffn_up.weight"]
    assert "model.layers.1.mlp.up_proj.weight" in refused(rewritten(tiny_gguf, tmp_path / "a.gguf", missing))
    norm = next(tensor for tensor in planned if tensor.name == "blk.1.ffn_norm.weight")
    more = [*planned, replace(norm, name="blk.1.attn_q_norm.weight")]
    assert "blk.1.attn_q_norm.weight" in refused(rewritten(tiny_gguf, tmp_path / "b.gguf", more))


def test_a_shape_that_does_not_fit_is_named(tiny_gguf, tmp_path):
    path = rewritten(tiny_gguf, tmp_path / "a.gguf", keys={"llama.feed_forward_length": 256})
    assert "(128, 64) where torch has (256, 64)" in refused(path)


def test_a_bias_that_transformers_has_no_place_for_is_added(tiny_gguf, tmp_path):
    """Phi-2's head has a bias; a file of any architecture may have one."""
    planned = [copied(tensor) for tensor in open_gguf(tiny_gguf).tensors]
    bias = np.arange(320, dtype=np.float32)
    planned.append(PlannedTensor("output.bias", (320,), gguf.GGMLQuantizationType.F32, lambda: bias))
    model = load_gguf_model(rewritten(tiny_gguf, tmp_path / "a.gguf", planned))
    assert torch.equal(model.lm_head.bias, torch.arange(320.0))
