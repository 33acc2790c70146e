"""A GGUF's keys and tensors as the config that transformers makes a model of, and what it has that torch does not use.

transformers reads some thirty keys of a GGUF and takes its own defaults for the rest: rope scaling, windows, scales and
experts are lost without a word. Here every key that decides the function has a line in `ATTRIBUTES`; what is not a
number to copy (rope, windows, biases, query scales) has a function. Meanings are those of the pinned llama.cpp's
`load_hparams` (src/llama-model.cpp, src/models/*.cpp) and of gguf-py's converter. `check_function` proves the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gguf
from transformers import CONFIG_MAPPING, PretrainedConfig

from ..errors import TacqError
from ..format.gguf_file import field_value, numpy_shape
from .gguf_header import Header
from .gguf_rope import rope_values

# {architecture of a GGUF: model_type of transformers}
MODEL_TYPES = {
    "apertus": "apertus",
    "arcee": "arcee",
    "bloom": "bloom",
    "chatglm": "glm",
    "command-r": "cohere",
    "cohere2": "cohere2",
    "dots1": "dots1",
    "ernie4_5": "ernie4_5",
    "exaone4": "exaone4",
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "glm4": "glm4",
    "glm4moe": "glm4_moe",
    "gpt-oss": "gpt_oss",
    "gpt2": "gpt2",
    "gptneox": "gpt_neox",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "hunyuan-dense": "hunyuan_v1_dense",
    "lfm2": "lfm2",
    "llama": "llama",
    "mamba": "mamba",
    "minicpm": "granite",  # the same function, of other constants
    "mistral3": "ministral3",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "phi2": "phi",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder": "gpt_bigcode",
    "starcoder2": "starcoder2",
}

# (key without the architecture, attributes of a transformers config that hold it: all that a config has are set)
ATTRIBUTES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("context_length", ("max_position_embeddings", "n_positions", "max_seq_len")),
    ("block_count", ("num_hidden_layers",)),
    ("embedding_length", ("hidden_size",)),
    ("feed_forward_length", ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")),
    ("attention.head_count", ("num_attention_heads",)),
    ("attention.head_count_kv", ("num_key_value_heads", "num_kv_heads")),
    ("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps", "layer_norm_epsilon")),
    ("attention.layer_norm_epsilon", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")),
    ("attention.clamp_kqv", ("clip_qkv",)),
    ("attn_logit_softcapping", ("attn_logit_softcapping",)),
    ("final_logit_softcapping", ("final_logit_softcapping",)),
    ("logit_scale", ("logits_scaling", "logit_scale")),
    ("attention.scale", ("attention_multiplier",)),
    ("embedding_scale", ("embedding_multiplier",)),
    ("residual_scale", ("residual_multiplier",)),
    ("use_parallel_residual", ("use_parallel_residual",)),
    ("expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("expert_used_count", ("num_experts_per_tok",)),
    ("expert_feed_forward_length", ("moe_intermediate_size",)),
    ("expert_shared_feed_forward_length", ("shared_expert_intermediate_size", "shared_intermediate_size")),
    ("expert_shared_count", ("n_shared_experts",)),
    ("expert_group_count", ("n_group",)),
    ("expert_group_used_count", ("topk_group",)),
    ("expert_weights_scale", ("routed_scaling_factor",)),
    ("expert_weights_norm", ("norm_topk_prob",)),
    ("leading_dense_block_count", ("first_k_dense_replace",)),
    ("shortconv.l_cache", ("conv_L_cache",)),
    ("ssm.conv_kernel", ("conv_kernel",)),
    ("ssm.state_size", ("state_size",)),
    ("ssm.time_step_rank", ("time_step_rank",)),
    ("ssm.inner_size", ("intermediate_size",)),
)
# {architecture: layers of a period, of which the last has no window}; llama.cpp uses no window in any other one.
_WINDOW_PERIODS = {"cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3": 6, "gemma4": 6, "gpt-oss": 2, "olmo2": 4}
# {architecture: layers of Google's 27B}: its queries are scaled as if the heads shared hidden_size.
_WIDE_QUERY_SCALE = {"gemma2": 46, "gemma3": 62}
_NO_ROPE_EVERY_4TH = ("smollm3",)


def model_type(header: Header) -> str:
    """model_type of transformers. Raises TacqError for an architecture that has none here."""
    if header.architecture == "llama" and header.get("expert_count"):
        return "mixtral"
    if header.architecture == "olmo2" and header.get("attention.sliding_window"):
        return "olmo3"
    if header.architecture == "granitemoe" and header.get("expert_shared_feed_forward_length"):
        return "granitemoeshared"
    kind = MODEL_TYPES.get(header.architecture)
    if kind is None or kind not in CONFIG_MAPPING:
        raise TacqError(
            f"transformers cannot load a GGUF of architecture '{header.architecture}', nor can tacq-export; give the "
            "model's Hugging Face folder instead."
        )
    return kind


def config_from_gguf(reference: gguf.GGUFReader) -> PretrainedConfig:
    """The config of the model that llama.cpp runs from this file.

    Raises TacqError for an architecture without a counterpart in transformers, or a key that differs from block to
    block where transformers has one value.
    """
    header = Header(reference)
    config_class = CONFIG_MAPPING[model_type(header)]
    default = config_class()
    known = attributes(default)
    values: dict[str, Any] = {
        "vocab_size": numpy_shape(header.tensors["token_embd.weight"])[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "pad_token_id": None,
    }
    for key, names in ATTRIBUTES:
        value = header.get(key)
        if value is None:
            continue
        for attribute in names:
            if attribute in known:
                if isinstance(value, list):
                    value = _one_for_all(header, key, value)
                values[attribute] = value
    if "head_dim" in known and header.get("attention.head_count"):
        values["head_dim"] = header.head_dim
    if "num_key_value_heads" not in values and "num_key_value_heads" in known:
        values["num_key_value_heads"] = header.get("attention.head_count")
    for rule in (_biases, _windows, _experts, _of_one_architecture):
        values |= {name: value for name, value in rule(header) if name in known}
    if header.architecture == "gemma4":
        values |= dict(_gemma4(header))
    if known.get("rope_parameters") is not None:
        values |= rope_values(header, known)
    renamed = default.attribute_map
    try:
        return config_class(**{renamed.get(name, name): value for name, value in values.items()})
    except Exception as error:  # its configs validate themselves, and raise errors of several libraries
        raise TacqError(
            f"transformers refuses the config of a GGUF of architecture '{header.architecture}' "
            f"({' '.join(str(error).split())[:200]}); give the model's Hugging Face folder instead."
        ) from error


def attributes(config: PretrainedConfig) -> dict[str, Any]:
    """What a config holds, under its own names and transformers' general ones.

    Not by getattr: a config whose blocks differ (Gemma 4) raises there for what is a value of each block.
    """
    own = vars(config)
    return own | {general: own[name] for general, name in config.attribute_map.items() if name in own}


def _one_for_all(header: Header, key: str, value: list) -> Any:
    if header.architecture == "gemma4" and key in ("feed_forward_length", "attention.head_count_kv"):
        return min(value)  # `_gemma4` has a place for both
    if header.architecture == "lfm2" and key == "attention.head_count_kv":
        return max(value)  # 0 marks a block without attention
    raise TacqError(
        f"The GGUF's key {header.architecture}.{key} differs from block to block ({str(value)[:60]}), which "
        "transformers has no place for; give the model's Hugging Face folder instead."
    )


def _biases(header: Header) -> Iterator[tuple[str, Any]]:
    attention = header.has("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_qkv.bias", "attn_output.bias")
    yield "attention_bias", attention
    yield "attention_out_bias", header.has("attn_output.bias")
    yield "use_qkv_bias", attention
    yield "mlp_bias", header.has("ffn_up.bias", "ffn_down.bias", "ffn_gate.bias")
    yield "use_bias", attention or header.has("ffn_up.bias", "ffn_down.bias")
    yield "bias", attention or header.has("ffn_up.bias", "ffn_down.bias")
    yield "qk_layernorm", header.has("attn_q_norm.weight")
    yield "use_qk_norm", header.has("attn_q_norm.weight")


def _windows(header: Header) -> Iterator[tuple[str, Any]]:
    window, period = header.get("attention.sliding_window"), _WINDOW_PERIODS.get(header.architecture)
    if not window or period is None or (header.architecture == "exaone4" and header.get("block_count") != 64):
        yield "sliding_window", None
        yield "layer_types", ["full_attention"] * header.get("block_count")
        return
    # The raw value: a list of equal values is a list here.
    pattern = field_value(header.reference, f"{header.architecture}.attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        pattern = [i % (pattern or period) < (pattern or period) - 1 for i in range(header.get("block_count"))]
    yield "sliding_window", int(window)
    yield "layer_types", ["sliding_attention" if sliding else "full_attention" for sliding in pattern]


def _experts(header: Header) -> Iterator[tuple[str, Any]]:
    if header.architecture == "qwen3moe":
        yield "norm_topk_prob", True  # src/models/qwen3moe.cpp has no key for it
    if header.architecture == "gpt-oss" and header.get("expert_feed_forward_length"):
        yield "intermediate_size", header.get("expert_feed_forward_length")
    if header.architecture in ("olmoe", "qwen2moe"):
        yield "norm_topk_prob", False


def _of_one_architecture(header: Header) -> Iterator[tuple[str, Any]]:
    """What a GGUF says with its architecture's name or its tensors."""
    if header.architecture in ("gemma2", "gemma3"):
        wide = header.get("block_count") == _WIDE_QUERY_SCALE[header.architecture]
        yield (
            "query_pre_attn_scalar",
            header.get("embedding_length") // header.get("attention.head_count") if wide else header.head_dim,
        )
    if header.architecture in ("gemma2", "gemma4"):  # src/llama-hparams.h has these where a file has none
        yield "final_logit_softcapping", header.get("final_logit_softcapping", 30.0)
        yield "attn_logit_softcapping", header.get("attn_logit_softcapping", 50.0)
    if header.architecture == "stablelm":
        yield "use_parallel_residual", not header.has("ffn_norm.weight")
    if header.architecture == "minicpm":
        blocks, width = header.get("block_count"), header.get("embedding_length")
        yield "attention_multiplier", header.head_dim**-0.5
        yield "embedding_multiplier", header.get("embedding_scale", 12.0)
        yield "residual_multiplier", header.get("residual_scale", 1.4 / math.sqrt(blocks))
        yield "logits_scaling", header.get("logit_scale", 256.0 / width)
    if header.architecture in ("granite", "granitemoe") and header.get("attention.scale") is None:
        yield "attention_multiplier", header.head_dim**-0.5
    if header.architecture in _NO_ROPE_EVERY_4TH:
        yield "no_rope_layers", [int((i + 1) % 4 != 0) for i in range(header.get("block_count"))]
    if header.architecture == "lfm2":
        heads = field_value(header.reference, "lfm2.attention.head_count_kv")
        yield "layer_types", ["full_attention" if n else "conv" for n in heads]
        yield "block_auto_adjust_ff_dim", False
    if header.architecture == "falcon":
        yield "num_kv_heads", header.get("attention.head_count_kv")
        yield "new_decoder_architecture", header.has("attn_norm_2.weight")
        yield "multi_query", header.get("attention.head_count_kv") == 1
        yield "alibi", False
        yield "parallel_attn", True


def _gemma4(header: Header) -> Iterator[tuple[str, Any]]:
    """Two kinds of blocks with heads of their own, keys shared among the last ones, and embeddings for each block."""
    # The raw value: a list of equal values is a list here.
    sliding = field_value(header.reference, "gemma4.attention.sliding_window_pattern")
    heads = field_value(header.reference, "gemma4.attention.head_count_kv")
    if isinstance(heads, list):
        yield "num_key_value_heads", next((n for n, window in zip(heads, sliding, strict=True) if window), heads[0])
        yield "num_global_key_value_heads", next(n for n, window in zip(heads, sliding, strict=True) if not window)
    yield "head_dim", header.get("attention.key_length_swa")
    yield "global_head_dim", header.get("attention.key_length")
    yield "num_kv_shared_layers", header.get("attention.shared_kv_layers", 0)
    yield "hidden_size_per_layer_input", header.get("embedding_length_per_layer_input", 0)
    yield "use_double_wide_mlp", isinstance(header.get("feed_forward_length"), list)
    full = [block for block, window in enumerate(sliding) if not window]
    yield "attention_k_eq_v", any(f"blk.{block}.attn_v.weight" not in header.tensors for block in full)
    if "per_layer_token_embd.weight" in header.tensors:
        yield "vocab_size_per_layer_input", numpy_shape(header.tensors["per_layer_token_embd.weight"])[0]
    if header.get("expert_count"):
        yield "enable_moe_block", True
        yield "num_experts", header.get("expert_count")
        yield "top_k_experts", header.get("expert_used_count")
        yield "moe_intermediate_size", header.get("expert_feed_forward_length")
