"""The table of tiny architectures: one line for each, with what differs from SIZES.

Sizes are the smallest at which every part is there: each kind of layer once, more experts than are chosen, windows
shorter than the texts, multipliers that are not 1. A model that drops one of them shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import transformers
from tiny_hf import VOCAB
from transformers.configuration_utils import PreTrainedConfig

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# {tokenizer: (rows of the embedding, ids of control tokens)}
TOKENS = {
    "sentencepiece": (VOCAB, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "gpt2": (50304, {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}),
}
TOKENS |= {"sentencepiece-json": TOKENS["sentencepiece"], "gpt2-bos": TOKENS["gpt2"]}


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
        return getattr(transformers, name).config_class(**_options(tokenizer, overrides))

    return name, Architecture(make, tokenizer, hub or {}, modern)


def wrapper(name: str, tokenizer: str = "sentencepiece", vision: dict | None = None, modern: bool = False, **overrides):
    """A language model inside a multimodal one, which has a vision part unless `vision` is None."""

    def make() -> PreTrainedConfig:
        parts = {"text_config": _options(tokenizer, overrides)}
        return getattr(transformers, name).config_class(**parts | ({} if vision is None else {"vision_config": vision}))

    return name, Architecture(make, tokenizer, modern=modern)


def _options(tokenizer: str, overrides: dict) -> dict:
    vocab_size, ids = TOKENS[tokenizer]
    return SIZES | {"vocab_size": vocab_size} | ids | overrides


HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 16}
MHA = {"num_key_value_heads": 4}
FOUR = {"num_hidden_layers": 4}
FULL = {"layer_types": ["full_attention"] * 4}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0}
# llama.cpp has one base for all layers, and scales those without a window.
MELLUM = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
GPT_OSS = YARN | {"rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
MINISTRAL = {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0, 2.5]}
LONGROPE |= {"long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
GLM4V = MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
INTERLEAVED = MROPE | {"mrope_interleaved": True}

# Experts, under the names that their configs have for them.
# Qwen3's hub folders normalize the chosen experts' weights, and llama.cpp always does.
QWEN3_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 64}
DBRX = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}
DBRX |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
DBRX |= {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0}}
DBRX |= {"ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1}
ERNIE |= {"moe_layer_end_index": 1}
LLAMA4 = HEAD | FOUR | {"num_local_experts": 4, "intermediate_size_mlp": 128}

# Multi-head latent attention.
MLA = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 16, "v_head_dim": 32}
MLA |= MHA | {"num_hidden_layers": 3}
DEEPSEEK = MLA | ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1}
GROUPED = {"n_group": 2, "topk_group": 1}
INDEXER = {"index_topk": 16, "index_head_dim": 128, "index_n_heads": 4}

# State space, convolutions, linear attention.
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 32, "mamba_expand": 2}
LINEAR = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2}
LINEAR |= FOUR | {"linear_num_value_heads": 4, "head_dim": 32}
KIMI = MLA | FOUR | {"q_lora_rank": None, "linear_head_dim": 32, "linear_num_heads": 4, "num_experts": 8}
KIMI |= {"num_experts_per_token": 2, "moe_intermediate_size": 64}
KIMI |= {"layer_types": ["full_attention", "linear_attention"] * 2}
LFM2 = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_auto_adjust_ff_dim": False}
FALCON_H1 = HEAD | MAMBA2 | {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "embedding_multiplier": 3.0}
FALCON_H1 |= {"key_multiplier": 0.7, "mlp_multipliers": [0.8, 0.6], "attention_out_multiplier": 0.9}
FALCON_H1 |= {"ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9], "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.7}
NEMOTRON_H = HEAD | FOUR | {"ssm_state_size": 32, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2}
NEMOTRON_H |= {"layers_block_type": ["mamba", "mlp", "attention", "mamba"]}
JAMBA = FOUR | {"num_experts": 4, "attn_layer_period": 4, "attn_layer_offset": 2}

GRANITE = {"embedding_multiplier": 4.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
HYBRID = {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3}
GEMMA3 = HEAD | WINDOW | {"num_hidden_layers": 6, "query_pre_attn_scalar": 16}
# llama.cpp has its 20 layers with keys of their own, its 10 sparse ones and its widths as constants.
GEMMA3N = HEAD | WINDOW | {"num_hidden_layers": 20, "num_kv_shared_layers": 0, "intermediate_size": [2048] * 20}
GEMMA3N |= {"activation_sparsity_pattern": [0.95] * 10 + [0.0] * 10, "laurel_rank": 64}
GEMMA3N |= {"layer_types": [("full" if i % 5 == 4 else "sliding") + "_attention" for i in range(20)]}
PER_LAYER = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB}
GEMMA4 = HEAD | WINDOW | PER_LAYER | {"num_hidden_layers": 6, "global_head_dim": 32, "final_logit_softcapping": 30.0}

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
GPT = {"n_ctx": 256, "hidden_size": None, "intermediate_size": None}
PYTHIA = {"rotary_pct": 0.25, "rotary_emb_base": 10000, "rope_theta": None}


ARCHITECTURES: dict[str, Architecture] = dict(
    [
        # Llama and its relatives
        text("LlamaForCausalLM", **HEAD, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
        text("MistralForCausalLM", **HEAD, sliding_window=None),
        text("Ministral3ForCausalLM", **HEAD, rope_parameters=YARN | MINISTRAL, modern=True),
        text("ArceeForCausalLM", "gpt2", **HEAD),
        text("SmolLM3ForCausalLM", "gpt2", **FOUR),
        text("SeedOssForCausalLM", "gpt2", **HEAD, attention_out_bias=False),
        text("Ernie4_5ForCausalLM", **HEAD, use_bias=False),
        text("ApertusForCausalLM", "gpt2", rope_parameters=LLAMA3),
        text("BitNetForCausalLM", tie_word_embeddings=True),
        text("GraniteForCausalLM", "gpt2", **GRANITE),
        text("HunYuanDenseV1ForCausalLM", "gpt2", **HEAD),
        text("MiniCPM3ForCausalLM", **MLA | {"v_head_dim": 16}, scale_emb=12, scale_depth=1.4, dim_model_base=256),
        text("NemotronForCausalLM", **HEAD),
        text("StableLmForCausalLM", "gpt2", hub={"partial_rotary_factor": 0.25}, use_qkv_bias=True),
        text(
            "Exaone4ForCausalLM", "gpt2", **FOUR, **FULL, sliding_window=None
        ),  # llama.cpp has windows at 64 layers alone
        text("Jais2ForCausalLM", "gpt2", **HEAD, **MHA),
        # Qwen; transformers splits the words of its byte-level BPE its own way, so the dense one is given sentencepiece
        text("Qwen2ForCausalLM"),
        text("Qwen3ForCausalLM", "gpt2", **HEAD),
        text("Qwen2MoeForCausalLM", "gpt2", **EXPERTS, **SHARED),
        text("Qwen3MoeForCausalLM", "gpt2", **QWEN3_EXPERTS, **HEAD),
        text("Qwen3NextForCausalLM", "gpt2", **LINEAR, **EXPERTS, **SHARED),
        text("Qwen3_5ForCausalLM", "gpt2", **LINEAR, modern=True),
        text("Qwen3_5MoeForCausalLM", "gpt2", **LINEAR, **EXPERTS, **SHARED, modern=True),
        # Gemma
        text("GemmaForCausalLM", **HEAD, num_key_value_heads=1),
        text("Gemma2ForCausalLM", **HEAD, **WINDOW, query_pre_attn_scalar=16),
        text("Gemma3ForCausalLM", **GEMMA3),
        text("Gemma3nForCausalLM", **GEMMA3N, **PER_LAYER | {"hidden_size_per_layer_input": 256}),
        text("Gemma4ForCausalLM", "sentencepiece-json", **GEMMA4, modern=True),
        # Phi, GPT, Pythia, StarCoder and others of their time
        text("PhiForCausalLM", "gpt2", hub={"partial_rotary_factor": 0.5}, **MHA, intermediate_size=256),
        text(
            "Phi3ForCausalLM",
            rope_parameters=LONGROPE,
            original_max_position_embeddings=256,
            max_position_embeddings=1024,
        ),
        text("GPT2LMHeadModel", "gpt2", hub=GPT),
        text("GPTNeoXForCausalLM", "gpt2", hub=PYTHIA),
        text("GPTBigCodeForCausalLM", "gpt2", hub=GPT),
        text("Starcoder2ForCausalLM", "gpt2"),
        text("BloomForCausalLM", "gpt2", n_layer=2, n_head=4),
        text("FalconForCausalLM", "gpt2", new_decoder_architecture=True, num_kv_heads=2),
        text(
            "MptForCausalLM",
            "gpt2",
            hub={"architectures": ["MPTForCausalLM"]},
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=256,
        ),
        # Cohere, OLMo, GLM
        text("CohereForCausalLM", "gpt2", use_qk_norm=False, logit_scale=0.5),
        text("Cohere2ForCausalLM", "gpt2", hub={"rotary_pct": 1.0}, **HEAD, **WINDOW, **FOUR, logit_scale=0.5),
        text("OlmoForCausalLM", "gpt2", **MHA),
        text("Olmo2ForCausalLM", "gpt2", **MHA),
        text("Olmo3ForCausalLM", "gpt2", **MHA, **WINDOW, **FOUR),
        text("GlmForCausalLM", "gpt2", **HEAD),
        text("Glm4ForCausalLM", "gpt2", **HEAD),
        # Experts
        text("MixtralForCausalLM", num_local_experts=4),
        text(
            "PhimoeForCausalLM",
            hub={"architectures": ["PhiMoEForCausalLM"]},
            **LOCAL,
            attention_bias=True,
            lm_head_bias=True,
        ),
        text("GptOssForCausalLM", "gpt2", **LOCAL, **WINDOW, head_dim=64, rope_parameters=GPT_OSS),
        text("DbrxForCausalLM", "gpt2", **DBRX),
        text("OlmoeForCausalLM", "gpt2", **MHA, num_experts=8, num_experts_per_tok=2),
        text("GraniteMoeForCausalLM", "gpt2", **GRANITE, **LOCAL),
        text("GraniteMoeSharedForCausalLM", "gpt2", **GRANITE, **LOCAL, shared_intermediate_size=64),
        text("Ernie4_5_MoeForCausalLM", **ERNIE),
        text("Dots1ForCausalLM", "gpt2", **HEAD, **MHA, **ROUTED, n_shared_experts=1, first_k_dense_replace=1),
        text("AfmoeForCausalLM", "gpt2", **HEAD, **EXPERTS, **FOUR, **WINDOW, num_shared_experts=1, mup_enabled=True),
        text("ExaoneMoeForCausalLM", "gpt2", **EXPERTS, **FOUR, **WINDOW),
        text("MiniMaxM2ForCausalLM", "gpt2", hub={"rotary_dim": 8}, **HEAD, **LOCAL),
        text("Glm4MoeForCausalLM", "gpt2", **HEAD, **ROUTED, use_qk_norm=True, attention_bias=True),
        text("SolarOpenForCausalLM", "gpt2", **HEAD, **ROUTED),
        text(
            "MellumForCausalLM",
            "gpt2",
            modern=True,
            rope_parameters=MELLUM,
            **HEAD,
            **WINDOW,
            **FOUR,
            **LOCAL,
            moe_intermediate_size=64,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
        ),
        text(
            "LagunaForCausalLM",
            "gpt2",
            modern=True,
            **HEAD,
            **EXPERTS,
            **SHARED,
            **FOUR,
            **WINDOW,
            layer_types=["full_attention"] + ["sliding_attention"] * 3,
            num_attention_heads_per_layer=[4] * 4,
        ),
        text(
            "MiMoV2FlashForCausalLM",
            "gpt2",
            modern=True,
            **ROUTED,
            **FOUR,
            **WINDOW,
            head_dim=32,
            v_head_dim=16,
        ),
        text("HYV3ForCausalLM", "gpt2", modern=True, **HEAD, **EXPERTS, num_shared_experts=1),
        text(
            "Cohere2MoeForCausalLM",
            "gpt2",
            hub={"rotary_pct": 1.0},
            **HEAD,
            **FOUR,
            **WINDOW,
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
            logit_scale=0.5,
        ),
        text("Llama4ForCausalLM", "gpt2", **LLAMA4, interleave_moe_layer_step=2),
        # Multi-head latent attention
        text("DeepseekV2ForCausalLM", "gpt2", hub={"scoring_func": "softmax"}, **DEEPSEEK),
        text("DeepseekV3ForCausalLM", "gpt2", hub={"scoring_func": "sigmoid"}, **DEEPSEEK, **GROUPED),
        text("Glm4MoeLiteForCausalLM", "gpt2", **DEEPSEEK),
        text("YoutuForCausalLM", "gpt2", **MLA),
        text("DeepseekV32ForCausalLM", "gpt2-bos", **DEEPSEEK, **GROUPED, **INDEXER),
        text("GlmMoeDsaForCausalLM", "gpt2", **DEEPSEEK, **INDEXER, modern=True),
        # State space, convolutions, linear attention
        text("MambaForCausalLM", "gpt2", state_size=16, time_step_rank=4),
        text("FalconMambaForCausalLM", "gpt2", state_size=16, time_step_rank=4),
        text("Mamba2ForCausalLM", "gpt2", num_heads=4, head_dim=32, state_size=32, n_groups=2),
        text("JambaForCausalLM", **JAMBA),
        text("FalconH1ForCausalLM", "gpt2", **FALCON_H1),
        text(
            "BambaForCausalLM",
            "gpt2",
            hub={"attn_rotary_emb": 8},
            **MAMBA2,
            attn_layer_indices=[1],
            num_hidden_layers=3,
        ),
        text(
            "GraniteMoeHybridForCausalLM",
            "gpt2",
            **GRANITE,
            **MAMBA2,
            **HYBRID,
            **LOCAL,
            shared_intermediate_size=64,
        ),
        text("NemotronHForCausalLM", "gpt2", **NEMOTRON_H),
        text("Lfm2ForCausalLM", "gpt2", **LFM2),
        text("Lfm2MoeForCausalLM", "gpt2", **LFM2, **EXPERTS, num_dense_layers=1),
        text("KimiLinearForCausalLM", "gpt2", **KIMI, modern=True),
        # Multimodal wrappers
        wrapper("Gemma3ForConditionalGeneration", vision=VISION, **GEMMA3),
        wrapper("Gemma4ForConditionalGeneration", "sentencepiece-json", **GEMMA4, modern=True),
        wrapper("Mistral3ForConditionalGeneration", vision=VISION | HEAD, **HEAD, model_type="mistral"),
        wrapper("LlavaForConditionalGeneration", vision=VISION, **HEAD, model_type="llama"),
        wrapper(
            "Qwen2VLForConditionalGeneration",
            "gpt2",
            vision=QWEN_VISION | {"embed_dim": 32, "hidden_size": 64},
            rope_parameters=MROPE,
        ),
        wrapper("Qwen2_5_VLForConditionalGeneration", "gpt2", vision=QWEN_VISION, rope_parameters=MROPE),
        wrapper(
            "Qwen3VLForConditionalGeneration",
            "gpt2",
            vision=QWEN_VISION,
            modern=True,
            **HEAD,
            rope_parameters=INTERLEAVED,
        ),
        wrapper(
            "Qwen3VLMoeForConditionalGeneration",
            "gpt2",
            vision=QWEN_VISION,
            modern=True,
            **HEAD,
            **EXPERTS | {"moe_intermediate_size": 128},
            rope_parameters=INTERLEAVED,
        ),
        wrapper("Qwen3_5ForConditionalGeneration", "gpt2", vision=QWEN_VISION, **LINEAR, modern=True),
        wrapper("Llama4ForConditionalGeneration", "gpt2", vision=VISION, **LLAMA4),
        wrapper("SmolVLMForConditionalGeneration", "gpt2", vision=VISION, **HEAD, model_type="llama"),
        wrapper(
            "Glm4vForConditionalGeneration", "gpt2", vision=QWEN_VISION, modern=True, **HEAD, rope_parameters=GLM4V
        ),
        wrapper("Lfm2VlForConditionalGeneration", "gpt2", vision=VISION, **LFM2, model_type="lfm2"),
    ]
)
