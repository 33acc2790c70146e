"""A tokenizer that can be followed by hand: a token is a word, BOS is 1."""

from __future__ import annotations

from pathlib import Path

from tacq_export.errors import TacqError


class Words:
    """What tokenize_task.py needs of a ModelTokenizer. template: without one turns are joined by newlines."""

    path, vocabulary = Path("words.gguf"), "the words"

    def __init__(self, template: bool = True):
        self.template = template
        self.ids: dict[str, int] = {}
        self.n_rows = 1000

    def words(self, tokens: list[int]) -> list[str]:
        names = {i: w for w, i in self.ids.items()} | {1: "BOS"}
        return [names[t] for t in tokens]

    def text(self, tokens, special: bool = False) -> str:
        return " ".join(self.words(tokens))

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        return [1, *(self.ids.setdefault(word, 10 + len(self.ids)) for word in text.split())][:limit]

    def encode_head(self, head, limit: int) -> list[int]:
        return self.encode(head(1 << 20), limit)

    def encode_chat(self, messages, tools=(), ask: bool = False, limit: int | None = None) -> list[int]:
        return self.encode(self.render(messages, tools, ask), limit)

    def render(self, messages, tools=(), ask: bool = False) -> str:
        if not self.template:
            return "\n".join(m["content"] for m in messages) + "\n" * ask
        if any(m["role"] == "nobody" for m in messages):
            raise TacqError("the model's chat template refuses it (Conversation roles must alternate); use others")
        return " ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <assistant>" * ask

    def check_rows(self, tokens, what: str) -> None:
        if any(token >= self.n_rows for token in tokens):
            raise TacqError(f"{what} has the token {max(tokens)}.")
