"""The vocabulary of a GGUF in our build of llama.cpp: text to tokens and back, as all programs of llama.cpp do it."""

from __future__ import annotations

import ctypes
import hashlib
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TacqError
from .run_model import last_error, llama_cpp

if TYPE_CHECKING:
    from typing_extensions import Self

# What llama.cpp has said last. There is one log callback a process: ctypes frees a callback with the last reference to
# it, and llama.cpp would then call what is no more.
_LOG: deque[str] = deque(maxlen=1000)
_CALLBACKS: list[Any] = []


def keep_log(lib: ModuleType) -> deque[str]:
    """Let llama.cpp's warnings and errors go into a list instead of stderr; the list, emptied."""
    if not _CALLBACKS:

        @lib.llama_log_callback
        def keep(level: int, text: bytes, _: object) -> None:
            # ggml_log_level: 3 is a warning, 4 an error, 5 goes on with the line before.
            if level in (3, 4, 5):
                _LOG.append(text.decode(errors="replace"))

        _CALLBACKS.append(keep)
        lib.llama_log_set(keep, ctypes.c_void_p(0))
        lib.llama_backend_init()
    _LOG.clear()
    return _LOG


class LlamaVocab:
    """The vocabulary of one GGUF, loaded without its tensors. Use as a context manager, or call `close`.

    n_vocab: how many tokens it has. Raises TacqError with llama.cpp's reason if the file does not load, or has no
    vocabulary of a kind that makes tokens of text.
    """

    vocab_only = True

    def __init__(self, file: Path | str, backend: str = "cpu"):
        self.file = Path(file)
        self._model: Any = None
        if not self.file.is_file():
            raise TacqError(f"There is no file {file}; give the path of a GGUF.")
        self._lib = lib = llama_cpp(backend)
        keep_log(lib)
        params = lib.llama_model_default_params()
        params.vocab_only = self.vocab_only
        self._model = lib.llama_model_load_from_file(str(self.file).encode(), params)
        if not self._model:
            raise TacqError(f"llama.cpp does not load {self.file}: {self._reason()}")
        self.vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocab)
        self._check_special_tokens()

    def _check_special_tokens(self) -> None:
        """llama.cpp aborts the process where it is to add a token that the vocabulary does not name."""
        lib, vocab = self._lib, self.vocab
        if lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            self.close()
            raise TacqError(f"{self.file} has no tokenizer (its tokenizer.ggml.model is 'none'); use a GGUF with one.")
        for name in ("bos", "eos"):
            wanted = getattr(lib, f"llama_vocab_get_add_{name}")(vocab)
            if wanted and getattr(lib, f"llama_vocab_{name}")(vocab) < 0:
                self.close()
                raise TacqError(
                    f"{self.file} says tokenizer.ggml.add_{name}_token and names no {name.upper()} token; correct "
                    f"tokenizer.ggml.{name}_token_id, or fetch the file again."
                )

    def _reason(self) -> str:
        return last_error("".join(_LOG))

    def tokenize(self, text: str, special: bool = False, add_special: bool = False) -> list[int]:
        """Tokens of `text`. special: parse control tokens such as <|im_start|>; add_special: BOS and EOS as the
        vocabulary wants them. Raises TacqError if llama.cpp cannot."""
        raw = text.encode()
        buffer = (self._lib.llama_token * (len(raw) + 16))()
        count = self._lib.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), add_special, special)
        if count < 0:
            raise TacqError(
                f"llama.cpp could not tokenize the text with the vocabulary of {self.file}; check the file."
            )
        return np.ctypeslib.as_array(buffer)[:count].tolist()

    def pieces(self, tokens: list[int], special: bool = False) -> bytes:
        """The bytes that `tokens` stand for. special: with control tokens, which are left out otherwise."""
        pieces, buffer = [], ctypes.create_string_buffer(1024)
        for token in tokens:
            count = self._lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
            if count < 0:  # longer than the buffer: a vocabulary may hold whole lines of spaces
                buffer = ctypes.create_string_buffer(-count)
                count = self._lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
            pieces.append(buffer.raw[: max(count, 0)])
        return b"".join(pieces)

    def text(self, tokens: list[int], special: bool = False) -> str:
        """`pieces` as text; bytes that are no UTF-8 (half a character) become U+FFFD."""
        return self.pieces(tokens, special).decode(errors="replace")

    def bos(self) -> list[int]:
        """[BOS] if the model wants one at the start of a text, else []."""
        wants = self._lib.llama_vocab_get_add_bos(self.vocab)
        return [self._lib.llama_vocab_bos(self.vocab)] if wants else []

    def adds_eos(self) -> bool:
        """Whether the model wants EOS at the end of a text."""
        return bool(self._lib.llama_vocab_get_add_eos(self.vocab))

    def piece_of(self, name: str) -> str:
        """Text of the token called "bos" or "eos"; "" if the vocabulary has none."""
        token = getattr(self._lib, f"llama_vocab_{name}")(self.vocab)
        return self.text([token], special=True) if token >= 0 else ""

    def ends(self, token: int) -> bool:
        """Whether `token` ends an answer (EOS, end of turn, and their like)."""
        return bool(self._lib.llama_vocab_is_eog(self.vocab, token))

    def identity(self) -> str:
        """Names the vocabulary: 32 hex digits of the sha256 over the texts of all tokens, in order. Files with equal
        ones mean the same by a token id."""
        texts = (self._lib.llama_vocab_get_text(self.vocab, token) for token in range(self.n_vocab))
        return hashlib.sha256(b"\0".join(texts)).hexdigest()[:32]

    def close(self) -> None:
        """Free the model; harmless when repeated."""
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
