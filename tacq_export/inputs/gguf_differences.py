"""What a GGUF says of its function that the torch model beside it does not do."""

from __future__ import annotations

import math
from typing import Any

import gguf
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import TacqError
from .gguf_config import ATTRIBUTES, attributes, config_from_gguf
from .gguf_header import Header

# Keys that other functions here read, or that do not decide the function.
_READ_ELSEWHERE = {
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.finetuned",
    "vocab_size",
    "attention.causal",
    "tensor_data_layout",
    "pooling_type",
    "attention.temperature_scale",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.shared_kv_layers",
    "embedding_length_per_layer_input",
    "rope.dimension_count_swa",
}


def window_lengths(reference: gguf.GGUFReader, config: PretrainedConfig) -> list[int]:
    """Lengths of text at which the model's function changes: sliding windows, and the reach of unscaled rope."""
    header, lengths = Header(reference), set()
    held = attributes(config.get_text_config())
    for name in ("sliding_window", "attention_chunk_size", "original_max_position_embeddings"):
        lengths.add(held.get(name))
    rope = held.get("rope_parameters") or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") == "longrope":
            lengths.add(parameters.get("original_max_position_embeddings"))
    lengths.add(header.get("attention.sliding_window"))
    return sorted(int(length) for length in lengths if isinstance(length, int) and length > 0)


def differences(reference: gguf.GGUFReader, model: PreTrainedModel) -> list[str]:
    """What the GGUF holds and the torch model does not use: phrases for a sentence, the likeliest causes first."""
    header, held = Header(reference), attributes(model.config.get_text_config())
    found = [_IN_THE_CODE[header.architecture]] if header.architecture in _IN_THE_CODE else []
    try:
        expected = attributes(config_from_gguf(reference))
    except TacqError:  # of an architecture that only a folder gives
        expected = {}
    for name in _COMPARED:
        if name not in held or not (name in expected or (name == "sliding_window" and expected)):
            continue
        ours, theirs = expected.get(name), held[name]
        if name == "rope_parameters":
            ours, theirs = _plain_rope(ours), _plain_rope(theirs)
        if ours != theirs and not (isinstance(ours, float) and math.isclose(ours, theirs or 0, rel_tol=1e-5)):
            found.append(f"{name} is {_short(theirs)} in torch and {_short(ours)} in the GGUF")
    known = {key for key, _ in ATTRIBUTES} | _READ_ELSEWHERE
    unknown = [
        key
        for key in reference.fields
        if key.startswith(header.architecture + ".") and key.removeprefix(header.architecture + ".") not in known
    ]
    if unknown:
        found.append(f"the GGUF has {_list(unknown)}, of which tacq-export knows no counterpart in torch")
    return found


# What no key and no tensor shows, by the GGUF's architecture.
_IN_THE_CODE = {
    "phimoe": "torch weighs the two experts by SparseMixer, each without its rivals, and llama.cpp by one softmax",
}
_COMPARED = (
    "rope_parameters",
    "sliding_window",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rms_norm_eps",
    "layer_norm_eps",
    "norm_topk_prob",
    "routed_scaling_factor",
    "num_experts_per_tok",
)


def _plain_rope(rope: dict | None) -> dict:
    """Only what both sides must share: factors of Llama 3 are a rule in one and a list in the other."""
    rope = rope or {}
    if "full_attention" in rope:
        rope = rope["full_attention"] or {}
    scaled = rope.get("rope_type", "default")
    plain = {"rope_theta": rope.get("rope_theta"), "scaled": scaled not in ("default", None)}
    return plain | ({"factor": rope.get("factor")} if scaled in ("linear", "yarn") else {})


def _short(value: Any) -> str:
    return str(value)[:80]


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
