"""The rope of a GGUF in transformers' terms: base, share of a head that is turned, scaling.

Meanings are those of the pinned llama.cpp (src/llama-model.cpp `load_hparams`, src/llama-context.cpp for YaRN).
"""

from __future__ import annotations

import math
from typing import Any

from .gguf_header import Header

_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def rope_values(header: Header, known: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (nested by layer type where the config's are), and the older names of a partial rotation.

    known: what a config of this kind holds.
    """
    theta = float(header.get("rope.freq_base", 10000.0))
    rope = {"rope_theta": theta} | rope_scaling(header)
    turned = int(header.get("rope.dimension_count") or header.head_dim)
    values: dict[str, Any] = {}
    if turned != header.head_dim:
        rope["partial_rotary_factor"] = turned / header.head_dim
        values |= {name: turned / header.head_dim for name in ("partial_rotary_factor", "rotary_pct") if name in known}
    if "full_attention" in known["rope_parameters"]:
        swa = {"rope_type": "default", "rope_theta": float(header.get("rope.freq_base_swa", 10000.0))}
        if header.architecture == "gemma4":
            # Pairs that do not turn have an endless factor (conversion/gemma.py): transformers' "proportional".
            factors = header.values("rope_freqs.weight")
            share = sum(factor < 1e29 for factor in factors) / len(factors)
            rope = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": share}
        return values | {"rope_parameters": {"full_attention": rope, "sliding_attention": swa}}
    if header.architecture == "phimoe" and rope["rope_type"] == "longrope":
        rope |= {"short_mscale": rope["attention_factor"], "long_mscale": rope["attention_factor"]}
    if header.architecture == "mistral3":
        rope["llama_4_scaling_beta"] = float(header.get("attention.temperature_scale", 0.0))
        rope.setdefault("original_max_position_embeddings", header.get("rope.scaling.original_context_length", 1))
    if "original_max_position_embeddings" in known and "original_max_position_embeddings" in rope:
        values["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return values | {"rope_parameters": rope}


def rope_scaling(header: Header) -> dict[str, Any]:
    """rope_type and its parameters in transformers' terms.

    Factors that stand in the file as a tensor (Llama 3, LongRoPE) are taken as they are: transformers' "longrope"
    divides the frequency of each pair by a factor of its own, whatever rule the factors were made by.
    """
    context = int(header.get("context_length", 0))
    original = int(header.get("rope.scaling.original_context_length", context))
    kind = header.get("rope.scaling.type", "linear")
    factor = float(header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0)
    if kind == "none":
        factor = 1.0
    attention = float(header.get("rope.scaling.attn_factor", 1.0))
    if "rope_factors_long.weight" in header.tensors or "rope_freqs.weight" in header.tensors:
        both = "rope_factors_long.weight" in header.tensors
        long, short = _ROPE_TENSORS[1:] if both else (_ROPE_TENSORS[0],) * 2
        return {
            "rope_type": "longrope",
            "long_factor": [factor * x for x in header.values(long)],
            "short_factor": [factor * x for x in header.values(short)],
            "attention_factor": attention,
            "original_max_position_embeddings": original,
        }
    if factor == 1.0:
        return {"rope_type": "default"}
    if kind == "yarn":
        spread, log_multiplier = math.log(factor), header.get("rope.scaling.yarn_log_multiplier", 0.0)
        scale = 1 + 0.1 * spread
        if log_multiplier:
            scale /= 1 + 0.1 * log_multiplier * spread
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": float(header.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(header.get("rope.scaling.yarn_beta_slow", 1.0)),
            "attention_factor": scale * attention,
        }
    return {"rope_type": "linear", "factor": factor}
