"""What the header of a GGUF says before anything is read, copied or loaded: whether it is a model that can be
exported."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from ..errors import TacqError
from ..format.gguf_file import field_value, open_gguf
from ..format.tensor_types import TYPES_BY_ID

# general.type of files that are no model, and of which gguf-py has constants, with what to give instead.
_OTHER_KINDS = {
    gguf.GGUFType.ADAPTER: "a LoRA adapter; merge it into its model (llama-export-lora), and give that",
    gguf.GGUFType.MMPROJ: "the vision or audio part of a model (mmproj); give the GGUF of its language model",
    gguf.GGUFType.IMATRIX: "an importance matrix; give the GGUF of a model",
}
# Architectures that llama.cpp has and that write no text one token after the other.
_NO_DECODERS = {
    "bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "eurobert",
    "gemma-embedding", "llama-embed", "t5", "t5encoder", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1",
}  # fmt: skip
# transformers takes its default for a size that is missing: that of a 7B model.
_SIZES = (
    ("block_count",),
    ("embedding_length",),
    ("feed_forward_length", "expert_feed_forward_length"),
    ("attention.head_count",),
)


def check_gguf(path: Path) -> gguf.GGUFReader:
    """Reader of a GGUF of a language model, all parts as one (`open_gguf`).

    Raises TacqError for a damaged file, a missing part, another kind of file than a model (adapter, mmproj, imatrix,
    vocabulary), a file of ours, an architecture that llama.cpp does not know or that is no decoder, a tensor type that
    cannot be decoded, a size that is missing, and tokens that the embedding has no rows for.
    """
    reader = open_gguf(path)
    architecture, kind = field_value(reader, "general.architecture"), field_value(reader, "general.type")
    if architecture == "clip":  # files older than general.type
        kind = gguf.GGUFType.MMPROJ
    if kind in _OTHER_KINDS:
        raise TacqError(f"{path} is no model but {_OTHER_KINDS[kind]}.")
    if not reader.tensors or architecture is None:
        raise TacqError(f"{path} holds no model (tensors and general.architecture); give a GGUF of a language model.")
    if any(int(t.tensor_type) in TYPES_BY_ID for t in reader.tensors):
        raise TacqError(f"{path} is already a TACQ file; export from the original model, what it lost is gone.")
    if architecture not in gguf.MODEL_ARCH_NAMES.values():
        raise TacqError(
            f"{path} has the architecture '{architecture}', which our llama.cpp does not know; use a model that it "
            "knows."
        )
    if (
        architecture in _NO_DECODERS
        or field_value(reader, f"{architecture}.attention.causal") is False
        or field_value(reader, f"{architecture}.pooling_type")
    ):
        raise TacqError(
            f"{path} has the architecture '{architecture}' of an encoder, an embedding or a diffusion model; "
            "give a language model that writes its text token by token."
        )
    for keys in _SIZES:
        if all(field_value(reader, f"{architecture}.{key}") is None for key in keys):
            raise TacqError(f"{path} has no key {architecture}.{keys[0]}; it is damaged or incomplete, fetch it again.")
    _check_types(path, reader)
    _check_rows(path, reader)
    return reader


def _check_rows(path: Path, reader: gguf.GGUFReader) -> None:
    """The embedding must have a row for each token, or llama.cpp does not load it."""
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    rows = next((int(t.shape[-1]) for t in reader.tensors if t.name == "token_embd.weight"), None)
    if tokens is not None and rows is not None and len(tokens.data) > rows:
        text = bytes(tokens.parts[tokens.data[rows]]).decode(errors="replace")
        raise TacqError(
            f"{path} has {len(tokens.data)} tokens and an embedding of {rows} rows, none for the token {rows} "
            f"({text!r}); its vocabulary was extended without its weights, so use the original model."
        )


def _check_types(path: Path, reader: gguf.GGUFReader) -> None:
    """Every type in use must be one that gguf-py decodes; each is tried on one block."""
    first = {tensor.tensor_type: tensor.name for tensor in reversed(reader.tensors)}
    for qtype, name in first.items():
        if qtype.name.startswith("I") and not qtype.name.startswith("IQ"):
            continue  # integers are copied
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8), qtype)
        except NotImplementedError:
            raise TacqError(
                f"{path} holds tensor '{name}' as {qtype.name}, which gguf-py cannot decode; use a GGUF of another "
                "type, F16 or Q8_0 at best."
            ) from None
