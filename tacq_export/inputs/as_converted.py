"""The torch model with the numbers that llama.cpp's converter writes, where transformers holds others for the same
function: multipliers that the converter puts into the weights, and the row of the padding token.

Torch computes what it did before; the weights are those of the float GGUF, so that each can be linked to its tensor.
"""

from __future__ import annotations

from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

from ..format.gguf_file import tensor_values


def fold_multipliers(model: PreTrainedModel) -> None:
    """Multiply constants of the model's code into the weights before or behind them, where the converter does."""
    if model.config.model_type == "falcon_h1":
        _fold_falcon_h1(model)


@torch.no_grad()
def _fold_falcon_h1(model: Any) -> None:
    """In the converter's order of products, which decides the last bit."""
    base = model.model
    embedding, head = base.embed_tokens.weight, model.lm_head.weight
    embedding *= base.embedding_multiplier
    if head is embedding:  # tied: the head has got the embedding's constant, too
        base.lm_head_multiplier /= base.embedding_multiplier
    else:
        head *= base.lm_head_multiplier
        base.lm_head_multiplier = 1.0
    base.embedding_multiplier = 1.0
    for layer in base.layers:
        attention, mixer, mlp = layer.self_attn, layer.mamba, layer.feed_forward
        _scale(attention.k_proj, attention.key_multiplier)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight *= layer.attention_in_multiplier
        _scale(attention.o_proj, layer.attn_out_multiplier)
        mixer.in_proj.weight *= mixer.ssm_in_multiplier
        _scale(mixer.in_proj, mixer.mup_vector.reshape(-1, 1))
        _scale(mixer.out_proj, layer.ssm_out_multiplier)
        _scale(mlp.gate_proj, mlp.gate_multiplier)
        _scale(mlp.down_proj, mlp.down_multiplier)
        attention.key_multiplier = mixer.ssm_in_multiplier = mlp.gate_multiplier = mlp.down_multiplier = 1.0
        layer.attention_in_multiplier = layer.attn_out_multiplier = layer.ssm_out_multiplier = 1.0
        mixer.mup_vector.fill_(1.0)


def _scale(linear: torch.nn.Linear, factor: float | torch.Tensor) -> None:
    """Its output times a constant, or times one for each row ([rows, 1])."""
    linear.weight.mul_(factor)
    if linear.bias is not None:
        linear.bias.mul_(factor.reshape(-1) if isinstance(factor, torch.Tensor) else factor)


@torch.no_grad()
def restore_padding_row(model: PreTrainedModel, reference: gguf.GGUFReader) -> None:
    """Some classes of transformers zero the embedding of the padding token after they have loaded it; llama.cpp does
    not, and where that token is the one that ends a text, it is read. So the row is that of the float GGUF."""
    embedding = model.get_input_embeddings()
    row = getattr(embedding, "padding_idx", None)
    tensor = next((t for t in reference.tensors if t.name == "token_embd.weight"), None)
    if row is None or tensor is None or not isinstance(embedding, torch.nn.Embedding):
        return
    if tuple(tensor.shape[::-1]) == tuple(embedding.weight.shape) and not embedding.weight[row].any():
        embedding.weight[row] = torch.from_numpy(tensor_values(tensor)[row].copy()).to(embedding.weight)
