"""The task file: examples in, token lists out.

JSONL, one object a line, with one of these sets of keys:

    {"question": ..., "answer": ...}       a user turn and the assistant's
    {"prompt": ..., "completion": ...}     the same
    {"question": ..., "query": ..., "db_id": ...}    text to SQL, as in Spider
    {"messages": [{"role": ..., "content": ...}, ...]}
    {"text": ...}                          taken as it is

A text-to-SQL row finds the CREATE TABLE text of its database in `schemas.json` beside the task file ({db_id: text}), or
brings it along under "schema". It becomes a user turn with schema and question, and the query as the assistant's.
Conversations go through the model's chat template; a model without one gets the turns joined by newlines. Any other
file is plain text, cut into windows of seq_len tokens.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TacqError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PAIRS = (("question", "answer"), ("prompt", "completion"))
_EXPECTED = '"question" and "answer", "prompt" and "completion", "question" and "query", "messages", or "text"'
SCHEMAS = "schemas.json"


@dataclass(frozen=True)
class Example:
    """Either `messages` (a conversation) or `text`."""

    messages: tuple[dict[str, str], ...] = ()
    text: str = ""

    @property
    def has_answer(self) -> bool:
        """True if it is a conversation with the assistant's turn at its end."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True)
class Task:
    """name: file name without ending. packed: True if `examples` is one plain text to be cut into windows."""

    name: str
    examples: list[Example]
    packed: bool


@dataclass(frozen=True)
class SqlQuestion:
    """schema: CREATE TABLE text as it was given; question: in words; query: the SQL that answers it."""

    schema: str
    question: str
    query: str

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """The conversation: what is calibrated on, and (without its last turn) what a model is asked when it is
        scored."""
        # The schema comes first, so that questions on one database share the beginning of the prompt.
        user = (
            f"{compact_schema(self.schema)}\n\nQuestion: {self.question.strip()}\nAnswer with one SQLite query in "
            "a ```sql block, nothing else."
        )
        return (
            {"role": "user", "content": user},
            {"role": "assistant", "content": f"```sql\n{tidy_query(self.query)}\n```"},
        )


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
    """Read a task file. Raises TacqError, with the line's number where there is one, if it is missing, empty or
    malformed."""
    content = read_text(path)
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        return Task(path.stem, [Example(text=content)], packed=True)
    examples = [parse_row(row, path, fail) for row, fail in json_rows(path, content)]
    return Task(path.stem, examples, packed=False)


def json_rows(path: Path, content: str) -> Iterator[tuple[dict, Callable[[str], TacqError]]]:
    """Each object of a JSONL file, with the function that makes an error naming its line. Raises such an error for
    others."""
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines(): JSON strings may hold U+2028
        if not line.strip():
            continue

        def fail(what: str, number: int = number) -> TacqError:
            return TacqError(f"{path}, line {number}: {what}.")

        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is legal JSON, and no text
        except json.JSONDecodeError as error:
            raise fail(
                f"not valid JSON ({error.msg} at column {error.colno}); each line must be one JSON object"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise fail(f"not valid JSON ({str(error)[:120]}); each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise fail(f"a JSON {type(row).__name__}, expected an object with {_EXPECTED}")
        yield row, fail


def parse_row(row: dict, path: Path, fail: Callable[[str], TacqError]) -> Example:
    """The example in one row of the task file `path`. Raises what `fail` makes for a row of no known set of keys."""
    if "question" in row and "query" in row and "answer" not in row:
        return Example(messages=sql_question(row, path.parent / SCHEMAS, fail).messages)
    for user, assistant in _PAIRS:
        if user in row or assistant in row:
            for key in (user, assistant):
                if not isinstance(row.get(key), str) or not row[key].strip():
                    raise fail(f'"{key}" is missing, empty or no string; {user} and {assistant} go together')
            return Example(
                messages=({"role": "user", "content": row[user]}, {"role": "assistant", "content": row[assistant]})
            )
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise fail('"messages" is no list, or empty')
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise fail(f'message {i + 1} lacks a string "role" or "content"')
        return Example(messages=tuple({"role": m["role"], "content": m["content"]} for m in messages))
    if isinstance(row.get("text"), str) and row["text"].strip():
        return Example(text=row["text"])
    raise fail(f"has the keys {', '.join(sorted(row)) or 'none'}, expected {_EXPECTED}")


def sql_question(row: dict, schemas_path: Path, fail: Callable[[str], TacqError]) -> SqlQuestion:
    """A text-to-SQL row with its schema, its own or that of its db_id. Raises TacqError if there is none."""
    for key in ("question", "query"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise fail(f'"{key}" is missing, empty or no string; question and query go together')
    schema = row.get("schema")
    if schema is None:
        if not isinstance(row.get("db_id"), str):
            raise fail(
                'neither a "schema" nor a "db_id" says which database is asked; give the CREATE TABLE text, or its '
                f"name in {SCHEMAS}"
            )
        schemas = read_schemas(schemas_path)
        if row["db_id"] not in schemas:
            raise fail(
                f"{schemas_path} has no database {row['db_id']!r}; add its CREATE TABLE text there, or to the row as "
                '"schema"'
            )
        schema = schemas[row["db_id"]]
    if not isinstance(schema, str) or not schema.strip():
        raise fail('"schema" is empty or no string; give the CREATE TABLE text of the database')
    return SqlQuestion(schema, row["question"], row["query"])


def read_schemas(path: Path) -> dict[str, str]:
    """{db_id: CREATE TABLE text}. Raises TacqError if the file is missing or holds anything else."""
    if not path.is_file():
        raise TacqError(
            f'There is no {path}; put the CREATE TABLE texts there as {{"db_id": "CREATE TABLE ..."}}, or into each '
            'row as "schema".'
        )
    return _parse_schemas(path, path.stat().st_mtime_ns)


@cache  # a task file asks once a line
def _parse_schemas(path: Path, _modified: int) -> dict[str, str]:
    try:
        schemas = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise TacqError(
            f"{path} is not valid JSON ({str(error)[:120]}); it must be one object of db_id and CREATE TABLE text."
        ) from None
    if not isinstance(schemas, dict) or not all(isinstance(schema, str) for schema in schemas.values()):
        raise TacqError(f"{path} is no JSON object of db_id and CREATE TABLE text; write it so.")
    return schemas


def compact_schema(schema: str) -> str:
    """CREATE TABLE text with one line a table, and without the quotes that no name needs.

    Text that SQLite refuses without the quotes keeps them.
    """
    spaced = re.sub(r"\s+", " ", schema.strip())
    spaced = re.sub(r"\( ", "(", re.sub(r" ([,;)])", r"\1", spaced)).replace("; CREATE", ";\nCREATE")
    bare = re.sub(r'"([A-Za-z_][A-Za-z0-9_]*)"', r"\1", spaced)
    for text in (bare, spaced):
        database = sqlite3.connect(":memory:")
        try:
            database.executescript(text)
            return text
        except sqlite3.Error:
            pass
        finally:
            database.close()
    return schema.strip()


def tidy_query(query: str) -> str:
    """SQL with single spaces and none before a comma, outside quotes: Spider's `a ,  b  =  1` as a model would write
    it."""
    parts = re.split(r"""('(?:[^']|'')*'|"(?:[^"]|"")*")""", query.strip())
    parts[::2] = [
        re.sub(r"\s+([,;)])", r"\1", re.sub(r"(\() +", r"\1", re.sub(r"\s+", " ", part))) for part in parts[::2]
    ]
    return "".join(parts)


def render_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an example, in the chat template if it is a conversation and the model has one."""
    if not example.messages:
        return example.text
    if not tokenizer.chat_template:
        return "\n".join(message["content"] for message in example.messages)
    try:
        return tokenizer.apply_chat_template(list(example.messages), tokenize=False)
    except Exception as error:  # a template is a program of the model's author, and may raise anything
        raise TacqError(
            f"The model's chat template refuses an example ({error}); use roles it knows, or a plain text file."
        ) from error


def prompt_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a conversation up to where the assistant's last turn begins: what a model is asked, in calibration's
    template.

    Without a template it is the turns before, each ended by a newline. Raises TacqError if there is no such turn.
    """
    if not example.has_answer:
        raise TacqError(
            "The example has no assistant's turn at its end to compare an answer with; give question and answer."
        )
    before = list(example.messages[:-1])
    if not tokenizer.chat_template:
        return tokenizer("".join(message["content"] + "\n" for message in before), verbose=False)["input_ids"]
    try:
        text = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise TacqError(f"The model's chat template refuses an example ({error}); use roles it knows.") from error
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def tokenize_task(task: Task, tokenizer: PreTrainedTokenizerBase, n_samples: int, seq_len: int) -> list[list[int]]:
    """Token lists of the first `n_samples` examples (or windows of a plain text), each at most `seq_len` long.

    Raises TacqError if no example has two tokens: there would be nothing to predict.
    """
    if task.packed:
        tokens = tokenizer(task.examples[0].text, verbose=False)["input_ids"]
        texts = [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)][:n_samples]
    else:
        texts = [example_tokens(example, tokenizer)[:seq_len] for example in task.examples[:n_samples]]
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise TacqError(f"The task '{task.name}' has no example of at least two tokens; give longer ones.")
    return texts


def example_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens of an example."""
    templated = bool(example.messages and tokenizer.chat_template)  # a template writes its own BOS
    return tokenizer(render_example(example, tokenizer), add_special_tokens=not templated, verbose=False)["input_ids"]


def require_answers(task: Task, n_samples: int) -> None:
    """Raises TacqError if one of the first `n_samples` examples has no assistant's turn at its end."""
    for number, example in enumerate(task.examples[:n_samples], 1):
        if task.packed or not example.has_answer:
            raise TacqError(
                f"Example {number} of the task '{task.name}' has no assistant's turn at its end; use --loss text."
            )


def tokenize_answers(
    task: Task, tokenizer: PreTrainedTokenizerBase, n_samples: int, seq_len: int
) -> tuple[list[list[int]], list[int]]:
    """`tokenize_task`, and of each text the index of the first token of the answer; examples that `seq_len` cuts before
    it are left out.

    Raises TacqError for an example without an assistant's turn at its end, or if no answer is left.
    """
    require_answers(task, n_samples)
    texts, begins = [], []
    for example in task.examples[:n_samples]:
        tokens, prompt = example_tokens(example, tokenizer)[:seq_len], prompt_tokens(example, tokenizer)
        # As many tokens as both have in common: a tokenizer may join the prompt's last one to the answer's first.
        begin = next(
            (i for i, (one, other) in enumerate(zip(tokens, prompt, strict=False)) if one != other),
            min(len(tokens), len(prompt)),
        )
        if 0 < begin < len(tokens):
            texts.append(tokens)
            begins.append(begin)
    if not texts:
        raise TacqError(f"No answer of the task '{task.name}' begins within {seq_len} tokens; give a larger --seq-len.")
    return texts, begins


def tokenize_for_loss(
    loss: str, task: Task, tokenizer: PreTrainedTokenizerBase, n_samples: int, seq_len: int
) -> tuple[list[list[int]], list[int] | None]:
    """Texts, and of each the first token whose loss counts: None (all count) for the loss "text", where the answers
    begin for "answer".

    Raises TacqError as `tokenize_task` and `tokenize_answers` do.
    """
    if loss == "answer":
        return tokenize_answers(task, tokenizer, n_samples, seq_len)
    return tokenize_task(task, tokenizer, n_samples, seq_len), None


def gguf_tokenizer(gguf_path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template that a GGUF holds. Raises TacqError if transformers cannot read it."""
    from transformers import AutoTokenizer

    from ..format.gguf_file import open_gguf

    open_gguf(gguf_path)
    path = Path(gguf_path).resolve()
    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise TacqError(
            f"transformers cannot read the tokenizer of {gguf_path} ({str(error).splitlines()[0]}); compare on plain "
            "text with --text."
        ) from error
