"""Tiny Hugging Face folders with random weights, a sentencepiece tokenizer trained on a few sentences, and what tests
of whole exports share.

All three architectures use the sentencepiece tokenizer: llama.cpp's converter takes a `tokenizer.model` for each of
them, where a byte-level BPE would have to be one whose pre-tokenizer hash the converter knows.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import gguf
import sentencepiece
import tokenizers
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tacq_export.inputs.link_tensors import LinkedExperts, LinkedTensor
from tacq_export.inputs.load_model import LoadedModel
from tacq_export.reporting import Reporter
from tacq_export.runtime.source import source_tree

VOCAB = 320  # 3 control tokens, 256 bytes, 61 pieces
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "she sells seven sea shells by the sea shore",
    "how many apples are left when two of five are eaten",
    "a train leaves the station at nine and arrives at noon",
    "pack my box with five dozen liquor jugs",
    "answer the question with one number and nothing else",
]
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Of a llama that is given its widths.
LLAMA_SIZES = {k: v for k, v in _SIZES.items() if k not in ("hidden_size", "intermediate_size", "pad_token_id")}
LLAMA_SIZES |= {"tie_word_embeddings": False}
# {name: function that makes the model}; head_dim is 16, so Llama's rows of q and k are really permuted.
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True)),
    # llama.cpp scales queries by head_dim; transformers' default of query_pre_attn_scalar is 256 for all sizes.
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=64)
    ),
}
# Mixtures of experts: 8 matrices in one parameter of three dimensions, two for each token.
EXPERTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=8, tie_word_embeddings=False)),
}
TEXTS = [[1, 5, 9, 20, 33, 270, 4], [1, 300, 12, 5, 5, 91], [1, 44]]  # of different lengths
CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"


@cache
def _sentencepiece_model(folder: Path) -> bytes:
    path = folder / "spm"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(path),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return path.with_suffix(".model").read_bytes()


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model(folder))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_bpe_tokenizer(folder: Path) -> None:
    """GPT-2's tokenizer, from the vocabulary that llama.cpp's tree has for its tests: 50,257 tokens. The converter
    knows byte-level BPE by the tokens of a test text, so that one trained here would be refused."""
    reader = gguf.GGUFReader(source_tree(lambda _: None) / "models" / "ggml-vocab-gpt-2.gguf")
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(m.split(" ")) for m in reader.get_field("tokenizer.ggml.merges").contents()],
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A model whose weights are all different and some of whose rows stand out, so that no order of rows is like
    another."""
    torch.manual_seed(seed)
    model = (ARCHITECTURES | EXPERTS)[architecture]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08)
    return model


def scaled_llama(scale: float) -> PreTrainedModel:
    """attn_v of block 0 `scale` times larger and attn_output as much smaller: the function is the same."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight *= scale
        model.model.layers[0].self_attn.o_proj.weight /= scale
    return model


def odd_width_llama(hidden: int, inner: int) -> PreTrainedModel:
    """A llama whose rows have `hidden` weights, and `inner` in ffn_down."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES, hidden_size=hidden, intermediate_size=inner)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.08)
    return model


def write_model_folder(folder: Path, architecture: str, seed: int = 0, model: PreTrainedModel | None = None) -> Path:
    """Weights, config and tokenizer, as a Hugging Face checkpoint."""
    model = model or tiny_model(architecture, seed)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def own_copy(load_tiny, architecture: str) -> LoadedModel:
    """A loaded model whose weights a test may change."""
    loaded = load_tiny(architecture)
    model = copy.deepcopy(loaded.model)
    names = dict(model.named_modules())

    def own(tensor):
        if isinstance(tensor, LinkedExperts):
            return replace(tensor, matrices=tuple(own(m) for m in tensor.matrices))
        return None if tensor is None else replace(tensor, module=names[tensor.module_name])

    return replace(
        loaded,
        model=model,
        linear=[own(t) for t in loaded.linear],
        embedding=own(loaded.embedding),
        head=own(loaded.head),
    )


def linked_modules(modules: dict[str, torch.nn.Module]) -> list[LinkedTensor]:
    """{name: module} as matrices, all rows in torch's order."""
    return [LinkedTensor(name, name, module, None) for name, module in modules.items()]


class Listener(Reporter):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)
