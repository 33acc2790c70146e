"""Spider's execution match: a model's SQL is right if it returns what the gold query returns, on every one of several
databases.

The databases are generated (spider_databases.py), five for each gold query. The rules are those of the test-suite
evaluation (Zhong et al. 2020, arXiv 2010.02840): rows as a multiset, in order where the gold query orders them; columns
may be permuted, the same way on every database. Beyond it, rows that tie in the gold query's ORDER BY may come in any
order, and numbers that a query returns as text count as numbers.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

from ..errors import TacqError
from ..inputs.load_task import Example
from ..inputs.sql_schema import SCHEMAS, sql_question
from ..inputs.task_files import read_rows
from ..inputs.tokenizer import ModelTokenizer
from .score_task import TaskScore, score_answers
from .spider_databases import fill_database, read_tables, tokens_of

FILLINGS = 5
SPIDER_TOKENS = 160  # of an answer
_TRIES = 40  # seeds that are looked at for them
# A query may run this many steps of SQLite's machine (about a second) and return this many rows. Steps, not seconds, so
# that the score does not depend on how busy the machine is.
_MOST_STEPS = 20_000_000
_MOST_ROWS = 20_000
_MOST_BYTES = 1_000_000
_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    getattr(sqlite3, "SQLITE_RECURSIVE", 33),
}
_SET_OPERATORS = {"union", "intersect", "except"}

Row = tuple


@dataclass(frozen=True)
class Filling:
    """A database and the gold query's result on it: groups of rows, in order; within a group (a tie, or a result that
    has no order) any order is right. last: how many rows of the last group belong to the result, fewer if LIMIT cuts a
    tie."""

    database: sqlite3.Connection
    groups: list[list[Row]]
    last: int
    ambiguous: bool

    @property
    def telling(self) -> bool:
        """Whether the result says something: neither nothing, nor a single row of zeros."""
        rows = [row for group in self.groups for row in group]
        return len(rows) > 1 or any(value not in (0, None) for row in rows for value in row)


def extract_sql(answer: str) -> str:
    """The SQL in a model's answer: the first fenced block that has a query, else from the first SELECT or WITH on;
    without what follows its first semicolon. "" if there is none."""
    start = re.compile(r"\bselect\b|\bwith\s+(?:recursive\s+)?\w+\s*(?:\([^)]*\)\s*)?as\b", re.I)
    for block in re.findall(r"```[ \t]*\w*\s*\n?(.*?)(?:```|\Z)", answer, re.S):
        if found := start.search(block):
            text = block[found.start() :]
            break
    else:
        if not (found := start.search(answer)):
            return ""
        text = re.split(r"\n\s*\n|```", answer[found.start() :])[0]
    end = next((offset for token, offset in tokens_of(text) if token == ";"), len(text))
    return text[:end].strip()


def run_query(database: sqlite3.Connection, query: str) -> list[Row]:
    """Rows of one query that only reads. Raises sqlite3.Error if it fails, writes, or takes too many steps, rows or
    bytes."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 10_000
        return steps > _MOST_STEPS

    if hasattr(database, "setlimit"):  # Python 3.11
        database.setlimit(getattr(sqlite3, "SQLITE_LIMIT_LENGTH"), _MOST_BYTES)  # noqa: B009
    database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY)
    database.set_progress_handler(count, 10_000)
    try:
        rows = database.execute(query).fetchmany(_MOST_ROWS + 1)
    except (
        sqlite3.Warning,
        ValueError,
        UnicodeError,
        OverflowError,
        MemoryError,
    ) as error:  # two statements, a zero byte, bytes that are no UTF-8
        raise sqlite3.OperationalError(str(error)) from None
    finally:
        database.set_progress_handler(None, 0)
        # None takes the authorizer away in Python 3.11 only; before, it denies all.
        database.set_authorizer(lambda *_: sqlite3.SQLITE_OK)
    if len(rows) > _MOST_ROWS:
        raise sqlite3.OperationalError(f"more than {_MOST_ROWS} rows")
    return [tuple(map(_canonical, row)) for row in rows]


def _canonical(value: object) -> object:
    """A value that equals those that mean the same: 3, 3.0 and '3'; sums of floats up to rounding."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,15}(\.\d+)?", value):
        value = float(value)
    if isinstance(value, float) and value == value and abs(value) < 1e15:
        value = float(f"{value:.9g}") if value != int(value) else int(value)
    return value


@dataclass(frozen=True)
class _Order:
    """A query's top-level ORDER BY: `keyed` is the query without LIMIT and with the sort keys as further columns."""

    keyed: str
    keys: int
    limit: int | None
    offset: int


def _order_of(query: str) -> _Order | None:
    """None: no ORDER BY at the top level, or one that cannot be taken apart (set operators, DISTINCT)."""
    top, depth = [], 0
    for token, offset in tokens_of(query):
        depth -= token == ")"
        if depth == 0:
            top.append((token.lower(), offset))
        depth += token == "("
    words = [word for word, _ in top]
    if (
        "order" not in words
        or words[0] != "select"
        or words[1] == "distinct"
        or _SET_OPERATORS & set(words)
        or "from" not in words
    ):
        return None
    at = {word: top[words.index(word)][1] for word in ("from", "order")}
    end = next((offset for word, offset in top if word in ("limit", ";") and offset > at["order"]), len(query))
    numbers = re.match(r"limit\s+(\d+)(?:\s+offset\s+(\d+))?\s*;?\s*$", query[end:], re.I)
    if end < len(query) and query[end] != ";" and not numbers:
        return None
    commas = [offset for word, offset in top if word == "," and at["order"] < offset < end]
    by = re.match(r"order\s+by", query[at["order"] :], re.I)
    if not by:
        return None
    begin = at["order"] + by.end()
    keys = [query[a:b] for a, b in zip([begin, *(c + 1 for c in commas)], [*commas, end], strict=False)]
    keys = [re.sub(r"\s+(asc|desc)\s*$", "", key.rstrip(), flags=re.I).strip() for key in keys]
    if any(re.fullmatch(r"\d+", key) for key in keys):
        return None
    columns = "".join(f", ({key})" for key in keys)
    keyed = f"{query[: at['from']].rstrip()} {columns} {query[at['from'] : end]}"
    limit, offset = (int(numbers[1]), int(numbers[2] or 0)) if numbers else (None, 0)
    return _Order(keyed, len(keys), limit, offset)


def _is_ordered(query: str) -> bool:
    depth = 0
    for token, _ in tokens_of(query):
        depth += (token == "(") - (token == ")")
        if depth == 0 and token.lower() == "order":
            return True
    return False


def expected_result(database: sqlite3.Connection, query: str) -> Filling:
    """Run a gold query. The result is ambiguous if LIMIT cuts through rows that tie, or a scan in the other direction
    changes it: then an equivalent query may return something else. Raises sqlite3.Error if the query fails."""
    rows = run_query(database, query)
    ambiguous = _turned(database, query) != Counter(rows) or any(
        _cuts_tie(database, inner) for inner in _subqueries(query)
    )
    if not _is_ordered(query):
        return Filling(database, [rows], len(rows), ambiguous)
    order = _order_of(query)
    if order:
        try:
            keyed = run_query(database, order.keyed)
        except sqlite3.Error:  # ORDER BY an alias of the SELECT list
            return Filling(database, [[row] for row in rows], 1, ambiguous)
        groups: list[list[Row]] = []
        end = len(keyed) if order.limit is None else order.offset + order.limit
        last, previous = 0, None
        for i, row in enumerate(keyed):
            values, key = row[: -order.keys], row[-order.keys :]
            if i < order.offset or (i >= end and key != previous):
                previous = key
                if i >= end:
                    break
                continue
            if not groups or key != previous:
                groups.append([])
                last = 0
            groups[-1].append(values)
            last += i < end
            previous = key
        if Counter(row for group in groups for row in group) >= Counter(rows):
            return Filling(
                database,
                groups,
                last,
                ambiguous or (bool(groups) and len(set(groups[-1])) > 1 and last < len(groups[-1])),
            )
    return Filling(database, [[row] for row in rows], 1, ambiguous)


def _turned(database: sqlite3.Connection, query: str) -> Counter:
    database.execute("PRAGMA reverse_unordered_selects = ON")
    try:
        return Counter(run_query(database, query))
    finally:
        database.execute("PRAGMA reverse_unordered_selects = OFF")


def _subqueries(query: str) -> list[str]:
    """The parenthesised SELECTs of a query, and itself."""
    found, opened = [query], []
    for token, offset in tokens_of(query):
        if token == "(":
            opened.append(offset + 1)
        elif token == ")" and opened:
            inner = query[opened.pop() : offset].strip()
            if inner[:6].lower() == "select":
                found.append(inner)
    return found


def _cuts_tie(database: sqlite3.Connection, query: str) -> bool:
    order = _order_of(query)
    if not order or order.limit is None:
        return False
    try:
        rows = run_query(database, order.keyed)
    except sqlite3.Error:  # it refers to the query around it
        return False
    end = order.offset + order.limit
    return (
        0 < end < len(rows) and rows[end - 1][-order.keys :] == rows[end][-order.keys :] and rows[end - 1] != rows[end]
    )


def choose_fillings(schema: str, query: str, count: int = FILLINGS) -> list[Filling]:
    """`count` databases for a gold query: of the first seeds those on which its result says something and is not
    ambiguous, no two results alike while there is a choice. Always the same ones.

    Raises TacqError if the gold query does not run.
    """
    tables = read_tables(schema)
    ways = [True] + [False] * any(table.is_unique(key) for table in tables.values() for key in table.foreign_keys)
    best: list[tuple[tuple[bool, bool, bool], Filling]] = []
    seen: set[str] = set()
    for keys, seed in product(ways, range(_TRIES)):
        database = fill_database(tables, query, seed, keys)
        try:
            filling = expected_result(database, query)
        except sqlite3.Error as error:
            raise TacqError(
                f"The gold query does not run ({error}): {query[:200]}; correct it, or the schema."
            ) from None
        result = repr(filling.groups)
        best.append(((filling.ambiguous, not filling.telling, result in seen), filling))
        seen.add(result)
        if sum(not any(faults) for faults, _ in best) >= count:
            break
    best.sort(key=lambda entry: entry[0])
    for _, filling in best[count:]:
        filling.database.close()
    return [filling for _, filling in best[:count]]


def matches(fillings: Sequence[Filling], query: str) -> bool:
    """Whether a query returns the gold query's result on every filling, under one permutation of its columns."""
    results = []
    for filling in fillings:
        try:
            rows = run_query(filling.database, query)
        except sqlite3.Error:
            return False
        if len(rows) != sum(map(len, filling.groups[:-1])) + filling.last:
            return False
        results.append(rows)
    widths = {len(row) for rows in results for row in rows} | {
        len(row) for f in fillings for group in f.groups for row in group
    }
    if not widths:
        return True  # nothing on every filling, and nothing expected
    if len(widths) > 1:
        return False
    width = widths.pop()
    cut = any(filling.groups and filling.last < len(filling.groups[-1]) for filling in fillings)

    def possible(own: int, gold: int) -> bool:
        """Whether the answer's column `own` can be the gold query's column `gold`."""
        if cut:
            return True
        return all(
            Counter(row[own] for row in rows) == Counter(row[gold] for group in filling.groups for row in group)
            for rows, filling in zip(results, fillings, strict=False)
        )

    candidates = [[own for own in range(width) if possible(own, gold)] for gold in range(width)]
    return any(
        all(
            _same(f, [tuple(row[i] for i in order) for row in rows]) for rows, f in zip(results, fillings, strict=False)
        )
        for order in _orders(candidates)
    )


def _orders(candidates: list[list[int]], chosen: tuple[int, ...] = ()):
    """Permutations that take each column from its candidates; the first thousand, the order as given among the
    first."""
    if len(chosen) < len(candidates):
        steps = sorted(set(candidates[len(chosen)]) - set(chosen))
        yield from islice((order for step in steps for order in _orders(candidates, (*chosen, step))), 1000)
    else:
        yield chosen


def _same(filling: Filling, rows: list[Row]) -> bool:
    begin = 0
    for number, group in enumerate(filling.groups):
        size = filling.last if number == len(filling.groups) - 1 else len(group)
        if not Counter(rows[begin : begin + size]) <= Counter(group):
            return False
        begin += size
    return True


def score_spider(
    file: Path | str,
    eval_path: Path | str,
    schemas_path: Path | str | None,
    n: int,
    tokenizer: ModelTokenizer,
    threads: int | None = None,
    n_predict: int = SPIDER_TOKENS,
    # Slots that keep a database's schema from one question to the next: more of them would each read it again.
    parallel: int = 8,
    progress: Callable[[int, int], None] | None = None,
    backend: str = "cpu",
    first: int = 0,
) -> TaskScore:
    """Execution match of n text-to-SQL rows, from number `first` on: the prompt is the user turn that calibration has,
    greedy.

    schemas_path: {db_id: CREATE TABLE text}; None: schemas.json beside eval_path. tokenizer: that of the reference.
    Raises TacqError for a malformed file or a gold query that does not run, and as `generate` does.
    """
    path = Path(eval_path)
    schemas = Path(schemas_path) if schemas_path else path.parent / SCHEMAS
    questions = [sql_question(row, schemas, fail) for row, fail in islice(read_rows(path), first, first + n)]

    def right(i: int, answer: str) -> bool:
        fillings = choose_fillings(questions[i].schema, questions[i].query)
        try:
            return matches(fillings, extract_sql(answer))
        finally:
            for filling in fillings:
                filling.database.close()

    examples = [Example(messages=question.messages) for question in questions]
    # The model stops where its first query ends: what it would say afterwards is not looked at.
    return score_answers(
        file,
        examples,
        right,
        tokenizer,
        threads,
        n_predict,
        parallel,
        ("```\n", ";\n"),
        progress,
        backend,
        path.stem,
        first,
    )
