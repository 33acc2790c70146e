"""The next-token loss of one text and its backward pass, with the logits in pieces where the vocabulary is large.

A text of 2,048 tokens has 2 GB of float32 logits with a vocabulary of 262,144, and cross-entropy needs several copies
of them. The blocks run once on the whole text; head and loss then run on some of its tokens at a time, and the gradient
at the head's input is summed up before it goes on through the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

LOGITS = 1 << 25  # of one piece: 128 MB of float32, and a few times that while the loss is differentiated
# Of vocabularies beyond 200,000, where gradients of the embedding and the head take as much again, a quarter of that.
_LARGE_VOCABULARY, _LOGITS_OF_LARGE = 200_000, 1 << 23


def backward_loss(
    model: PreTrainedModel, text: torch.Tensor, begin: int, bf16: bool, logits: int | None = None
) -> float:
    """Mean next-token cross-entropy of the tokens of `text` from `begin` on, after its backward pass.

    text: int64 [tokens], on the model's device. bf16: matrix products in bfloat16. logits: how many may be in memory at
    once, by the size of the vocabulary unless given. Hooks at the head's output see the gradients of the pieces one
    after the other, in the order of the tokens.
    The sums of a loss in pieces are rounded in another order than those of the whole.
    """
    n_vocab = model.config.get_text_config().vocab_size
    tokens_at_once = max((logits or (LOGITS if n_vocab <= _LARGE_VOCABULARY else _LOGITS_OF_LARGE)) // n_vocab, 1)
    decoder = model.get_decoder()
    autocast = torch.autocast(text.device.type, torch.bfloat16, enabled=bf16)
    if len(text) <= tokens_at_once or decoder is None or decoder is model:
        with autocast:
            found = model(input_ids=text[None], use_cache=False).logits[0, begin - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(found, text[begin:])
        if torch.isfinite(loss):
            loss.backward()
        return loss.item()

    target = text.new_full((len(text),), -100)  # what cross_entropy leaves out
    target[begin - 1 : -1] = text[begin:]
    with autocast:
        output = decoder(input_ids=text[None], use_cache=False)
    hidden = output.last_hidden_state.detach().requires_grad_(True)
    total = 0.0
    for first in range(0, len(text), tokens_at_once):
        part = slice(first, first + tokens_at_once)
        with autocast, _answering(decoder, _with_hidden(output, hidden[:, part])):
            found = model(input_ids=text[None, part], use_cache=False).logits[0].float()
        loss = torch.nn.functional.cross_entropy(found, target[part], reduction="sum") / (len(text) - begin)
        if not torch.isfinite(loss):
            return loss.item()
        loss.backward()
        total += loss.item()
    output.last_hidden_state.backward(hidden.grad)
    return total


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A copy of a decoder's output with other hidden states."""
    changed = copy.copy(output)
    changed.last_hidden_state = hidden
    return changed


@contextmanager
def _answering(decoder: torch.nn.Module, output: Any) -> Iterator[None]:
    """The decoder gives `output`, whatever it is called with, for as long as the `with` lasts."""
    forward: Callable = decoder.forward
    decoder.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        decoder.forward = forward
