"""Task files, read: the rows of JSONL, JSON, CSV, TSV and Parquet, and the beginning of a plain text.

A row is a dict; with each comes the function that makes an error naming the row. What the keys mean stands in
load_task.py.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TacqError

JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
TABLE_ENDINGS = (".csv", ".tsv", ".parquet")
Row = dict[str, Any]
Fail = Callable[[str], TacqError]


def read_text(path: Path) -> str:
    """The whole of a text file. Raises TacqError for one that cannot be read, is not UTF-8, or empty."""
    return PlainText(path).head(None)


@dataclass(frozen=True)
class PlainText:
    """A text file that is read from its beginning, as far as asked for."""

    path: Path

    def head(self, n: int | None) -> str:
        """Its first n characters, fewer where it ends; all for None. Line ends become a newline.

        Raises TacqError if it cannot be read, is not UTF-8 as far as it is read, or holds nothing.
        """
        with _opened(self.path) as file:
            text = _decoded(self.path, lambda: file.read(n if n is not None else -1))
            rest = text
            while rest and rest.isspace():  # is there anything behind them?
                rest = _decoded(self.path, lambda: file.read(1 << 16))
        if not rest:
            raise TacqError(f"{self.path} is empty; put at least one example into it.")
        return text


def _opened(path: Path, newline: str | None = None) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise TacqError(f"{path} cannot be read ({error.strerror}); give a JSONL or text file.") from None


def _decoded(path: Path, read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError:
        place = ""
        try:
            path.read_bytes().decode("utf-8-sig")  # the reader knows its own buffer only
        except UnicodeDecodeError as error:
            place = f" (byte {error.start})"
        raise TacqError(f"{path} is not UTF-8 text{place}; save it as UTF-8.") from None
    except OSError as error:
        raise TacqError(f"{path} cannot be read ({error.strerror}); give a JSONL or text file.") from None


def has_rows(path: Path) -> bool:
    """Whether a task file holds rows; any other is plain text."""
    return path.suffix.lower() in JSON_ENDINGS + TABLE_ENDINGS


def read_rows(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[tuple[Row, Fail]]:
    """Each row of a task file, with the function that makes an error naming it.

    columns: {key: column of the file}; then a row has these keys alone. Raises TacqError, with the row's number where
    there is one, for a file that cannot be read or a row that is none; reading goes only as far as rows are taken.
    """
    ending = path.suffix.lower()
    rows = json_rows(path) if ending in JSON_ENDINGS else _parquet_rows(path) if ending == ".parquet" else _csv(path)
    for row, fail in rows:
        yield (_renamed(row, columns, fail) if columns else row), fail


def _renamed(row: Row, columns: Mapping[str, str], fail: Fail) -> Row:
    for column in columns.values():
        if column not in row:
            raise fail(f"has no column '{column}', which --columns names; it has {', '.join(map(str, row)) or 'none'}")
    return {key: row[column] for key, column in columns.items()}


def _failing(path: Path, what: str, number: int) -> Fail:
    return lambda text: TacqError(f"{path}, {what} {number}: {text}.")


def json_rows(path: Path) -> Iterator[tuple[Row, Fail]]:
    """Each object of a JSONL file, of a JSON array, or the one object of a .json file."""
    with _opened(path) as file:
        first = _decoded(path, lambda: file.read(1 << 16)).lstrip()
    if first.startswith("["):
        rows = _whole(path)
        if isinstance(rows, list):
            for number, row in enumerate(rows, 1):
                yield _checked(row, fail := _failing(path, "example", number)), fail
            return
    elif path.suffix.lower() == ".json" and first.startswith("{") and isinstance(row := _whole(path), dict):
        yield _checked(row, fail := _failing(path, "example", 1)), fail
        return
    with _opened(path) as file:
        number = 0
        while line := _decoded(path, file.readline):  # its lines end at \n alone: JSON strings may hold U+2028
            number += 1
            if line.strip():
                fail = _failing(path, "line", number)
                yield _checked(_parsed(line.rstrip("\n"), fail), fail), fail


def _parsed(line: str, fail: Fail) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise fail(f"not valid JSON ({error.msg} at column {error.colno}); each line must be one JSON object") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise fail(f"not valid JSON ({str(error)[:120]}); each line must be one JSON object") from None


def _whole(path: Path) -> Any:
    """The file as one JSON value; None if it is several, one a line. Raises TacqError for an array that is none."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" or path.suffix.lower() != ".json":
            return None
        fail = _failing(path, "line", error.lineno)
        raise fail(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise TacqError(f"{path}: not valid JSON ({str(error)[:120]}); give an array of objects.") from None


def _checked(row: Any, fail: Fail) -> Row:
    if not isinstance(row, dict):
        raise fail(f"a JSON {type(row).__name__}, expected an object with {EXPECTED}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # half a surrogate pair is legal JSON, and no text
        raise fail(f"not valid JSON ({str(error)[:120]}); each line must be one JSON object") from None
    return row


EXPECTED = (
    '"question" and "answer", "prompt" and "completion", "question" and "query", "instruction" and "output", '
    '"messages", "conversations", or "text"; --columns says which columns mean these'
)


def _csv(path: Path) -> Iterator[tuple[Row, Fail]]:
    """Rows of a table with a header, the fields divided by commas, or by tabs in a .tsv."""
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # 131,072 characters unless raised
    with _opened(path, newline="") as file:
        lines = iter(lambda: _decoded(path, file.readline), "")
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = reader.fieldnames or []
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise TacqError(f"{path} has two columns of the name '{twice}'; give each its own.")
            for row in reader:
                fail = _failing(path, "line", reader.line_num)
                if None in row or None in row.values():
                    found = len(header) + len(row.get(None, ())) - sum(value is None for value in row.values())
                    raise fail(f"has {found} fields, and the header {len(header)}")
                yield row, fail
        except csv.Error as error:
            raise TacqError(
                f"{path}, line {reader.reader.line_num}: no row of a table ({error}); correct it."
            ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[Row, Fail]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TacqError(
            f"{path} needs pyarrow to be read, which is not installed; run 'pip install pyarrow', or save it as JSONL."
        ) from None
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield row, _failing(path, "row", number)
    except (pyarrow.ArrowException, OSError) as error:
        raise TacqError(f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:200]}).") from None
