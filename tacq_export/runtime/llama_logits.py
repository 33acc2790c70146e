"""Logits of a GGUF for given tokens, through our build of llama.cpp and its low-level Python interface."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import TacqError
from .run_model import last_error, llama_cpp

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

# Tokens decoded at once: bounds memory to CHUNK x vocabulary x 4 bytes a model (155 MB at 152k).
CHUNK = 256


class LlamaModel:
    """One loaded model. Use as a context manager; `file` is a GGUF, n_ctx the longest token list that will be asked
    for, sequences how many such lists its context holds side by side. LlamaLogits and LlamaGenerator evaluate tokens
    with it.

    Raises TacqError with llama.cpp's reason if the file does not load.
    """

    def __init__(
        self, file: Path | str, n_ctx: int, threads: int | None = None, backend: str = "cpu", sequences: int = 1
    ):
        self.file = Path(file)
        if not self.file.is_file():
            raise TacqError(f"There is no file {file}; give the path of a GGUF.")
        self._model = self._context = self._batch = None
        self._lib = lib = llama_cpp(backend)
        self._log: list[str] = []

        @lib.llama_log_callback
        def keep(level, text, _):
            # ggml_log_level: 3 is a warning, 4 an error, 5 goes on with the line before.
            if level in (3, 4, 5):
                self._log.append(text.decode(errors="replace"))

        self._keep = keep  # ctypes callbacks live as long as Python refers to them
        lib.llama_log_set(keep, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(self.file).encode(), lib.llama_model_default_params())
        if not self._model:
            raise TacqError(f"llama.cpp does not load {self.file}: {self._reason()}")
        self.vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)
        params = lib.llama_context_default_params()
        self.n_ctx = -(-max(n_ctx, CHUNK) // 256) * 256
        params.n_ctx = self.n_ctx * sequences
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = threads or len(os.sched_getaffinity(0))
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

    def _reason(self) -> str:
        return last_error("".join(self._log))

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Tokens of `text`, without BOS/EOS; special: parse control tokens such as <|im_start|>."""
        raw = text.encode()
        buffer = (self._lib.llama_token * (len(raw) + 16))()
        count = self._lib.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), False, special)
        if count < 0:
            raise TacqError(
                f"llama.cpp could not tokenize the text with the vocabulary of {self.file}; check the file."
            )
        return list(buffer[:count])

    def text(self, tokens: list[int]) -> str:
        """The text of `tokens`, control tokens left out; bytes that are no UTF-8 (half a character) become U+FFFD."""
        pieces, buffer = [], (ctypes.c_char * 1024)()
        for token in tokens:
            count = self._lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            pieces.append(buffer.raw[: max(count, 0)])
        return b"".join(pieces).decode(errors="replace")

    def bos(self) -> list[int]:
        """[BOS] if the model wants one at the start of a text, else []."""
        wants = self._lib.llama_vocab_get_add_bos(self.vocab)
        return [self._lib.llama_vocab_bos(self.vocab)] if wants else []

    def _evaluate(self) -> None:
        status = self._lib.llama_decode(self._context, self._batch)
        if status:
            raise TacqError(f"llama.cpp failed to evaluate {self.file} (status {status}): {self._reason()}")

    def close(self) -> None:
        """Free the model; harmless when repeated."""
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class LlamaLogits(LlamaModel):
    """A model that is asked for all logits of one text at a time."""

    def chunks(self, tokens: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(first position, float32 [n, n_vocab]) of each chunk of a text; the array is valid until the next chunk.

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
            np.ctypeslib.as_array(batch.pos, (CHUNK,))[: len(piece)] = np.arange(begin, begin + len(piece))
            self._evaluate()
            logits = lib.llama_get_logits(self._context)
            yield begin, np.ctypeslib.as_array(logits, (len(piece), self.n_vocab))
