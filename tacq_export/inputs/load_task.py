"""The task file: examples in. tokenize_task.py makes token lists of them.

One object a line (JSONL), a JSON array, a table with a header (CSV, TSV) or Parquet, with one of these sets of keys:

    {"question": ..., "answer": ...}       a user turn and the assistant's
    {"prompt": ..., "completion": ...}     the same; or two lists of messages
    {"instruction": ..., "input": ..., "output": ...}    the same, as in Alpaca; input may be empty, "history" has
                                                         earlier pairs
    {"question": ..., "query": ..., "db_id": ...}    text to SQL, as in Spider
    {"messages": [{"role": ..., "content": ...}, ...]}
    {"conversations": [{"from": "human", "value": ...}, ...]}    the same, as in ShareGPT
    {"text": ...}                          taken as it is

Beside them, "system" is a system turn at the beginning and "tools" a list of what the assistant may call. A message may
have `tool_calls` and `content: null`, or a list of text parts; other keys of it are handed to the template, too.
`columns` says which columns of the file mean these keys.

A text-to-SQL row finds the CREATE TABLE text of its database in `schemas.json` beside the task file ({db_id: text}), or
brings it along under "schema". It becomes a user turn with schema and question, and the query as the assistant's.
Conversations go through the model's chat template; a model without one gets the turns joined by newlines. Any other
file is plain text, cut into windows of seq_len tokens.

`tacq-export answer` adds "tokens": {"vocabulary": ..., "answer": [...]}: what the model wrote, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import TacqError
from .sql_schema import SCHEMAS, sql_question
from .task_files import EXPECTED, Fail, PlainText, has_rows, read_rows

Message = dict[str, Any]
_PAIRS = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"))
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}


@dataclass(frozen=True)
class Example:
    """Either `messages` (a conversation, with the `tools` that may be called) or `text`.

    answer_tokens: the last turn as the model wrote it, ids of the vocabulary that `vocabulary` names
    (LlamaVocab.identity); empty if nothing is known of that. unused: keys of its row that are not read.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[Any, ...] = ()
    answer_tokens: tuple[int, ...] = ()
    vocabulary: str = ""
    unused: tuple[str, ...] = field(default=(), compare=False)

    @property
    def has_answer(self) -> bool:
        """True if it is a conversation with the assistant's turn at its end."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True)
class Task:
    """name: file name without ending. Either `examples`, or one plain `text` that is to be cut into windows."""

    name: str
    examples: list[Example]
    text: PlainText | None = None

    @property
    def packed(self) -> bool:
        """True if it is one plain text to be cut into windows."""
        return self.text is not None

    @property
    def unused(self) -> list[str]:
        """Keys of its rows that are not read, in alphabetical order."""
        return sorted({key for example in self.examples for key in example.unused})


def load_task(path: Path, columns: Mapping[str, str] | None = None, limit: int | None = None) -> Task:
    """Read a task file, or its first `limit` rows. columns: {key that is expected: column of the file}.

    Raises TacqError, with the row's number where there is one, if it is missing, empty or malformed.
    """
    if not has_rows(path):
        if columns:
            raise TacqError(f"{path} is plain text and has no columns; leave --columns out, or give a file of rows.")
        text = PlainText(path)
        text.head(1)  # refuses what cannot be read or is empty
        return Task(path.stem, [], text)
    examples = [parse_row(row, path, fail) for row, fail in islice(read_rows(path, columns), limit)]
    if not examples:
        raise TacqError(f"{path} is empty; put at least one example into it.")
    return Task(path.stem, examples)


def parse_row(row: Mapping[str, Any], path: Path, fail: Fail) -> Example:
    """The example in one row of the task file `path`. Raises what `fail` makes for a row of no known set of keys."""
    used = {"system", "tools", "tokens"}
    if isinstance(row.get("functions"), list) and row["functions"]:
        raise fail('"functions" is the old form of "tools", which the chat templates do not know; write tools')
    if "question" in row and "query" in row and "answer" not in row:
        used |= {"question", "query", "schema", "db_id"}
        messages: Sequence[Message] = sql_question(dict(row), path.parent / SCHEMAS, fail).messages
    elif pair := _pair_of(row):
        used |= {*pair, "history"} | ({"input"} if pair[0] == "instruction" else set())
        messages = _pair_messages(row, pair, fail)
    elif row.get("messages") is not None or "messages" in row and "conversations" not in row:
        used.add("messages")
        messages = _messages(row["messages"], "messages", fail)
    elif "conversations" in row:
        used.add("conversations")
        messages = _share_gpt(row["conversations"], fail)
    elif isinstance(row.get("text"), str) and row["text"].strip():
        unused = tuple(key for key in row if key != "text")
        return Example(text=row["text"], unused=unused)
    else:
        raise fail(f"has the keys {', '.join(sorted(map(str, row))) or 'none'}, expected {EXPECTED}")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    answer, vocabulary = _answer_tokens(row.get("tokens"), messages, fail)
    unused = tuple(str(key) for key in row if key not in used)
    return Example(tuple(messages), "", _tools(row.get("tools"), fail), answer, vocabulary, unused)


def _pair_of(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of question and answer in a row; of one alone, if nothing else in the row is a conversation."""
    both = next((pair for pair in _PAIRS if pair[0] in row and pair[1] in row), None)
    if both or "messages" in row or "conversations" in row:
        return both
    return next((pair for pair in _PAIRS if pair[0] in row or pair[1] in row), None)


def _pair_messages(row: Mapping[str, Any], pair: tuple[str, str], fail: Fail) -> list[Message]:
    user, assistant = pair
    if isinstance(row.get(user), list) and isinstance(row.get(assistant), list):
        return [*_messages(row[user], user, fail), *_messages(row[assistant], assistant, fail)]
    for key in pair:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise fail(f'"{key}" is missing, empty or no string; {user} and {assistant} go together')
    messages = []
    for turn in row.get("history") or ():
        if not isinstance(turn, Sequence) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise fail('"history" is no list of pairs of a question and its answer')
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked, more = row[user], row.get("input") if user == "instruction" else None
    if isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": row[assistant]}]


def _messages(messages: Any, key: str, fail: Fail) -> list[Message]:
    """Checked messages. Nothing is taken out of them: what their keys mean is the template's affair."""
    messages = _json(messages)
    if not isinstance(messages, list) or not messages:
        raise fail(f'"{key}" is no list, or empty')
    return [_message(number, message, fail) for number, message in enumerate(messages, 1)]


def _message(number: int, message: Any, fail: Fail) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise fail(f'message {number} lacks a string "role" or "content"')
    if message.get("function_call"):
        raise fail(
            f'message {number} has a "function_call", the old form that chat templates do not know; write tool_calls'
        )
    message = dict(message)
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _tool_calls(number, _json(message["tool_calls"]), fail)
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise fail(
                    f"message {number} has a part of the type '{kind}', expected parts of text: "
                    '{"type": "text", "text": ...}'
                )
    elif content is None:
        said = any(message.get(key) for key in ("tool_calls", "reasoning_content", "thinking", "reasoning"))
        if message["role"] != "assistant" or not said:
            raise fail(f'message {number} lacks a string "role" or "content"')
    elif not isinstance(content, str):
        raise fail(f'message {number} lacks a string "role" or "content"')
    return message


def _tool_calls(number: int, calls: Any, fail: Fail) -> list[Any]:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise fail(
                f'message {number} has "tool_calls" that are no list of '
                '{"type": "function", "function": {"name": ..., "arguments": ...}}'
            )
    return list(calls)


def _share_gpt(turns: Any, fail: Fail) -> list[Message]:
    """Messages of ShareGPT's {"from", "value"} turns; turns with "role" and "content" are messages already."""
    turns = _json(turns)
    if not isinstance(turns, list) or not turns:
        raise fail('"conversations" is no list, or empty')
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return _messages(turns, "conversations", fail)
    messages = []
    for number, turn in enumerate(turns, 1):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("from"), str)
            or not isinstance(turn.get("value"), str)
        ):
            raise fail(f'turn {number} of "conversations" lacks a string "from" or "value"')
        role = _ROLES.get(turn["from"].lower())
        if role is None:
            raise fail(f"turn {number} is from '{turn['from']}', expected one of: {', '.join(_ROLES)}")
        if role == "function_call":
            call = _json(turn["value"])
            calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        else:
            message = {"role": role, "content": turn["value"]}
        messages.append(_message(number, message, fail))
    return messages


def _tools(tools: Any, fail: Fail) -> tuple[Any, ...]:
    tools = _json(tools)
    if tools is None or tools == "":
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise fail('"tools" is no list of {"type": "function", "function": {...}}')
    return tuple(tools)


def _answer_tokens(tokens: Any, messages: Sequence[Message], fail: Fail) -> tuple[tuple[int, ...], str]:
    """(ids of the last turn, the vocabulary's name) of a row that `tacq-export answer` wrote, else ((), "")."""
    if not isinstance(tokens, dict) or not {"answer", "vocabulary"} <= tokens.keys():
        return (), ""
    answer, vocabulary = tokens["answer"], tokens["vocabulary"]
    if (
        not isinstance(answer, list)
        or not answer
        or not all(isinstance(token, int) for token in answer)
        or not isinstance(vocabulary, str)
        or messages[-1]["role"] != "assistant"
    ):
        raise fail('"tokens" is not as tacq-export answer writes it; delete it, and the text is taken instead')
    return tuple(answer), vocabulary


def _json(value: Any) -> Any:
    """What a cell of a table holds as JSON; what is no such string is given back."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
