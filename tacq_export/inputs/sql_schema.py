"""Text-to-SQL rows: a question, the CREATE TABLE text of its database, and the query that answers it."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import TacqError
from .task_files import read_text

SCHEMAS = "schemas.json"


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
