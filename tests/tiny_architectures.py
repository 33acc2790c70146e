"""Tiny random models of every architecture that transformers and llama.cpp's converter both know, as folders that look
like those of the Hugging Face hub.

    ARCHITECTURES["MixtralForCausalLM"]                    one line: the tokenizer, and what differs from SIZES
    write_architecture(folder, "MixtralForCausalLM")       config.json, weights, tokenizer; returns the torch model

Sizes are the smallest at which every part is there: each kind of layer once, more experts than are chosen, windows
shorter than the texts, multipliers that are not 1, biases that are not 0. A model that drops one of them shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import transformers
from tiny_hf import CHAT_TEMPLATE, VOCAB, write_tokenizer
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOW = {"sliding_window": 16}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
# {tokenizer: (rows of the embedding, ids of control tokens)}
GPT2_VOCAB = 50304
TOKENS = {
    "sentencepiece": (VOCAB, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "gpt2": (GPT2_VOCAB, {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}),
}
TOKENS["sentencepiece-json"] = TOKENS["sentencepiece"]
GPT2_ADDED = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|begin|>", "<|end|>"]
MLA = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 16, "v_head_dim": 32}
MLA |= {"num_key_value_heads": 4, "num_hidden_layers": 3}
DEEPSEEK = MLA | {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64}
DEEPSEEK |= {"first_k_dense_replace": 1}
INDEXER = {"index_topk": 16, "index_head_dim": 32, "index_n_heads": 4}
GROUPED = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
MINISTRAL = YARN | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0}
MINISTRAL |= {"beta_slow": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
GRANITE = {"embedding_multiplier": 4.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 32, "mamba_expand": 2}
LINEAR = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "head_dim": 32, "num_hidden_layers": 4}


@dataclass(frozen=True)
class Architecture:
    """make: function that makes the config.  tokenizer: a key of TOKENS.  hub: keys of config.json as the hub's folders
    have them, None for one that is to be left out.  modern: the hub's folders are of transformers 5 and have
    rope_parameters."""

    make: Callable[[], PreTrainedConfig]
    tokenizer: str = "sentencepiece"
    hub: dict = field(default_factory=dict)
    modern: bool = False


def text(name: str, tokenizer: str = "sentencepiece", hub: dict | None = None, modern: bool = False, **overrides):
    """A language model of its own: SIZES, the tokenizer's ids, and `overrides`."""

    def make() -> PreTrainedConfig:
        return getattr(transformers, name).config_class(**text_options(tokenizer, overrides))

    return name, Architecture(make, tokenizer, hub or {}, modern)


def text_options(tokenizer: str, overrides: dict) -> dict:
    vocab_size, ids = TOKENS[tokenizer]
    return SIZES | {"vocab_size": vocab_size} | ids | overrides


def wrapper(name: str, tokenizer: str = "sentencepiece", vision: dict | None = None, modern: bool = False, **overrides):
    """A language model inside a multimodal one; keys that begin with outer_ are those of the outer config."""
    outer = {key.removeprefix("outer_"): value for key, value in overrides.items() if key.startswith("outer_")}
    inner = {key: value for key, value in overrides.items() if not key.startswith("outer_")}

    def make() -> PreTrainedConfig:
        inside = text_options(tokenizer, inner)
        parts = {"text_config": inside} | ({"vision_config": VISION | vision} if vision is not None else {})
        return getattr(transformers, name).config_class(**parts, **outer)

    return name, Architecture(make, tokenizer, modern=modern)


ARCHITECTURES: dict[str, Architecture] = dict(
    [
        # Llama and its relatives
        text("LlamaForCausalLM", rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, head_dim=16),
        text("MistralForCausalLM", head_dim=16, sliding_window=None),
        text("Ministral3ForCausalLM", head_dim=16, rope_parameters=MINISTRAL, modern=True),
        text("ArceeForCausalLM", "gpt2", head_dim=16),
        text("SmolLM3ForCausalLM", "gpt2", num_hidden_layers=4),
        text("SeedOssForCausalLM", "gpt2", head_dim=16, attention_out_bias=False),
        text("Ernie4_5ForCausalLM", head_dim=16, use_bias=False),
        text("ApertusForCausalLM", "gpt2", rope_parameters=LLAMA3),
        text("BitNetForCausalLM", tie_word_embeddings=True),
        text("GraniteForCausalLM", "gpt2", **GRANITE),
        text("HunYuanDenseV1ForCausalLM", "gpt2", head_dim=16),
        text("MiniCPM3ForCausalLM", **MLA | {"v_head_dim": 16}, scale_emb=4, scale_depth=1.4, dim_model_base=32),
        text("NemotronForCausalLM", head_dim=16),
        text("StableLmForCausalLM", "gpt2", use_qkv_bias=True, hub={"partial_rotary_factor": 0.25}),
        text("Exaone4ForCausalLM", "gpt2", **WINDOW, num_hidden_layers=4),
        text("Jais2ForCausalLM", "gpt2", head_dim=16, num_key_value_heads=4),
        # Qwen
        text("Qwen2ForCausalLM"),  # transformers splits words of a byte-level BPE as it knows them of Qwen2
        text("Qwen3ForCausalLM", "gpt2", head_dim=16),
        text("Qwen2MoeForCausalLM", "gpt2", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64),
        text(
            "Qwen3MoeForCausalLM", "gpt2", head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64
        ),
        text(
            "Qwen3NextForCausalLM",
            "gpt2",
            **LINEAR,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        ),
        text("Qwen3_5ForCausalLM", "gpt2", **LINEAR, modern=True),
        text(
            "Qwen3_5MoeForCausalLM",
            "gpt2",
            **LINEAR,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
            modern=True,
        ),
        # Gemma
        text("GemmaForCausalLM", head_dim=16, num_key_value_heads=1),
        text("Gemma2ForCausalLM", head_dim=16, **WINDOW, query_pre_attn_scalar=16),
        text("Gemma3ForCausalLM", head_dim=16, **WINDOW, query_pre_attn_scalar=16, num_hidden_layers=6),
        text(
            "Gemma3nForCausalLM",
            head_dim=16,
            **WINDOW,
            num_hidden_layers=6,
            num_kv_shared_layers=2,
            intermediate_size=[128] * 6,
            activation_sparsity_pattern=[0.9] * 3 + [0.0] * 3,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=32,
            laurel_rank=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        ),
        text(
            "Gemma4ForCausalLM",
            "sentencepiece-json",
            head_dim=16,
            global_head_dim=32,
            **WINDOW,
            num_hidden_layers=6,
            hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=VOCAB,
            modern=True,
        ),
        # Phi, GPT, Pythia, StarCoder and others of their time
        text("PhiForCausalLM", "gpt2", num_key_value_heads=4, hub={"partial_rotary_factor": 0.5}),
        text(
            "Phi3ForCausalLM",
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0, 2.5],
                "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
            },
            original_max_position_embeddings=256,
            max_position_embeddings=1024,
        ),
        text("GPT2LMHeadModel", "gpt2", hub={"n_ctx": 256, "hidden_size": None, "intermediate_size": None}),
        text("GPTNeoXForCausalLM", "gpt2", hub={"rotary_pct": 0.25, "rotary_emb_base": 10000, "rope_theta": None}),
        text("GPTBigCodeForCausalLM", "gpt2"),
        text("Starcoder2ForCausalLM", "gpt2"),
        text("BloomForCausalLM", "gpt2", n_layer=2, n_head=4),
        text("FalconForCausalLM", "gpt2", new_decoder_architecture=True, num_kv_heads=2),
        text("MptForCausalLM", "gpt2", d_model=64, n_heads=4, n_layers=2, max_seq_len=256),
        # Cohere, OLMo, GLM
        text("CohereForCausalLM", "gpt2", use_qk_norm=False, logit_scale=0.5),
        text("Cohere2ForCausalLM", "gpt2", head_dim=16, **WINDOW, num_hidden_layers=4, logit_scale=0.5),
        text("OlmoForCausalLM", "gpt2", num_key_value_heads=4),
        text("Olmo2ForCausalLM", "gpt2", num_key_value_heads=4),
        text("Olmo3ForCausalLM", "gpt2", num_key_value_heads=4, **WINDOW, num_hidden_layers=4),
        text("OlmoeForCausalLM", "gpt2", num_key_value_heads=4, num_experts=8, num_experts_per_tok=2),
        text("GlmForCausalLM", "gpt2", head_dim=16),
        text("Glm4ForCausalLM", "gpt2", head_dim=16),
        text(
            "Glm4MoeForCausalLM",
            "gpt2",
            head_dim=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            use_qk_norm=True,
            attention_bias=True,
        ),
        # Experts
        text("MixtralForCausalLM", num_local_experts=4),
        text("PhimoeForCausalLM", num_local_experts=4, attention_bias=True, lm_head_bias=True),
        text("GptOssForCausalLM", "gpt2", head_dim=16, num_local_experts=4, num_experts_per_tok=2, **WINDOW),
        text(
            "DbrxForCausalLM",
            "gpt2",
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=256,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0},
            ffn_config={"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        text("GraniteMoeForCausalLM", "gpt2", **GRANITE, num_local_experts=4, num_experts_per_tok=2),
        text(
            "GraniteMoeSharedForCausalLM",
            "gpt2",
            **GRANITE,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=64,
        ),
        text(
            "Ernie4_5_MoeForCausalLM",
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=64,
            moe_num_shared_experts=1,
            moe_layer_end_index=1,
        ),
        text(
            "Dots1ForCausalLM",
            "gpt2",
            head_dim=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=64,
            first_k_dense_replace=1,
            norm_topk_prob=True,
        ),
        text(
            "AfmoeForCausalLM",
            "gpt2",
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            num_shared_experts=1,
            num_hidden_layers=4,
            route_scale=1.5,
            **WINDOW,
        ),
        text(
            "ExaoneMoeForCausalLM",
            "gpt2",
            **WINDOW,
            num_hidden_layers=4,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        ),
        text("MiniMaxM2ForCausalLM", "gpt2", head_dim=16, num_local_experts=4, num_experts_per_tok=2),
        text(
            "SolarOpenForCausalLM",
            "gpt2",
            head_dim=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        ),
        text(
            "MellumForCausalLM",
            "gpt2",
            head_dim=16,
            **WINDOW,
            num_hidden_layers=4,
            num_local_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            modern=True,
        ),
        text(
            "LagunaForCausalLM",
            "gpt2",
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
            num_attention_heads_per_layer=[4, 4],
            modern=True,
        ),
        text(
            "MiMoV2FlashForCausalLM",
            "gpt2",
            head_dim=32,
            v_head_dim=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            num_hidden_layers=4,
            **WINDOW,
        ),
        text(
            "HYV3ForCausalLM",
            "gpt2",
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
            moe_intermediate_size=64,
            modern=True,
        ),
        text(
            "Cohere2MoeForCausalLM",
            "gpt2",
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
            num_hidden_layers=4,
            logit_scale=0.5,
            **WINDOW,
        ),
        text(
            "Llama4ForCausalLM",
            "gpt2",
            head_dim=16,
            num_local_experts=4,
            intermediate_size_mlp=128,
            interleave_moe_layer_step=2,
            num_hidden_layers=4,
        ),
        # MLA
        text("DeepseekV2ForCausalLM", "gpt2", **DEEPSEEK, hub={"scoring_func": "softmax"}),
        text("DeepseekV3ForCausalLM", "gpt2", **DEEPSEEK | GROUPED, hub={"scoring_func": "sigmoid"}),
        text("Glm4MoeLiteForCausalLM", "gpt2", **DEEPSEEK),
        text("YoutuForCausalLM", "gpt2", **MLA),
        text("DeepseekV32ForCausalLM", "gpt2", **DEEPSEEK | GROUPED, **INDEXER),
        text(
            "GlmMoeDsaForCausalLM", "gpt2", **DEEPSEEK, index_topk=16, index_head_dim=32, index_n_heads=4, modern=True
        ),
        # State space, convolutions, linear attention
        text("MambaForCausalLM", "gpt2", state_size=16, time_step_rank=4, hub={"d_model": 64}),
        text("FalconMambaForCausalLM", "gpt2", state_size=16, time_step_rank=4),
        text("Mamba2ForCausalLM", "gpt2", num_heads=4, head_dim=32, state_size=32, n_groups=2),
        text("JambaForCausalLM", num_hidden_layers=4, num_experts=4, attn_layer_period=4, attn_layer_offset=2),
        text(
            "FalconH1ForCausalLM",
            "gpt2",
            head_dim=16,
            mamba_d_ssm=128,
            **MAMBA2,
            lm_head_multiplier=0.5,
            embedding_multiplier=3.0,
            key_multiplier=0.7,
            mlp_multipliers=[0.8, 0.6],
            attention_out_multiplier=0.9,
            ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9],
            ssm_in_multiplier=1.2,
            ssm_out_multiplier=0.7,
        ),
        text("BambaForCausalLM", "gpt2", **MAMBA2, attn_layer_indices=[1], num_hidden_layers=3),
        text(
            "GraniteMoeHybridForCausalLM",
            "gpt2",
            **GRANITE,
            **MAMBA2,
            num_local_experts=4,
            shared_intermediate_size=64,
            layer_types=["mamba", "attention", "mamba"],
            num_hidden_layers=3,
        ),
        text(
            "NemotronHForCausalLM",
            "gpt2",
            head_dim=16,
            ssm_state_size=32,
            mamba_num_heads=4,
            mamba_head_dim=32,
            n_groups=2,
            layers_block_type=["mamba", "mlp", "attention", "mamba"],
            num_hidden_layers=4,
        ),
        text(
            "Lfm2ForCausalLM",
            "gpt2",
            layer_types=["conv", "full_attention", "conv"],
            num_hidden_layers=3,
            block_auto_adjust_ff_dim=False,
        ),
        text(
            "Lfm2MoeForCausalLM",
            "gpt2",
            layer_types=["conv", "full_attention", "conv"],
            num_hidden_layers=3,
            num_dense_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        ),
        text(
            "KimiLinearForCausalLM",
            "gpt2",
            **MLA | {"num_hidden_layers": 4, "q_lora_rank": None},
            layer_types=["full_attention", "linear_attention"] * 2,
            linear_head_dim=32,
            linear_num_heads=4,
            num_experts=8,
            num_experts_per_token=2,
            moe_intermediate_size=64,
            modern=True,
        ),
        # Multimodal wrappers
        wrapper("Gemma3ForConditionalGeneration", vision={}, head_dim=16, **WINDOW, num_hidden_layers=6),
        wrapper(
            "Gemma4ForConditionalGeneration",
            "sentencepiece-json",
            head_dim=16,
            global_head_dim=32,
            **WINDOW,
            num_hidden_layers=6,
            hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=VOCAB,
            modern=True,
        ),
        wrapper("Mistral3ForConditionalGeneration", vision={"head_dim": 16}, head_dim=16, model_type="mistral"),
        wrapper("LlavaForConditionalGeneration", vision={}, head_dim=16, model_type="llama"),
        wrapper(
            "Qwen2VLForConditionalGeneration",
            "gpt2",
            vision=QWEN_VISION | {"embed_dim": 32, "hidden_size": 64},
            rope_parameters=MROPE,
        ),
        wrapper("Qwen2_5_VLForConditionalGeneration", "gpt2", vision=QWEN_VISION, rope_parameters=MROPE),
        wrapper("Qwen3VLForConditionalGeneration", "gpt2", vision=QWEN_VISION, head_dim=16, rope_parameters=MROPE),
        wrapper(
            "Qwen3VLMoeForConditionalGeneration",
            "gpt2",
            vision=QWEN_VISION,
            head_dim=16,
            rope_parameters=MROPE,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        ),
        wrapper("Qwen3_5ForConditionalGeneration", "gpt2", vision=QWEN_VISION, **LINEAR, modern=True),
        wrapper(
            "Llama4ForConditionalGeneration",
            "gpt2",
            vision={},
            head_dim=16,
            num_local_experts=4,
            intermediate_size_mlp=128,
            num_hidden_layers=4,
        ),
        wrapper("SmolVLMForConditionalGeneration", "gpt2", vision={}, head_dim=16, model_type="llama"),
        wrapper("Glm4vForConditionalGeneration", "gpt2", vision=QWEN_VISION, head_dim=16, rope_parameters=MROPE),
        wrapper(
            "Lfm2VlForConditionalGeneration",
            "gpt2",
            vision={},
            layer_types=["conv", "full_attention", "conv"],
            num_hidden_layers=3,
            block_auto_adjust_ff_dim=False,
            model_type="lfm2",
        ),
    ]
)


def tiny_architecture(name: str, seed: int = 0) -> PreTrainedModel:
    """The torch model, float32 with values that bfloat16 holds, as published checkpoints have them."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)(ARCHITECTURES[name].make()).eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            _sharpen(name, parameter)
    return model.to(torch.bfloat16).float()


def _sharpen(name: str, values: torch.Tensor) -> None:
    """Random values that make every part of a model count: attention that picks, experts that are clearly chosen,
    biases and norms that are not what they are initialised to."""
    if not values.is_floating_point() or "inv_freq" in name or "position" in name:
        return
    if values.dim() < 2 or "A_log" in name:
        values.add_(0.1 * torch.randn_like(values))
    elif "conv" in name:
        values.normal_(0, 0.3)
    elif "embed" in name or "lm_head" in name or "wte" in name:
        values.normal_(0, 0.3)
    elif "router" in name or name.endswith(("gate.weight", "gate.wg.weight")):
        values.normal_(0, 0.4)
    else:
        values.normal_(0, 0.12)


def write_architecture(folder: Path, name: str, seed: int = 0) -> PreTrainedModel:
    """Write the folder of a tiny model; returns the model, which has the very values of the folder."""
    architecture = ARCHITECTURES[name]
    model = tiny_architecture(name, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if not architecture.modern:
        for part in (config, *(value for key, value in config.items() if key.endswith("_config"))):
            _as_before_transformers_5(part)
    for key, value in architecture.hub.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    path.write_text(json.dumps(config, indent=1))
    if architecture.tokenizer == "gpt2":
        _write_gpt2_tokenizer(folder)
    else:
        write_tokenizer(folder)
    if architecture.tokenizer == "sentencepiece-json":
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return model.float()


def _as_before_transformers_5(config: dict) -> None:
    """rope_parameters as rope_theta, partial_rotary_factor and rope_scaling, dtype as torch_dtype: what most folders on
    the hub have."""
    if not isinstance(config, dict):
        return
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return
    config.pop("rope_parameters")
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in rope and (key != "original_max_position_embeddings" or rope["rope_type"] == "longrope"):
            config[key] = rope.pop(key)
    if "mrope_section" in rope:
        rope["rope_type"] = "mrope"
    if rope.get("rope_type") not in (None, "default"):
        rope["type"] = rope["rope_type"]
        config["rope_scaling"] = rope


@cache
def _gpt2_vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges) of GPT-2, from the vocabularies that llama.cpp's own tests use: the converter knows a byte-level
    BPE by what it makes of one text, and so needs the real one."""
    import gguf

    from tacq_export.runtime.source import source_tree

    reader = gguf.GGUFReader(source_tree(lambda _: None) / "models" / "ggml-vocab-gpt-2.gguf")
    return tuple(reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))


def _write_gpt2_tokenizer(folder: Path) -> None:
    tokens, merges = _gpt2_vocabulary()
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = ["<|endoftext|>", *GPT2_ADDED]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocabulary.get(token, len(tokens) + i - 1), "content": token} | special
            for i, token in enumerate(added)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
