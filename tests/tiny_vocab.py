"""A GGUF that holds a small vocabulary and a chat template, and an embedding if asked for: enough to make tokens."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Single bytes and a few merges, as GPT-2 writes them ("Ġ" is a space).
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "r l", "Ġwo rl", "Ġworl d", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "1 0"]


def write_vocab(
    path: Path,
    control: list[str],
    template: str | None = None,
    bos: str | None = None,
    eos: str | None = None,
    add_bos: bool | None = None,
    add_eos: bool | None = None,
    n_rows: int | None = None,
    tokens: list[str] | None = None,
    tool_template: str | None = None,
) -> Path:
    """A byte-level BPE vocabulary of pre-tokenizer "deepseek-r1-qwen", the `control` tokens behind the others.

    bos, eos: texts of those tokens. n_rows: rows of an embedding of two columns. tokens: others than the usual ones.
    """
    plain = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)] if tokens is None else tokens
    texts = [*plain, *control]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-r1-qwen")
    writer.add_token_list(texts)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(plain) + [gguf.TokenType.CONTROL] * len(control))
    writer.add_token_merges(MERGES if tokens is None else ["a b"])
    if bos:
        writer.add_bos_token_id(texts.index(bos))
    if eos:
        writer.add_eos_token_id(texts.index(eos))
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    if add_eos is not None:
        writer.add_add_eos_token(add_eos)
    if template is not None:
        writer.add_chat_template(template)
    if tool_template is not None:
        writer.add_string("tokenizer.chat_template.tool_use", tool_template)
    if n_rows:
        writer.add_tensor("token_embd.weight", np.zeros((n_rows, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
