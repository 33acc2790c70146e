"""The task file: examples in, token lists out.

JSONL, one object a line, with one of these sets of keys:

    {"question": ..., "answer": ...}       a user turn and the assistant's
    {"prompt": ..., "completion": ...}     the same
    {"messages": [{"role": ..., "content": ...}, ...]}
    {"text": ...}                          taken as it is

Conversations go through the model's chat template; a model without one gets the turns joined by newlines. Any other file
is plain text, cut into windows of seq_len tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import TacqError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PAIRS = (("question", "answer"), ("prompt", "completion"))
_EXPECTED = '"question" and "answer", "prompt" and "completion", "messages", or "text"'


@dataclass(frozen=True)
class Example:
    """Either `messages` (a conversation) or `text`."""

    messages: tuple[dict[str, str], ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Task:
    """name: file name without ending. packed: True if `examples` is one plain text to be cut into windows."""

    name: str
    examples: list[Example]
    packed: bool


def read_text(path: Path) -> str:
    """Raises TacqError for a file that cannot be read, is not UTF-8, or empty."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TacqError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise TacqError(f"{path} cannot be read ({error.strerror}); give a JSONL or text file.") from None
    if not content.strip():
        raise TacqError(f"{path} is empty; put at least one example into it.")
    return content


def load_task(path: Path) -> Task:
    """Read a task file. Raises TacqError, with the line's number where there is one, if it is missing, empty or malformed."""
    content = read_text(path)
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        return Task(path.stem, [Example(text=content)], packed=True)
    lines = enumerate(content.split("\n"), 1)  # not splitlines(): JSON strings may hold U+2028
    return Task(path.stem, [_parse_line(path, number, line) for number, line in lines if line.strip()], packed=False)


def _parse_line(path: Path, number: int, line: str) -> Example:
    def fail(what: str) -> TacqError:
        return TacqError(f"{path}, line {number}: {what}.")

    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is legal JSON, and no text
    except json.JSONDecodeError as error:
        raise fail(f"not valid JSON ({error.msg} at column {error.colno}); each line must be one JSON object") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise fail(f"not valid JSON ({str(error)[:120]}); each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise fail(f"a JSON {type(row).__name__}, expected an object with {_EXPECTED}")
    for user, assistant in _PAIRS:
        if user in row or assistant in row:
            for key in (user, assistant):
                if not isinstance(row.get(key), str) or not row[key].strip():
                    raise fail(f'"{key}" is missing, empty or no string; {user} and {assistant} go together')
            return Example(messages=({"role": "user", "content": row[user]}, {"role": "assistant", "content": row[assistant]}))
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise fail('"messages" is no list, or empty')
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise fail(f'message {i + 1} lacks a string "role" or "content"')
        return Example(messages=tuple({"role": m["role"], "content": m["content"]} for m in messages))
    if isinstance(row.get("text"), str) and row["text"].strip():
        return Example(text=row["text"])
    raise fail(f"has the keys {', '.join(sorted(row)) or 'none'}, expected {_EXPECTED}")


def render_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an example, in the chat template if it is a conversation and the model has one."""
    if not example.messages:
        return example.text
    if not tokenizer.chat_template:
        return "\n".join(message["content"] for message in example.messages)
    try:
        return tokenizer.apply_chat_template(list(example.messages), tokenize=False)
    except Exception as error:  # a template is a program of the model's author, and may raise anything
        raise TacqError(f"The model's chat template refuses an example ({error}); use roles it knows, or a plain text file.") from error


def tokenize_task(task: Task, tokenizer: PreTrainedTokenizerBase, n_samples: int, seq_len: int) -> list[list[int]]:
    """Token lists of the first `n_samples` examples (or windows of a plain text), each at most `seq_len` long.

    Raises TacqError if no example has two tokens: there would be nothing to predict.
    """
    if task.packed:
        tokens = tokenizer(task.examples[0].text, verbose=False)["input_ids"]
        texts = [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)][:n_samples]
    else:
        texts = []
        for example in task.examples[:n_samples]:
            templated = bool(example.messages and tokenizer.chat_template)  # a template writes its own BOS
            text = render_example(example, tokenizer)
            texts.append(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"][:seq_len])
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise TacqError(f"The task '{task.name}' has no example of at least two tokens; give longer ones.")
    return texts


def gguf_tokenizer(gguf_path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template that a GGUF holds. Raises TacqError if transformers cannot read it."""
    from transformers import AutoTokenizer

    from .write_gguf import open_gguf

    open_gguf(gguf_path)
    path = Path(gguf_path).resolve()
    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise TacqError(f"transformers cannot read the tokenizer of {gguf_path} ({str(error).splitlines()[0]}); compare on plain text with --text.") from error


def tokenize_with_gguf(task: Task, gguf_path: Path | str, n_samples: int, seq_len: int) -> list[list[int]]:
    """`tokenize_task` with `gguf_tokenizer`."""
    return tokenize_task(task, gguf_tokenizer(gguf_path), n_samples, seq_len)
