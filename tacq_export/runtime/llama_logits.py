"""Logits of a GGUF for given tokens, through our build of llama.cpp and its low-level Python interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TacqError
from .build import usable_cpus
from .llama_vocab import LlamaVocab

# Tokens decoded at once: bounds memory to CHUNK x vocabulary x 4 bytes a model (155 MB at 152k).
CHUNK = 256


class LlamaModel(LlamaVocab):
    """One loaded model. Use as a context manager; `file` is a GGUF, n_ctx the longest token list that will be asked
    for, sequences how many such lists its context holds side by side. LlamaLogits and LlamaGenerator evaluate tokens
    with it.

    Raises TacqError with llama.cpp's reason if the file does not load.
    """

    vocab_only = False

    def __init__(
        self, file: Path | str, n_ctx: int, threads: int | None = None, backend: str = "cpu", sequences: int = 1
    ):
        self._context: Any = None
        self._batch: Any = None
        super().__init__(file, backend)
        lib = self._lib
        params = lib.llama_context_default_params()
        self.n_ctx = -(-max(n_ctx, CHUNK) // 256) * 256
        params.n_ctx = self.n_ctx * sequences
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = threads or usable_cpus()
        params.no_perf = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise TacqError(f"llama.cpp makes no context of {n_ctx} tokens for {self.file}: {self._reason()}")
        self._batch = lib.llama_batch_init(CHUNK, 0, 1)
        for i in range(CHUNK):
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = 0
            self._batch.logits[i] = 1

    def _evaluate(self) -> None:
        status = self._lib.llama_decode(self._context, self._batch)
        if status:
            raise TacqError(f"llama.cpp failed to evaluate {self.file} (status {status}): {self._reason()}")

    def close(self) -> None:
        """Free the model and its context; harmless when repeated."""
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
        if self._context:
            self._lib.llama_free(self._context)
        self._batch = self._context = None
        super().close()


class LlamaLogits(LlamaModel):
    """A model that is asked for all logits of one text at a time."""

    def chunks(self, tokens: list[int], wanted: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(first position, float32 [n, n_vocab]) of each chunk of a text; the array is valid until the next chunk.

        wanted: positions, ascending, whose logits alone are computed and given; all of them unless given.
        Raises TacqError for a token outside the vocabulary or a text longer than n_ctx.
        """
        lib, batch = self._lib, self._batch
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.n_vocab:
            raise TacqError(
                f"The text has a token outside the {self.n_vocab} of {self.file}; use the model's own tokenizer."
            )
        if len(tokens) > self.n_ctx:
            raise TacqError(f"A text of {len(tokens)} tokens does not fit the context of {self.n_ctx}; shorten it.")
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        for begin in range(0, len(tokens), CHUNK):
            piece = tokens[begin : begin + CHUNK]
            batch.n_tokens = len(piece)
            np.ctypeslib.as_array(batch.token, (CHUNK,))[: len(piece)] = piece
            places = np.arange(begin, begin + len(piece))
            np.ctypeslib.as_array(batch.pos, (CHUNK,))[: len(piece)] = places
            chosen = np.ones(len(piece), bool) if wanted is None else np.isin(places, wanted)
            np.ctypeslib.as_array(batch.logits, (CHUNK,))[: len(piece)] = chosen
            self._evaluate()
            if chosen.any():
                logits = lib.llama_get_logits(self._context)
                yield begin, np.ctypeslib.as_array(logits, (int(chosen.sum()), self.n_vocab))
