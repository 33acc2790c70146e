"""Text and conversations to tokens: the very ids that llama.cpp makes of them with the vocabulary of a GGUF.

A conversation goes through the GGUF's own chat template (chat_template.py). What then becomes of the text is
llama-server's rule: control tokens in it are one token each, BOS stands at the beginning if the vocabulary wants one,
and once, whether or not the text writes it, too; EOS likewise at the end, where a vocabulary wants that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from ..errors import TacqError
from ..format.gguf_file import field_value, open_gguf
from ..runtime.llama_vocab import LlamaVocab
from .chat_template import ChatTemplate

# Characters that are tokenized behind those that are needed. What stands there decides the last tokens before it: the
# end of a word, of a run of spaces, of a control token. It is far more than any of these takes.
MARGIN = 1 << 14
EMBEDDING = "token_embd.weight"


class ModelTokenizer:
    """The vocabulary and the chat template of a GGUF, which need not hold more than these.

    chat_template: None if it has none. n_rows: rows of its embedding, or the size of the vocabulary where there is no
    embedding in the file. vocabulary: names the meaning of the ids (LlamaVocab.identity). say: gets what is to be said
    about the template. reader: the file, if it is open already (gguf-py takes seconds for a large vocabulary).
    Raises TacqError if the runtime is not built, or llama.cpp cannot read the vocabulary.
    """

    def __init__(
        self,
        gguf_path: Path | str,
        say: Callable[[str], None] = lambda text: None,
        reader: gguf.GGUFReader | None = None,
    ):
        self.path = Path(gguf_path)
        reader = reader or open_gguf(self.path)
        _check_texts(field_value(reader, "tokenizer.ggml.tokens"), self.path)
        self._vocab = LlamaVocab(self.path)
        weakref.finalize(self, self._vocab.close).atexit = False  # the process frees it as well
        rows = [int(t.shape[1]) for t in reader.tensors if t.name == EMBEDDING and len(t.shape) == 2]
        self.n_rows = rows[0] if rows else self._vocab.n_vocab
        self.vocabulary = self._vocab.identity()
        bos, eos = self._vocab.piece_of("bos"), self._vocab.piece_of("eos")

        def template(key: str) -> ChatTemplate | None:
            source = field_value(reader, key)
            return ChatTemplate(str(source), bos, eos, say) if source else None

        self.chat_template = template("tokenizer.chat_template")
        self._tool_template = template("tokenizer.chat_template.tool_use") or self.chat_template
        # What llama.cpp puts at both ends of every text; some kinds of vocabulary add nothing, whatever their keys say.
        ends = self._vocab.tokenize("", add_special=True)
        at = 1 if len(ends) > 1 or ends == self._vocab.bos() else 0
        self._head, self._tail = ends[:at], ends[at:]
        self._bos_text = bos if self._vocab.bos() else ""
        self._eos_text = eos if self._vocab.adds_eos() else ""

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Tokens of a text, int >= 0; the first `limit` of them, for which no more of the text is tokenized than
        that takes."""
        if limit is None:
            return self._ended(self._begun(text), text)
        return self.encode_head(lambda n: text[:n], limit)

    def encode_head(self, head: Callable[[int], str], limit: int) -> list[int]:
        """The first `limit` tokens of a text of which head(n) gives the first n characters, or all if it has less.

        They are those that the whole text begins with: a vocabulary works on pieces from left to right, so the tokens
        that a longer and a shorter beginning have in common do not change with what follows.
        """
        n = 6 * limit + MARGIN
        while len(text := head(n + MARGIN)) > n:
            longer, shorter = self._begun(text), self._begun(text[:n])
            if _common(longer, shorter) >= limit:
                return longer[:limit]
            n *= 2
        return self._ended(self._begun(text), text)[:limit]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        ask: bool = False,
        limit: int | None = None,
    ) -> list[int]:
        """Tokens of a conversation in the chat template, as `encode` gives them. ask: followed by the beginning of the
        assistant's next turn. Raises TacqError as ChatTemplate.render does."""
        return self.encode(self.render(messages, tools, ask), limit)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), ask: bool = False) -> str:
        """The text of a conversation. Without a template it is the turns, with a newline between them, and one at the
        end if `ask`."""
        template = self._tool_template if tools else self.chat_template
        if template is not None:
            return template.render(messages, tools, ask)
        if tools or any(message.get("tool_calls") for message in messages):
            raise TacqError("the model has no chat template to write tools and tool calls with; use rows without them")
        texts = [_plain_content(message.get("content")) for message in messages]
        return "\n".join(texts) + "\n" * ask

    def text(self, tokens: Sequence[int], special: bool = False) -> str:
        """What `tokens` stand for; control tokens only if `special`."""
        return self._vocab.text(list(tokens), special)

    def ends(self, token: int) -> bool:
        """Whether `token` ends an answer."""
        return self._vocab.ends(token)

    def _begun(self, text: str) -> list[int]:
        """Tokens of the beginning of a text. BOS, if it is wanted, is there once."""
        if self._bos_text and text.startswith(self._bos_text):
            text = text[len(self._bos_text) :]  # as llama.cpp's common_chat_templates_apply does it
        tokens = self._vocab.tokenize(text, special=True)
        if self._bos_text and self._head:
            begin = 0
            while tokens[begin : begin + 1] == self._head:
                begin += 1
            tokens = tokens[begin:]
        return self._head + tokens

    def _ended(self, tokens: list[int], text: str) -> list[int]:
        if self._eos_text and text.endswith(self._eos_text) and tokens[-1:] == self._tail:
            return tokens
        return tokens + self._tail

    def check_rows(self, tokens: Sequence[int], what: str) -> None:
        """Raises TacqError, naming `what` and the token, for one that the model's embedding has no row for."""
        wrong = next((token for token in tokens if not 0 <= token < self.n_rows), None)
        if wrong is not None:
            piece = self.text([wrong], special=True) if 0 <= wrong < self._vocab.n_vocab else ""
            raise TacqError(
                f"{what} has the token {wrong} ({piece!r}), and the embedding of {self.path.name} has {self.n_rows} "
                "rows; its vocabulary was extended without its weights, so use the original model, or leave that text "
                "out."
            )


def _check_texts(texts: list[str] | None, path: Path) -> None:
    """llama.cpp aborts the process at a vocabulary that has a text twice."""
    if texts is None:
        raise TacqError(
            f"{path} has no tokenizer (no key tokenizer.ggml.tokens); give a GGUF of a language model, with its "
            "vocabulary."
        )
    if len(set(texts)) == len(texts):
        return
    seen: dict[str, int] = {}
    for token, text in enumerate(texts):
        if text and text in seen:  # llama.cpp gives empty ones names of their own
            raise TacqError(
                f"{path} has the token {text!r} twice (ids {seen[text]} and {token}), which llama.cpp does not load; "
                "correct the tokenizer's files, and convert the model again."
            )
        seen[text] = token


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _plain_content(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""
