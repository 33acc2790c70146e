"""Greedy answers of a GGUF to many prompts, several at a time, through our build of llama.cpp.

A CPU reads all weights for every step of decoding; with several sequences a step they are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import TacqError
from .llama_logits import CHUNK, LlamaModel

# Sequences side by side, each with its own cache in memory. 16 prompts of 64 tokens take 32 s in place of 45 with 8
# (1.5B, Q4_K_M, 2 cores).
PARALLEL = 16


@dataclass
class _Slot:
    """One sequence of the context: which prompt it works on (None: idle), what is in its cache, what it has
    answered."""

    sequence: int
    prompt: int | None = None
    cached: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


class LlamaGenerator(LlamaModel):
    """One loaded model that answers up to `parallel` prompts side by side. Use as a context manager.

    n_ctx: the longest prompt with its answer, in tokens. Raises TacqError as LlamaModel does.
    """

    def __init__(
        self, file: Path | str, n_ctx: int, threads: int | None = None, parallel: int = PARALLEL, backend: str = "cpu"
    ):
        if not 1 <= parallel <= CHUNK:
            raise TacqError(f"{parallel} sequences side by side are not possible; give from 1 to {CHUNK}.")
        super().__init__(file, n_ctx, threads, backend, sequences=parallel)
        self._memory = self._lib.llama_get_memory(self._context)
        self._slots = [_Slot(i) for i in range(parallel)]

    def generate(
        self,
        prompts: Sequence[list[int]],
        n_predict: int,
        stop: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
        keep_end: bool = False,
    ) -> list[list[int]]:
        """The most probable next token, again and again, for each prompt: at most n_predict tokens, in the prompts'
        order.

        An answer ends before an end-of-generation token (with it, one token more, if `keep_end`), or with the token
        that completes one of the strings `stop`.
        progress(done, total) is called after each answer. The same file, prompts, threads and parallel give the same
        tokens; another `parallel` sums in another order, so a near-tie may fall to the other side.
        Raises TacqError for an empty prompt, a token outside the vocabulary, or a prompt longer than the context.
        """
        for prompt in prompts:
            if not prompt or not 0 <= min(prompt) <= max(prompt) < self.n_vocab:
                raise TacqError(
                    f"A prompt is empty or has a token outside the {self.n_vocab} of {self.file}; use the model's own "
                    "tokenizer."
                )
            if len(prompt) + n_predict > self.n_ctx:
                raise TacqError(
                    f"A prompt of {len(prompt)} tokens and {n_predict} of answer do not fit the context of "
                    f"{self.n_ctx}; shorten it."
                )
        for slot in self._slots:  # what an earlier call left would make the answers depend on it
            slot.prompt, slot.cached = None, []
        self._lib.llama_memory_clear(self._memory, True)
        answers: list[list[int]] = [[] for _ in prompts]
        waiting, done = list(range(len(prompts))) if n_predict > 0 else [], 0
        while waiting or any(slot.prompt is not None for slot in self._slots):
            for slot in self._slots:
                while slot.prompt is None and waiting:
                    slot.prompt, slot.answer = waiting.pop(0), []
                    following = self._prefill(slot, prompts[slot.prompt])
                    if self._advance(slot, following, n_predict, stop, keep_end):
                        done = self._finish(slot, answers, done, progress)
            busy = [slot for slot in self._slots if slot.prompt is not None]
            if not busy:
                continue
            step = [(slot.answer[-1], len(slot.cached), slot.sequence) for slot in busy]
            chosen = self._decode(step, range(len(step)))
            for slot, (token, _, _), following in zip(busy, step, chosen, strict=False):
                slot.cached.append(token)
                if self._advance(slot, following, n_predict, stop, keep_end):
                    done = self._finish(slot, answers, done, progress)
        return answers

    def _prefill(self, slot: _Slot, prompt: list[int]) -> int:
        """Put the prompt into the slot's cache and return the token that follows. What the slot's last prompt begins
        with, too, is kept (questions on one database); the last token is always evaluated, for its logits."""
        common = 0
        while common < min(len(slot.cached), len(prompt) - 1) and slot.cached[common] == prompt[common]:
            common += 1
        if not self._lib.llama_memory_seq_rm(self._memory, slot.sequence, common, -1):
            common = 0  # some architectures cannot forget a part
            self._lib.llama_memory_seq_rm(self._memory, slot.sequence, -1, -1)
        chosen = []
        for begin in range(common, len(prompt), CHUNK):
            piece = prompt[begin : begin + CHUNK]
            wanted = [len(piece) - 1] if begin + CHUNK >= len(prompt) else []
            chosen = self._decode([(token, begin + i, slot.sequence) for i, token in enumerate(piece)], wanted)
        slot.cached = list(prompt)
        return chosen[0]

    def _decode(self, entries: list[tuple[int, int, int]], wanted: Sequence[int]) -> list[int]:
        """Evaluate (token, position, sequence) entries; the most probable next token after each of the `wanted`
        ones."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.seq_id[i][0] = token, position, sequence
            batch.logits[i] = 0
        for i in wanted:
            batch.logits[i] = 1
        self._evaluate()
        rows = (
            np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, i), (self.n_vocab,)) for i in wanted
        )
        return [int(row.argmax()) for row in rows]

    def _advance(self, slot: _Slot, token: int, n_predict: int, stop: Sequence[str], keep_end: bool) -> bool:
        """Add a token to the slot's answer; True if that ends it."""
        if self.ends(token):
            slot.answer += [token] * keep_end
            return True
        slot.answer.append(token)
        if len(slot.answer) >= n_predict:
            return True
        # A stop string is at least a byte a token long, so it ends within the last so many tokens.
        return any(text in self.text(slot.answer[-len(text.encode()) - 1 :]) for text in stop)

    def _finish(
        self, slot: _Slot, answers: list[list[int]], done: int, progress: Callable[[int, int], None] | None
    ) -> int:
        if slot.prompt is not None:
            answers[slot.prompt] = slot.answer
        slot.prompt = None
        if progress:
            progress(done + 1, len(answers))
        return done + 1


def generate(
    file: Path | str,
    prompts: Sequence[list[int]],
    n_predict: int,
    threads: int | None = None,
    parallel: int = PARALLEL,
    stop: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    backend: str = "cpu",
    keep_end: bool = False,
) -> list[tuple[list[int], str]]:
    """(tokens, text) of the greedy answer to each prompt (a token list): LlamaGenerator.generate with a model loaded
    for it. The text is without control tokens.

    The context is as large as the longest prompt and its answer, times `parallel`. Raises TacqError if the file does
    not load, or for a prompt that is empty or not of this model's vocabulary.
    """
    if not prompts:
        return []
    parallel = min(parallel, len(prompts))
    with LlamaGenerator(file, max(map(len, prompts)) + n_predict, threads, parallel, backend) as model:
        answers = model.generate(prompts, n_predict, stop, progress, keep_end)
        return [(tokens, model.text(tokens)) for tokens in answers]
