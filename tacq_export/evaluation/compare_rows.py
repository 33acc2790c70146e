"""Rows of a comparison: what was measured of one file, kept on disk as soon as it is measured, and shown as a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from ..errors import TacqError
from ..files import file_sha256, locked, written_atomically

TASKS = ("gsm8k", "spider")


@dataclass(frozen=True)
class Row:
    """One file. What was not measured is None.

    kind: "reference", "ours", "stock", or "emulated" (a stock type that could not hold the widths, see
    emulate_stock.py).
    file_bytes: size of the file.  bpw_linear, bpw_file: true bits per weight of the blocks' matrices, and 8 file_bytes
                                   / all
    weights.  kl: nats a token to the reference, ppl and top1 on the same `n_tokens` held-out tokens.  gsm8k, spider:
              share of
    `n` examples answered right.  wikitext2_ppl, wikitext2_kl: on general text.  types: {type: matrices of the blocks};
    fell_back: {"Q2_K -> Q4_0": tensors}; embedding, head: their types.  intervals: {task: [n, low, high]}, 95 % of the
    score; cut: {task: answers that ended at the limit of tokens, and were judged as far as they went}; retention:
    {task: [ratio to the reference's score, low, high]}, over the same examples in pairs.
    """

    name: str
    file_bytes: int
    bpw_linear: float
    kl: float | None = None
    ppl: float | None = None
    top1: float | None = None
    gsm8k: float | None = None
    spider: float | None = None
    wikitext2_ppl: float | None = None
    kind: str = "ours"
    bpw_file: float | None = None
    kl_stderr: float | None = None
    n_tokens: int | None = None
    wikitext2_kl: float | None = None
    intervals: dict[str, list[float]] = field(default_factory=dict)
    retention: dict[str, list[float]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    fell_back: dict[str, int] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def _rounded(value):
    """Floats to six digits that count: more are noise, and make a committed file unreadable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def json_line(rows: Sequence[Row]) -> str:
    """The comparison as one line: a list of objects, the reference first."""
    return json.dumps(_rounded([row.as_dict() for row in rows]))


def write_json(rows: Sequence[Row], outfile: Path) -> None:
    """The same list, one row a line so that a change is a change of one line. Raises TacqError if it cannot be
    written."""
    lines = ",\n ".join(json.dumps(_rounded(row.as_dict())) for row in rows)
    with written_atomically(outfile) as partial:
        partial.write_text(f"[{lines}]\n", encoding="utf-8")


def load_rows(path: Path) -> list[Row]:
    """What `write_json` wrote. Raises TacqError if it is no such file."""
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise TacqError(f"{path} holds no rows of a comparison ({error}); make it again.") from None


class Measurements:
    """Results on disk, each kept the moment it is there: a comparison that was interrupted measures only what is
    missing.

    A result is found by what decides it (a dict of plain values): the sha256 of the files, and the settings. Several
    processes may share the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._sha: dict[tuple, str] = {}

    def _load(self) -> dict[str, dict]:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise TacqError(f"{self.path} is damaged; delete it, and everything is measured again.") from None

    def find(self, decides: dict) -> dict | None:
        """The result of these settings, None if it was not measured."""
        return self._load().get(_key(decides))

    def get(self, decides: dict, measure: Callable[[], dict]) -> dict:
        """The result of these settings: found, or measured now and kept."""
        if (found := self.find(decides)) is not None:
            return found
        return self.put(decides, measure())

    def put(self, decides: dict, result: dict) -> dict:
        """Keep `result`, in place of what there was."""
        with locked(self.path.with_suffix(".lock"), lambda _: None):
            results = self._load() | {_key(decides): result}
            with written_atomically(self.path) as partial:
                partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
        return result

    def sha(self, path: Path) -> str:
        """First 16 hex digits of a file's sha256; read once a process."""
        facts = path.stat()
        at = (str(path.resolve()), facts.st_size, facts.st_mtime_ns)
        if at not in self._sha:
            self._sha[at] = file_sha256(path)[:16]
        return self._sha[at]


def _key(decides: dict) -> str:
    return json.dumps(decides, sort_keys=True)


def texts_sha(texts: Sequence[Sequence[int]]) -> str:
    """Names token lists by their content."""
    return hashlib.sha256(repr([list(map(int, text)) for text in texts]).encode()).hexdigest()[:16]


def table(rows: Sequence[Row]) -> list[str]:
    """The comparison as aligned text; columns that no row has are left out, below each row what its matrices are stored
    as."""
    width = max(len("file"), *(len(row.name) for row in rows))
    columns: list[tuple[str, int, Callable[[Row], str]]] = [
        ("MB", 8, lambda r: f"{r.file_bytes / 1e6:.1f}"),
        ("bpw file", 9, lambda r: _number(r.bpw_file, 3)),
        ("bpw linear", 11, lambda r: f"{r.bpw_linear:.3f}"),
        ("KL", 8, lambda r: _number(r.kl, 4)),
        ("+-", 7, lambda r: _number(r.kl_stderr, 4)),
        ("ppl", 8, lambda r: _number(r.ppl, 3)),
        ("top-1", 7, lambda r: _number(r.top1, 3)),
    ]
    columns += [
        (task, 21, partial(_score, task=task)) for task in TASKS if any(getattr(r, task) is not None for r in rows)
    ]
    if any(row.wikitext2_ppl is not None for row in rows):
        columns.append(("ppl, general text", 18, lambda r: _number(r.wikitext2_ppl, 2)))
    lines = [f"{'file':<{width}}" + "".join(f" {title:>{wide}}" for title, wide, _ in columns)]
    for row in rows:
        lines.append(f"{row.name:<{width}}" + "".join(f" {show(row):>{wide}}" for _, wide, show in columns))
        lines.append("    " + describe_types(row))
    return lines


def describe_types(row: Row) -> str:
    """What the blocks' matrices are stored as, and what of it is a fallback."""
    text = ", ".join(f"{count} {kind}" for kind, count in row.types.items())
    if row.embedding:
        text += (
            f"; embedding and head {row.head}"
            if row.embedding == row.head
            else f"; embedding {row.embedding}, head {row.head}"
        )
    if row.fell_back:
        text += "; fell back: " + ", ".join(f"{count} {pair}" for pair, count in row.fell_back.items())
    text += "".join(f"; {n} answers of {task} cut off" for task, n in row.cut.items() if n)
    return f"({text})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _score(row: Row, task: str) -> str:
    """Share in percent with its interval, as `31.0 (22.8-40.6) %`."""
    value = getattr(row, task)
    if value is None:
        return "-"
    between = (
        f" ({100 * row.intervals[task][1]:.1f}-{100 * row.intervals[task][2]:.1f})" if task in row.intervals else ""
    )
    return f"{100 * value:.1f}{between} %"
