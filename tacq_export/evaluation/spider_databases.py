"""SQLite databases filled with generated rows, to run a text-to-SQL question's gold query and a model's answer on.

Spider's own rows are not needed: what tells a wrong query from the gold one is data in which they differ (Zhong et al.
2020, arXiv 2010.02840, "distilled test suites"). So a filling is made for one gold query: the literals it compares with
are in their columns, beside near misses; groups are about as large as it counts; values repeat, so that joins, DISTINCT
and set operations matter; and keys and foreign keys hold. No NULLs: what a question means by a missing value is not
defined.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import defaultdict
from dataclasses import dataclass, field

from ..errors import TacqError

_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\d+\.?\d*|\.\d+|[A-Za-z_]\w*|<=|>=|<>|!=|==|[^\s\w]""")
_COMPARE = {"=", "==", "!=", "<>", "<", ">", "<=", ">=", "like"}
_WORDS = [
    "Alder",
    "Birch",
    "Cedar",
    "Daisy",
    "Elm",
    "Fern",
    "Garnet",
    "Hazel",
    "Iris",
    "Juniper",
    "Kestrel",
    "Laurel",
    "Maple",
    "Nettle",
    "Olive",
    "Poplar",
    "Quince",
    "Rowan",
    "Sage",
    "Thistle",
    "Umber",
    "Violet",
    "Willow",
    "Xenia",
    "Yarrow",
    "Zinnia",
    "Amber",
    "Basil",
    "Coral",
    "Dahlia",
    "Ebony",
    "Flint",
    "Ginger",
    "Heather",
    "Ivory",
    "Jasmine",
]
# Rows of a table in the fillings of seeds 0, 1, ...: small ones, where a result may be empty, and large ones.
_SIZES = (14, 8, 22, 5, 34)
_MOST_ROWS = 200
_DATE = re.compile(r"date|time|created|birth_?day|^day$", re.I)
_NUMERIC_NAME = re.compile(
    r"(^|_)(age|year|weight|height|amount|count|number_of|num|price|cost|tonnage|horsepower|mpg|rank|points)($|_)", re.I
)


@dataclass(frozen=True)
class Literal:
    """`column function operator value` of a query, lower case: `sum(T1.cost) > 10` is ("cost", "sum", ">", 10.0)."""

    column: str
    function: str
    operator: str
    value: str | int | float


@dataclass
class Column:
    name: str
    type: str
    key: bool = False  # the only column of the primary key, or one that another table refers to

    @property
    def numeric(self) -> bool:
        return not re.search("char|text|clob|date|^$", self.type, re.I)

    @property
    def definition(self) -> str:
        name = self.name.replace('"', '""')
        return f'"{name}" {self.type}'


@dataclass
class ForeignKey:
    columns: list[str]
    parent: str
    parent_columns: list[str]


@dataclass
class Table:
    name: str
    definition: str
    columns: list[Column]
    foreign_keys: list[ForeignKey] = field(default_factory=list)

    def is_unique(self, key: ForeignKey) -> bool:
        """Whether each parent has at most one row here."""
        return any(column.key and column.name in key.columns for column in self.columns)


def tokens_of(query: str) -> list[tuple[str, int]]:
    """(token, offset) of SQL text; a quoted string or name is one token, quotes included."""
    return [(match[0], match.start()) for match in _TOKEN.finditer(query)]


def read_tables(schema: str) -> dict[str, Table]:
    """{name in lower case: table} of CREATE TABLE text, as SQLite understands it. Raises TacqError if it does not."""
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(schema)
        made = list(
            database.execute(
                "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY rowid"
            )
        )
        tables = {}
        for name, definition in made:
            rows = list(database.execute("SELECT name, type, pk FROM pragma_table_info(?)", (name,)))
            single = sum(pk > 0 for _, _, pk in rows) == 1
            tables[name.lower()] = Table(name, definition, [Column(n, t, single and pk > 0) for n, t, pk in rows])
        for name, _ in made:
            keys = defaultdict(list)
            for number, parent, child, to in database.execute(
                'SELECT id, "table", "from", "to" FROM pragma_foreign_key_list(?) ORDER BY id, seq', (name,)
            ):
                keys[number, parent.lower()].append((child, to))
            seen: set[str] = set()  # a column may be declared twice; the first one holds
            for (_, parent), pairs in keys.items():
                if parent not in tables or seen & {child.lower() for child, _ in pairs}:
                    continue
                seen |= {child.lower() for child, _ in pairs}
                own_keys = [column.name for column in tables[parent].columns if column.key]
                targets = [to or (own_keys or [tables[parent].columns[0].name])[0] for _, to in pairs]
                tables[name.lower()].foreign_keys.append(ForeignKey([child for child, _ in pairs], parent, targets))
                for column in tables[parent].columns:
                    column.key |= len(targets) == 1 and column.name.lower() == targets[0].lower()
    except sqlite3.Error as error:
        raise TacqError(f"SQLite refuses the schema ({error}); give CREATE TABLE statements of SQLite.") from None
    finally:
        database.close()
    if not tables:
        raise TacqError("The schema creates no table; give its CREATE TABLE statements.")
    return tables


def literals_of(query: str, names: set[str]) -> list[Literal]:
    """The literals that a query compares something with. names: tables and columns in lower case, because SQLite takes
    "x" for a string only where nothing has that name. An operand that is no column or f(column) has the column "" or
    "*"."""
    tokens = [token for token, _ in tokens_of(query)]
    found = []

    def literal(i: int) -> tuple[str | int | float | None, int]:
        """Value of the literal at i (None: there is none), and the index after it."""
        if i >= len(tokens):
            return None, i
        token = tokens[i]
        if token == "-" and i + 1 < len(tokens) and tokens[i + 1][0].isdigit():
            return -_number(tokens[i + 1]), i + 2
        if token[0] == "'" or (token[0] == '"' and token[1:-1].lower() not in names):
            return token[1:-1].replace(token[0] * 2, token[0]), i + 1
        return (_number(token), i + 1) if re.match(r"\.?\d", token) else (None, i)

    def operand(i: int) -> tuple[str, str]:
        """(column, function) of the operand that ends at i."""
        if i >= 0 and tokens[i].lower() == "not":
            i -= 1
        if i < 0:
            return "", ""
        if tokens[i] != ")":
            return tokens[i].strip('"`').lower(), ""
        begin = i
        while begin > 0 and tokens[begin] != "(":
            begin -= 1
        return tokens[i - 1].strip('"`').lower(), tokens[begin - 1].lower() if begin else ""

    for i, token in enumerate(tokens):
        word = token.lower()
        values = []
        if word in _COMPARE:
            values = [literal(i + 1)[0]]
        elif word == "between":
            low, after = literal(i + 1)
            values, word = [low, literal(after + 1)[0]], "<="
        elif word == "in" and tokens[i + 1 : i + 2] == ["("]:
            after, word = i + 1, "="
            while after < len(tokens) and tokens[after] in "(,":
                value, after = literal(after + 1)
                values.append(value)
        found += [Literal(*operand(i - 1), word, value) for value in values if value is not None]
    return found


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def fill_database(tables: dict[str, Table], query: str, seed: int, keys: bool = True) -> sqlite3.Connection:
    """An in-memory database with generated rows for this gold query; the same arguments give the same rows.

    keys=False: a primary key that refers to another table may repeat. Spider's schemas name only the first column of a
    key of several, as in Friend (student_id, friend_id), and then ask who has three friends.
    """
    filling = _Filling(tables, query, seed, keys)
    database = sqlite3.connect(":memory:")
    for table in tables.values():
        values = filling.rows(table)
        marks = ", ".join("?" * len(table.columns))
        name = table.name.replace('"', '""')
        definition = (
            table.definition
            if keys
            else f'CREATE TABLE "{name}" ({", ".join(column.definition for column in table.columns)})'
        )
        database.execute(definition)
        # OR IGNORE: a key of several columns may repeat by chance.
        database.executemany(
            f'INSERT OR IGNORE INTO "{name}" VALUES ({marks})',
            list(zip(*(values[c.name.lower()] for c in table.columns), strict=False)),
        )
    database.commit()
    return database


class _Filling:
    """The rows of one database: {table: {column: values}}, made table by table, parents before their children."""

    def __init__(self, tables: dict[str, Table], query: str, seed: int, keys: bool):
        self.tables, self.seed, self.keys = tables, seed, keys
        self.random = random.Random(f"rows/{seed}")
        names = set(tables) | {column.name.lower() for table in tables.values() for column in table.columns}
        self.literals = literals_of(query, names)
        # count(*) > 7: some groups must be larger than that. sum and avg are about the column's values.
        counts = [
            int(x.value)
            for x in self.literals
            if isinstance(x.value, (int, float)) and (x.function == "count" or x.column == "*")
        ]
        self.group = max([min(n, 60) for n in counts if n >= 0], default=0)
        self.values: dict[str, dict[str, list]] = {}
        base, taken, self.sizes = _SIZES[seed % len(_SIZES)], set(), {}
        for name, table in tables.items():
            rows = int(base * self.random.uniform(0.8, 1.3) * (1.8 if table.foreign_keys else 1))
            rows = min(max(rows, 3, 3 * (self.group + 1)), _MOST_ROWS)
            while rows in taken:  # count(*) of one table must not be that of another
                rows += 1
            taken.add(rows)
            self.sizes[name] = rows

    def rows(self, table: Table, underway: tuple[str, ...] = ()) -> dict[str, list]:
        """{column: values} of a table; `underway` are tables that wait for this one (a cycle of references)."""
        name = table.name.lower()
        if name in self.values:
            return self.values[name]
        size, columns = self.sizes[name], {}
        for key in table.foreign_keys:
            if key.parent == name or key.parent in underway:
                continue  # below, from what is there by then
            parent = self.rows(self.tables[key.parent], (*underway, name))
            chosen = self._parents(len(next(iter(parent.values()))), size, unique=self.keys and table.is_unique(key))
            size = len(chosen)
            for child, target in zip(key.columns, key.parent_columns, strict=False):
                columns[child.lower()] = [parent[target.lower()][i] for i in chosen]
        columns = {column: values[:size] for column, values in columns.items()}
        for column in table.columns:
            if column.name.lower() not in columns:
                columns[column.name.lower()] = self._cells(column, size)
        for key in table.foreign_keys:
            if key.parent == name:  # employees and their managers
                for child, target in zip(key.columns, key.parent_columns, strict=False):
                    columns[child.lower()] = self.random.choices(columns[target.lower()][: max(1, size // 2)], k=size)
        self.values[name] = columns
        return columns

    def _parents(self, parents: int, size: int, unique: bool) -> list[int]:
        """Row numbers of the parents of `size` children: some parents have none, a few have many."""
        some = max(1, round(0.75 * parents))
        if self.group > 2 and not unique:
            some = min(some, self._groups(size))
        order = self.random.sample(range(parents), some)
        if unique:
            return order[:size]
        return self.random.choices(order, [1 / (rank + 1.5) for rank in range(len(order))], k=size)

    def _groups(self, size: int) -> int:
        """Into how many groups to divide `size` rows so that some are as large as the query counts, and some not."""
        return max(3, round(2 * size / (self.group + 1)))

    def _cells(self, column: Column, size: int) -> list:
        """Values of a column: half of them from the query's literals, if it has some for this column."""
        name = column.name.lower()
        own = [x for x in self.literals if x.column == name and x.function != "count"]
        hits, misses = [], []
        for x in own:
            more_hits, more_misses = _around(x, self.random)
            hits += more_hits
            misses += more_misses
        misses = [value for value in misses if value not in hits]
        plain = self._plain(column, own, size)
        if column.key:
            rest = [value for value in dict.fromkeys(misses + plain) if value not in hits]
            values = list(dict.fromkeys(hits))[: max(1, size - 2)]
            values += self.random.sample(rest, size - len(values))
            self.random.shuffle(values)
            return values
        weights = [1 / (rank + 2) for rank in range(len(plain))]
        cells = []
        for _ in range(size):
            draw = self.random.random()
            if hits and draw < 0.5:
                cells.append(self.random.choice(hits))
            elif misses and draw < 0.75:
                cells.append(self.random.choice(misses))
            else:
                cells.append(self.random.choices(plain, weights)[0])
        return cells

    def _plain(self, column: Column, own: list[Literal], size: int) -> list:
        """Values that have nothing to do with literals. Columns whose names end in the same word share them, so that
        set operations between tables have something in common; a key gets enough different ones."""
        name = column.name.lower()
        shared = random.Random(f"{name.rsplit('_', 1)[-1]}/{self.seed}")
        wanted = 3 * size + 8 if column.key else (self._groups(size) if self.group > 2 else max(4, round(0.7 * size)))
        if column.numeric:
            numbers = [x.value for x in own if isinstance(x.value, (int, float))]
            most = max([2 * abs(int(n)) for n in numbers], default=0)
            return shared.sample(range(1, max(most, 3 * wanted, 100)), wanted)
        if _DATE.search(name):
            return [
                f"{shared.randint(1990, 2020)}-{shared.randint(1, 12):02}-{shared.randint(1, 28):02}"
                for _ in range(wanted)
            ]
        if _NUMERIC_NAME.search(name):
            # Numbers stored as text: of one width, so that they sort as text as they do as numbers.
            return (
                [str(n) for n in shared.sample(range(100, 1000), min(wanted, 900))]
                if wanted > 6
                else [str(n) for n in shared.sample(range(1, 10), wanted)]
            )
        words = shared.sample(_WORDS, len(_WORDS))
        return [words[i % len(words)] + (f" {i // len(words) + 1}" if i >= len(words) else "") for i in range(wanted)]


def _around(x: Literal, chance: random.Random) -> tuple[list, list]:
    """(values that make the comparison with the literal true or sit on its border, near misses)."""
    value = x.value
    if isinstance(value, (int, float)):
        if x.function == "sum":  # a group has a few rows
            return [type(value)(value * share) for share in (0.2, 0.5, 1)], [value + 1, type(value)(value * 1.1)]
        step = 1 if isinstance(value, int) else 0.5
        inside = {">": value + step, ">=": value + step, "<": value - step, "<=": value - step}.get(x.operator)
        return [value] + ([inside] if inside is not None else []), [
            value - step,
            value + step,
            value * 2 + 3,
            value // 2 - 1,
        ]
    if x.operator == "like":
        core = value.replace("%", "").replace("_", "x")
        words = chance.sample(_WORDS, 4)
        ends = [[word + " ", " " + word] for word in words]
        matching = [value.replace("_", "x").replace("%", "")]
        for before, after in ends:
            text = value.replace("_", "x")
            if text.startswith("%"):
                text = chance.choice((before, "")) + text[1:]
            if text.endswith("%"):
                text = text[:-1] + chance.choice((after, ""))
            matching.append(text.replace("%", " "))
        return matching, [
            core[:-1],
            f"{words[0]} {core}",
            f"{core} {words[1]}",
            f"{words[2]} {core} {words[3]}",
        ] if len(core) > 1 else [core + words[1]]
    border = (
        [value[:-1] + chr(ord(value[-1]) + 1), value[:-1] + chr(ord(value[-1]) - 1)]
        if value and x.operator in ("<", ">", "<=", ">=")
        else []
    )
    return [value], border + [f"{chance.choice(_WORDS)} {value}", f"{value} {chance.choice(_WORDS)}"]
