"""Tiny random models of every architecture that transformers and llama.cpp's converter both know, as folders that look
like those of the Hugging Face hub. architecture_table.py lists them.

    write_architecture(folder, "MixtralForCausalLM")       config.json, weights, tokenizer; returns the torch model
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
import transformers
from architecture_table import ARCHITECTURES
from tiny_hf import CHAT_TEMPLATE, write_tokenizer
from transformers import PreTrainedModel

GPT2_ADDED = [
    "[gMASK]",
    "<sop>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|startoftext|>",
    "<|begin|>",
    "<|end|>",
]
GPT2_ADDED += ["<unk>"]


def tiny_architecture(name: str, seed: int = 0) -> PreTrainedModel:
    """The torch model, in bfloat16 as published checkpoints are."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)(ARCHITECTURES[name].make()).eval()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            _sharpen(name, parameter)
    return model.to(torch.bfloat16)


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
        values.normal_(0, 0.2)
    else:
        values.normal_(0, 0.12)


def write_architecture(folder: Path, name: str, seed: int = 0) -> PreTrainedModel:
    """Write the folder of a tiny model; returns the model in float32, with the config and the values of the folder."""
    architecture = ARCHITECTURES[name]
    model = tiny_architecture(name, seed)
    model.save_pretrained(folder)
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
    if architecture.tokenizer.startswith("gpt2"):
        write_gpt2_tokenizer(folder, architecture.tokenizer == "gpt2-bos")
    else:
        write_tokenizer(folder)
    if architecture.tokenizer == "sentencepiece-json":
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    # Made anew of the folder's config: bfloat16 has rounded the rope frequencies of the first one, too.
    model_class = getattr(transformers, name)
    read = model_class(model_class.config_class.from_pretrained(folder)).float().eval()
    read.load_state_dict(model.state_dict())
    return read


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
def gpt2_tokenizer() -> str:
    """tokenizer.json of GPT-2, from the vocabularies that llama.cpp's own tests use: the converter knows a byte-level
    BPE by what it makes of one text, and so needs the real one."""
    import gguf

    from tacq_export.runtime.source import source_tree

    reader = gguf.GGUFReader(source_tree(lambda _: None) / "models" / "ggml-vocab-gpt-2.gguf")
    tokens, merges = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
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
    return json.dumps(tokenizer)


def write_gpt2_tokenizer(folder: Path, bos: bool) -> None:
    (folder / "tokenizer.json").write_text(gpt2_tokenizer())
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "add_bos_token": bos,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
