"""Inputs that used to go wrong, made small: folders, GGUFs and tasks for tools/check_cases.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model
import torch
from safetensors.torch import load_file, save_file
from sharp_models import write_sharp_folder
from tiny_hf import LLAMA_SIZES, SENTENCES, VOCAB, write_model_folder
from tiny_vocab import MERGES, write_vocab
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tacq_export.inputs.make_reference import make_reference
from tacq_export.reporting import Reporter

BOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '" + USER + "' if m.role == 'user' else '" + ASSISTANT + "' }}"
    "{{ m.content }}{% endfor %}"
)
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool.function.name }}\n{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}call {{ call.function.name }} "
    "{{ call.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
)
TOOL_ROW = {
    "tools": [{"type": "function", "function": {"name": "sum", "description": "adds", "parameters": {}}}],
    "messages": [
        {"role": "user", "content": "how many apples are two and three"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"a": 2, "b": 3}}}],
        },
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "five apples are left"},
    ],
}


def write_task(folder: Path, rows: list[dict] | None = None) -> Path:
    """A task of eight short questions and answers, or of `rows`."""
    path = folder / "task.jsonl"
    default = [
        {"question": f"how many apples are {i} and {i + 1}", "answer": f"{2 * i + 1} apples are left"} for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or default))
    return path


def llama_folder(folder: Path, template: str | None = None, **config: object) -> Path:
    """The tiny llama; `template` in place of its chat template, `config` over config.json."""
    write_model_folder(folder, "llama")
    if template is not None:
        change_json(folder / "tokenizer_config.json", chat_template=template)
    change_json(folder / "config.json", **config)
    return folder


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def float_gguf(folder: Path, path: Path) -> Path:
    """The F16 GGUF of a folder, as the converter makes it."""
    make_reference(str(folder), path, Reporter())
    return path


def without_head(folder: Path) -> Path:
    llama_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sharp_gguf(folder: Path, **settings: object) -> tuple[PreTrainedModel, Path]:
    """(torch model, F16 GGUF) of a llama whose logits are far from flat."""
    folder.mkdir(parents=True)
    model = write_sharp_folder(folder / "model", "llama", **settings)
    return model, float_gguf(folder / "model", folder / "model.gguf")


def deepseek_gguf(folder: Path, n_more: int = 0) -> Path:
    """A Qwen2 model whose control tokens are written with full-width bars, as in the distills of DeepSeek-R1. n_more:
    tokens that its embedding has no rows for."""
    model = float_gguf(write_model_folder(folder / "model", "qwen2"), folder / "plain.gguf")
    control = [BOS, USER, ASSISTANT]
    control += [f"<|unused{i}|>" for i in range(VOCAB - 256 - len(MERGES) - len(control) + n_more)]
    vocabulary = write_vocab(folder / "vocab.gguf", control, DEEPSEEK_TEMPLATE, bos=BOS, eos=BOS, add_bos=True)
    path = folder / "deepseek.gguf"
    write_with_vocabulary(path, gguf.GGUFReader(model), gguf.GGUFReader(vocabulary))
    return path


def write_with_vocabulary(path: Path, model: gguf.GGUFReader, vocabulary: gguf.GGUFReader) -> None:
    """The tensors and sizes of one GGUF with the tokenizer of another."""
    writer = gguf.GGUFWriter(path, "qwen2")

    def copy_fields(reader: gguf.GGUFReader, wanted: Callable[[str], bool]) -> None:
        for field in reader.fields.values():
            if wanted(field.name) and not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)

    copy_fields(model, lambda name: not name.startswith("tokenizer."))
    copy_fields(vocabulary, lambda name: name.startswith("tokenizer."))
    for tensor in model.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_pieces(folder: Path, total: int) -> None:
    """Let the sentencepiece vocabulary of a folder have `total` pieces; the new ones are words of numbers."""
    path = folder / "tokenizer.model"
    model = sentencepiece_model.ModelProto.FromString(path.read_bytes())
    for i in range(total - len(model.pieces)):
        piece = model.pieces.add()
        piece.piece, piece.score = f"▁{i}x", -1000.0 - i
    path.write_bytes(model.SerializeToString())


def large_vocabulary(folder: Path, n_vocab: int) -> Path:
    """A llama of width 64 whose embedding, which is its head as well, is nearly all of it."""
    torch.manual_seed(0)
    sizes = LLAMA_SIZES | {"vocab_size": n_vocab, "tie_word_embeddings": True, "max_position_embeddings": 2048}
    model = LlamaForCausalLM(LlamaConfig(**sizes, hidden_size=64, intermediate_size=128)).eval()
    write_model_folder(folder, "", model=model)
    add_pieces(folder, n_vocab)
    return folder


def plain_text(path: Path, size: int) -> Path:
    """`size` bytes of sentences, none of them the same."""
    lines, n = [], 0
    while n < size:
        lines.append(f"{len(lines)}: {SENTENCES[len(lines) % len(SENTENCES)]}.\n")
        n += len(lines[-1])
    path.write_text("".join(lines))
    return path
