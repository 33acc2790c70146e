"""A llama of two layers that fits in a few hundred kilobytes, with its matrices in one of our types; random weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import numpy as np
from random_tensors import random_kept

from tacq_export.format.pack_tensor import QuantizedTensor, pack_tensor
from tacq_export.format.quantize_ref import quantize_ref
from tacq_export.format.tensor_types import FORMAT_VERSION, TensorType, register_with_gguf

WIDTH, FFN, LAYERS, VOCAB = 128, 192, 2, 3 + 256


@cache
def random_matrices(tensor_type: TensorType) -> dict[str, np.ndarray]:
    """{name: bytes of a random matrix as uint8 [rows, bytes a row]}, the shape by which gguf-py knows rows and
    columns."""
    rng = np.random.default_rng(0)
    return {name: quantized(rng, tensor_type, *shape) for name, shape in matrices().items()}


def quantized(rng: np.random.Generator, tensor_type: TensorType, rows: int, columns: int) -> np.ndarray:
    codes, scale_bytes = quantize_ref(tensor_type.bits, rng.normal(0, 0.05, (rows, columns)).astype(np.float32))
    kept = random_kept(rng, rows, columns, tensor_type.p) if tensor_type.p else None
    return pack_tensor(QuantizedTensor(tensor_type, codes, scale_bytes, kept)).reshape(rows, -1)


def matrices() -> dict[str, tuple[int, int]]:
    """{name: (rows, columns)}"""
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{m}.weight": (WIDTH, WIDTH) for m in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{m}.weight": (FFN, WIDTH) for m in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (WIDTH, FFN)
    return shapes


def write_tiny_model(
    path: Path,
    tensor_type: TensorType,
    format_version: int | None = FORMAT_VERSION,
    change: dict | None = None,
    mixed_norm: bool = False,
) -> None:
    """Write the model.

    change: {tensor name: function of its bytes (uint8 [rows, bytes a row]) that gives other bytes}. mixed_norm: the
    last norm is of `tensor_type` too, which makes no sense.
    """
    register_with_gguf()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>"] + [f"<0x{i:02X}>".encode() for i in range(256)])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types(
        [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    )
    if format_version is not None:
        writer.add_uint32("tacq.format_version", format_version)
    for name, data in random_matrices(tensor_type).items():
        if change and name in change:
            data = change[name](data.copy())
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(tensor_type.id))
    for name in ["output_norm.weight"] + [f"blk.{i}.{m}_norm.weight" for i in range(LAYERS) for m in ("attn", "ffn")]:
        if mixed_norm and name == "output_norm.weight":
            norm = quantized(np.random.default_rng(1), tensor_type, 1, WIDTH).reshape(-1)
            writer.add_tensor(name, norm, raw_dtype=gguf.GGMLQuantizationType(tensor_type.id))
        else:
            writer.add_tensor(name, np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
