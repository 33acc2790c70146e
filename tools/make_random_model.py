#!/usr/bin/env python3
"""Write a folder like those of the Hugging Face hub: a published shape, with random weights and fewer blocks.

    make_random_model.py qwen3-30b-a3b FOLDER --blocks 4        128 experts a block, 8 of them for a token
    make_random_model.py llama-3-8b FOLDER --blocks 8

For measuring what time and memory an export takes, where the real model does not fit the disk or the machine. Weights
are normal, bfloat16, of variance 1 / inputs; norms are 1. One shard a block, so that no more than a block is in memory.
The tokenizer is GPT-2's, and the vocabulary has its size: embedding and head are smaller than the published ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tacq_export.console import guarded, wait_passively  # noqa: E402

wait_passively()  # before torch is imported

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_architectures import write_gpt2_tokenizer  # noqa: E402

from tacq_export.errors import TacqError  # noqa: E402

VOCABULARY = 50304  # GPT-2's and the special tokens, rounded up to a multiple of 64
COMMON = {
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 8192,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
SHAPES = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "num_hidden_layers": 48,
    },
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 500000.0,
        "num_hidden_layers": 32,
    },
}


def block_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """{name within a block: shape} of every tensor of a block, named as on the hub."""
    width, heads, kv, dim = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (heads * dim, width),
        "self_attn.k_proj.weight": (kv * dim, width),
        "self_attn.v_proj.weight": (kv * dim, width),
        "self_attn.o_proj.weight": (width, heads * dim),
    }
    parts, inner = ["mlp"], config["intermediate_size"]
    if "num_experts" in config:
        shapes |= {f"self_attn.{name}_norm.weight": (dim,) for name in "qk"}
        shapes["mlp.gate.weight"] = (config["num_experts"], width)
        parts, inner = [f"mlp.experts.{e}" for e in range(config["num_experts"])], config["moe_intermediate_size"]
    for part in parts:
        shapes[f"{part}.gate_proj.weight"] = shapes[f"{part}.up_proj.weight"] = (inner, width)
        shapes[f"{part}.down_proj.weight"] = (width, inner)
    return shapes


def random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """bfloat16: ones for a norm, else normal values of variance 1 / inputs."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(torch.bfloat16)


def write(name: str, folder: Path, blocks: int, seed: int) -> None:
    """Write the folder. Raises TacqError if there is one with content already."""
    if folder.exists() and any(folder.iterdir()):
        raise TacqError(f"{folder} is there already; give another folder, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    config = COMMON | SHAPES[name] | {"num_hidden_layers": blocks}
    generator = torch.Generator().manual_seed(seed)
    width = config["hidden_size"]
    ends = {"model.embed_tokens.weight": (VOCABULARY, width), "lm_head.weight": (VOCABULARY, width)}
    shards: list[dict[str, tuple[int, ...]]] = [ends | {"model.norm.weight": (width,)}]
    for block in range(blocks):
        shards.append({f"model.layers.{block}.{part}": shape for part, shape in block_shapes(config).items()})
    index, total = {}, 0
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {tensor: random_tensor(shape, generator) for tensor, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        print(f"{file}: {len(tensors)} tensors", file=sys.stderr)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_gpt2_tokenizer(folder, bos=False)
    print(f"{folder}: {total / 1e9:.2f} GB, {total // 2 / 1e6:.0f} M weights, {blocks} blocks of {name}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=4, help="(default 4)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    args = parser.parse_args(argv)
    return guarded(lambda: write(args.shape, args.folder, args.blocks, args.seed), "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
