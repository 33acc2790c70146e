"""Tiny models whose logits are far from flat, so that a dropped bias, scale or rope rule shows in the KL."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from tiny_hf import VOCAB, write_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tacq_export.format.gguf_file import open_gguf
from tacq_export.inputs.make_reference import make_reference
from tacq_export.reporting import Reporter

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
TEXT = torch.randint(3, VOCAB, (300,), generator=torch.Generator().manual_seed(5)).tolist()


def sharp_model(kind: str, scale: float = 0.15, **settings) -> PreTrainedModel:
    """A model of transformers' model_type `kind`; matrices of standard deviation `scale`, biases and norms random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(_SIZES | settings))).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
            elif name.endswith("bias"):
                parameter.normal_(0, 2 * scale)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def write_sharp_folder(folder: Path, kind: str, **settings) -> PreTrainedModel:
    model = sharp_model(kind, **settings)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def converted(folder: Path, kind: str, **settings) -> tuple[PreTrainedModel, Path]:
    """(model, its F16 GGUF as llama.cpp's converter makes it)."""
    model = write_sharp_folder(folder / "model", kind, **settings)
    make_reference(str(folder / "model"), folder / "reference.gguf", Reporter())
    return model, folder / "reference.gguf"


def both_sides(model: PreTrainedModel, gguf_path: Path) -> SimpleNamespace:
    """What `check_function` reads of a LoadedModel, without linking every matrix."""
    return SimpleNamespace(
        model=model,
        reference=open_gguf(gguf_path),
        reference_path=gguf_path,
        embedding=SimpleNamespace(weight=model.get_input_embeddings().weight),
    )
