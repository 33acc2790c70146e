"""Our files beside stock ones of the same model and size: the work behind `tacq-export compare`.

    reference -> imatrix of the task -> stock files -> each file measured -> rows

Files and results stay in the work folder: a comparison that was interrupted, or that is asked for more, makes and
measures only what is missing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import TacqError
from ..files import file_sha256, written_atomically
from ..format.inspect_gguf import inspect_gguf
from ..inputs.load_task import Example, Task, load_task
from ..inputs.make_reference import make_reference
from ..inputs.sql_schema import SCHEMAS
from ..inputs.task_files import PlainText, read_text
from ..inputs.tokenize_task import calibration_text, require_answers, tokenize_for_loss
from ..inputs.tokenizer import ModelTokenizer
from ..reporting import Reporter
from ..runtime.build import runtime_path
from .compare_files import (
    CANDIDATES,
    StockPlan,
    embedding_and_head,
    make_imatrix,
    make_stock,
    nearest_types,
    plan_stock,
)
from .compare_rows import Measurements, Row, texts_sha
from .emulate_stock import emulated_size, emulated_types, named, write_emulated
from .score_spider import SPIDER_TOKENS, score_spider
from .score_task import GSM8K_TOKENS, TaskScore, retention, score_gsm8k
from .verify import compare_models, compare_on_text

WINDOW = 512  # tokens of a window of general text
IMATRIX_TOKENS = 1024  # llama-imatrix refuses less than two windows of 512


@dataclass(frozen=True)
class Scoring:
    """A score of the task itself. task: "gsm8k" or "spider"; examples: its evaluation file (Spider's schemas lie beside
    it, see load_task.py); n: how many of them, from the first."""

    task: str
    examples: Path
    n: int

    def decides(self) -> dict:
        """What an answer's score depends on, besides the file; so not `n`."""
        schemas = self.examples.parent / SCHEMAS
        files = {"examples": self.examples} | (
            {"schemas": schemas} if self.task == "spider" and schemas.is_file() else {}
        )
        limit = GSM8K_TOKENS if self.task == "gsm8k" else SPIDER_TOKENS
        return {"score": self.task, "n_predict": limit} | {key: file_sha256(path)[:16] for key, path in files.items()}


@dataclass(frozen=True)
class CompareConfig:
    """Options of a comparison.

    model: Hugging Face folder, hub id or GGUF; at F16 it is the reference.  task: calibration examples, of which the
    first
    `n_samples` make the imatrix.  held_out: other examples (see load_task.py), of which `n_eval` are measured, whole
                                   or, with the
    loss "answer", the tokens of their answers alone.  files: our files; None means one is exported with default
                                                       options, () that stock types are measured alone.  types: stock
                                                       types; None means those nearest in size to each
    of our files (compare_files.py has the rule), () none.  emulate: stock types as if they could hold every width
    (emulate_stock.py).  text: general text, `n_windows` windows of 512 tokens.  scoring: scores of the task itself.
    embedding_type, head_type: of the stock files; None means what our
    file has (TACQ4 without one).  columns: which columns of task and held_out mean what (load_task.py).
    """

    model: str
    task: Path
    held_out: Path
    workdir: Path
    files: Sequence[Path] | None = None
    types: Sequence[str] | None = None
    emulate: Sequence[str] = ()
    n_samples: int = 128
    n_eval: int = 24
    loss: str = "text"
    text: Path | None = None
    n_windows: int = 40
    scoring: Sequence[Scoring] = ()
    embedding_type: str | None = None
    head_type: str | None = None
    threads: int | None = None
    columns: Mapping[str, str] | None = None


def compare_stock(config: CompareConfig, reporter: Reporter) -> list[Row]:
    """The reference's row, then ours, then the stock types' by size, then the emulated ones.

    Raises TacqError: runtime not built, a type that does not exist, a file of another model, a work folder of another
    comparison, a missing or malformed task file.
    """
    calibration, held_out = check_inputs(config)
    work, emulated = config.workdir, named(config.emulate)
    claim_workdir(config)
    reference = work / "reference-f16.gguf"
    if not reference.is_file():
        make_reference(config.model, reference, reporter)
    tokenizer = ModelTokenizer(reference, reporter.say)
    texts, begins = tokenize_for_loss(
        config.loss, held_out, tokenizer, config.n_eval, 2048
    )  # may refuse them: before the long work
    needs_imatrix = bool(config.types is None or config.types or config.emulate)
    rendered = calibration_text(calibration, tokenizer, config.n_samples, 2048) if needs_imatrix else ""
    if needs_imatrix and (n := len(tokenizer.encode(rendered, limit=IMATRIX_TOKENS))) < IMATRIX_TOKENS:
        raise TacqError(
            f"The calibration text has {n} tokens, and llama-imatrix, which stock types need, wants {IMATRIX_TOKENS}; "
            "give more or longer examples."
        )
    files = [export_default(config, reporter)] if config.files is None else list(config.files)
    imatrix = work / "task.imatrix.gguf"
    if needs_imatrix:
        if not imatrix.is_file():
            make_imatrix(reference, rendered, imatrix, config.threads, reporter)
        elif imatrix.with_suffix(".txt").read_text(encoding="utf-8") != rendered:
            raise TacqError(
                f"{work} holds another comparison (the model's chat template or the schemas of the task were others); "
                "give another --workdir."
            )

    bench = _Bench(config, reference, tokenizer, texts, begins, reporter)
    unique = len({file.stem for file in files}) == len(files)
    ours = [bench.row(file, file.stem if unique else str(file), "ours") for file in files]
    groups: dict[tuple[str, str], list[Row]] = {}  # files with the same embedding and head share stock files
    for file, row in zip(files, ours, strict=False):
        embedding, head = embedding_and_head(bench.facts(file))
        groups.setdefault((config.embedding_type or embedding, config.head_type or head), []).append(row)
    if not files:
        groups[config.embedding_type or "tacq4", config.head_type or config.embedding_type or "tacq4"] = []
    rows = []
    for (embedding, head), members in groups.items():
        label = f", embedding {embedding.upper()}" if len(groups) > 1 else ""
        for plan in stock_plans(
            config, reference, imatrix, embedding, head, [row.file_bytes for row in members], reporter
        ):
            stock = work / f"{plan.type}-{embedding}-{head}.gguf".lower()
            if not stock.is_file():
                make_stock(reference, imatrix, plan.type, stock, embedding, head, config.threads, reporter)
            rows.append(bench.row(stock, plan.type + label, "stock", fell_back=plan.fell_back))
        for name in emulated:
            rows.append(bench.emulated_row(name, label, imatrix, embedding, head))
    rows.sort(key=lambda row: (row.kind == "emulated", row.file_bytes))
    return [bench.reference_row(), *ours, *rows]


def check_inputs(config: CompareConfig) -> tuple[Task, Task]:
    """The calibration and the held-out examples. What is missing or malformed raises its TacqError here, before the
    long work."""
    runtime_path()
    named(config.emulate)
    tasks = (
        load_task(config.task, config.columns, config.n_samples),
        load_task(config.held_out, config.columns, config.n_eval),
    )
    if config.columns and config.scoring:
        raise TacqError("--score reads the benchmark's own files, whose columns are known; leave --columns out.")
    if config.loss == "answer":
        require_answers(tasks[1], config.n_eval)
    for text in [scoring.examples for scoring in config.scoring] + ([config.text] if config.text else []):
        PlainText(text).head(1)
    for file in config.files or ():
        embedding_and_head(inspect_gguf(file))
    return tasks


def claim_workdir(config: CompareConfig) -> None:
    """Make the work folder, or check that it is of the same comparison: its files are used again by name."""
    marker, model = config.workdir / "comparison.json", Path(config.model)
    facts = model.stat() if model.is_file() else None
    mine = {"model": model.name, "task": file_sha256(config.task), "n_samples": config.n_samples}
    mine |= {"columns": dict(config.columns)} if config.columns else {}
    mine |= (
        {"model_bytes": facts.st_size}
        if facts
        else {"model_path": str(model.resolve() if model.is_dir() else config.model)}
    )
    config.workdir.mkdir(parents=True, exist_ok=True)
    if marker.is_file():
        try:
            theirs = json.loads(marker.read_text())
        except ValueError:
            theirs = {}
        if different := [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]:
            raise TacqError(
                f"{config.workdir} holds another comparison (its {different[0].replace('_', ' ')} differs); give "
                "another --workdir."
            )
        return
    with written_atomically(marker) as partial:
        partial.write_text(json.dumps(mine))


def export_default(config: CompareConfig, reporter: Reporter) -> Path:
    """Our file with the exporter's default options, made in the work folder or found there."""
    from ..config import ExportConfig
    from ..pipeline import export

    outfile = config.workdir / f"{Path(config.model).name.removesuffix('.gguf')}-{config.task.stem}-tacq2.gguf"
    if not outfile.is_file():
        begun = (config.workdir / (outfile.name + ".work") / "state.json").is_file()
        export(
            ExportConfig(
                config.model,
                config.task,
                outfile,
                n_samples=config.n_samples,
                threads=config.threads,
                resume=begun,
                columns=",".join(f"{key}={column}" for key, column in (config.columns or {}).items()) or None,
            ),
            reporter,
        )
    return outfile


def stock_plans(
    config: CompareConfig,
    reference: Path,
    imatrix: Path,
    embedding: str,
    head: str,
    sizes: Sequence[int],
    reporter: Reporter,
) -> list[StockPlan]:
    """Of the types asked for, or of those nearest to `sizes` (bytes)."""
    types = list(dict.fromkeys(name.upper() for name in (CANDIDATES if config.types is None else config.types)))
    what = "sizes of stock files"
    plans = {name: plan_stock(reference, imatrix, name, embedding, head) for name in reporter.track(types, what)}
    if config.types is None:
        chosen = {name for size in sizes for name in nearest_types(list(plans.values()), size)}
        return [plan for name, plan in plans.items() if name in chosen]
    return list(plans.values())


class _Bench:
    """Measures files of one comparison, each thing once: results lie in measurements.json of the work folder."""

    def __init__(
        self,
        config: CompareConfig,
        reference: Path,
        tokenizer: ModelTokenizer,
        texts: list[list[int]],
        begins: list[int] | None,
        reporter: Reporter,
    ):
        self.config, self.reference, self.tokenizer, self.texts, self.begins, self.reporter = (
            config,
            reference,
            tokenizer,
            texts,
            begins,
            reporter,
        )
        self.kept = Measurements(config.workdir / "measurements.json")
        self.facts = lru_cache(maxsize=None)(inspect_gguf)
        self._ref_ppl: float | None = None
        self._ref_text_ppl: float | None = None
        self._ref_scored: dict[str, TaskScore] = {}
        self.asked = [(scoring, load_task(scoring.examples, limit=scoring.n).examples) for scoring in config.scoring]
        self._ref_scores = self.scores({"file": self.kept.sha(reference)}, lambda: reference, "reference, F16")

    def row(self, file: Path, name: str, kind: str, fell_back: dict[str, int] | None = None) -> Row:
        """Size and quality of a file."""
        facts = self.facts(file)
        measured = self.measure({"file": self.kept.sha(file)}, lambda: file, name)
        embedding, head = embedding_and_head(facts)
        return Row(
            name,
            facts.file_bytes,
            facts.bpw_linear,
            kind=kind,
            bpw_file=facts.bpw_file,
            types=facts.types(),
            fell_back=fell_back or {},
            embedding=embedding,
            head=head,
            **measured,
        )

    def emulated_row(self, name: str, label: str, imatrix: Path, embedding: str, head: str) -> Row:
        """A stock type as if it could hold every width. Its F16 file is made if something is to be measured, and
        deleted."""
        types = emulated_types(name, self.reference, imatrix, embedding, head)
        temporary, size = (
            self.config.workdir / f"emulated-{name}.gguf".lower(),
            emulated_size(self.reference, types, embedding, head),
        )
        which = {
            "emulated": name,
            "embedding": embedding.upper(),
            "head": head.upper(),
            "imatrix": self.kept.sha(imatrix),
        }

        def make() -> Path:
            if not temporary.is_file():
                self.reporter.say(f"Rounding every matrix as {name} ...")
                write_emulated(
                    self.reference, imatrix, types, temporary, embedding, head, self.config.threads, self.reporter
                )
            return temporary

        temporary.unlink(missing_ok=True)  # of a run that was interrupted, perhaps with another embedding
        try:
            measured = self.measure(which, make, f"{name} (emulated)")
        finally:
            temporary.unlink(missing_ok=True)
        return Row(
            f"{name} (emulated){label}",
            size.file_bytes,
            size.bpw_linear,
            kind="emulated",
            bpw_file=size.bpw_file,
            types=dict(Counter(kind.name for kind in types.values())),
            embedding=embedding.upper(),
            head=head.upper(),
            **measured,
        )

    def reference_row(self) -> Row:
        """The reference agrees with itself; its perplexities were seen while the others were measured."""
        facts = self.facts(self.reference)
        embedding, head = embedding_and_head(facts)
        return Row(
            "reference, F16",
            facts.file_bytes,
            facts.bpw_linear,
            0.0,
            self._ref_ppl,
            1.0,
            wikitext2_ppl=self._ref_text_ppl,
            kind="reference",
            bpw_file=facts.bpw_file,
            kl_stderr=0.0,
            n_tokens=sum(map(len, self.texts)) - sum(self.begins or [1] * len(self.texts)),
            wikitext2_kl=None if self._ref_text_ppl is None else 0.0,
            types=facts.types(),
            embedding=embedding,
            head=head,
            **self._ref_scores,
        )

    def measure(self, which: dict, file, name: str) -> dict:
        """Measured fields of a Row. which: what names the file's content; file(): its path, asked only if something is
        missing."""
        config, threads = self.config, self.config.threads
        reference = self.kept.sha(self.reference)
        shown = lambda done, total: self.reporter.progress(done, total, f"measuring {name}")  # noqa: E731
        quality = self.kept.get(
            which
            | {"reference": reference, "texts": texts_sha(self.texts)}
            | ({"begins": self.begins} if self.begins else {}),
            lambda: compare_models(self.reference, file(), self.texts, threads, shown, begins=self.begins).as_dict(),
        )
        self._ref_ppl = quality["ref_ppl"]
        result = {key: quality[key] for key in ("kl", "kl_stderr", "ppl", "top1", "n_tokens")}
        if general_text := config.text:
            general = lambda done, total: self.reporter.progress(done, total, f"general text, {name}")  # noqa: E731
            on_text = self.kept.get(
                which
                | {
                    "reference": reference,
                    "text": self.kept.sha(config.text),
                    "windows": config.n_windows,
                    "window": WINDOW,
                },
                lambda: compare_on_text(
                    self.reference, file(), read_text(general_text), WINDOW, config.n_windows, threads, general
                ).as_dict(),
            )
            self._ref_text_ppl = on_text["ref_ppl"]
            result |= {"wikitext2_ppl": on_text["ppl"], "wikitext2_kl": on_text["kl"]}
        return result | self.scores(which, file, name)

    def scores(self, which: dict, file, name: str) -> dict:
        """Scores of the task itself, as fields of a Row. Only examples that were not asked before are."""
        result: dict = {}
        for scoring, examples in self.asked:
            key, n = which | scoring.decides(), len(examples)
            found = self.kept.find(key) or {"hits": "", "cuts": ""}
            if (first := len(found["hits"])) < n:
                answers = (
                    self.config.workdir / f"answers-{scoring.task}-{re.sub(r'[^a-z0-9._-]+', '-', name.lower())}.jsonl"
                )
                more = score_file(
                    scoring, file(), first, n - first, self.tokenizer, self.config.threads, self.reporter, name
                )
                write_answers(answers, examples[first:], more, first)
                found = self.kept.put(
                    key, {"hits": found["hits"] + _digits(more.hits), "cuts": found["cuts"] + _digits(more.cuts)}
                )
            score = TaskScore(_flags(found["hits"][:n]), cuts=_flags(found["cuts"][:n]))
            result[scoring.task] = score.accuracy
            result.setdefault("intervals", {})[scoring.task] = [score.n, score.low, score.high]
            result.setdefault("cut", {})[scoring.task] = score.cut
            against = self._ref_scored.setdefault(scoring.task, score)  # the reference is scored first
            if against.correct:
                kept = retention(score, against)
                result.setdefault("retention", {})[scoring.task] = [kept.ratio, kept.low, kept.high]
        return result


def _digits(flags: Sequence[bool]) -> str:
    return "".join("01"[flag] for flag in flags)


def _flags(digits: str) -> tuple[bool, ...]:
    return tuple(digit == "1" for digit in digits)


def score_file(
    scoring: Scoring,
    file: Path,
    first: int,
    n: int,
    tokenizer: ModelTokenizer,
    threads: int | None,
    reporter: Reporter,
    name: str,
) -> TaskScore:
    """The score of one file on n examples, from number `first` on."""
    shown = lambda done, total: reporter.progress(done, total, f"{scoring.task} of {name}")  # noqa: E731
    if scoring.task == "gsm8k":
        return score_gsm8k(file, scoring.examples, n, tokenizer, threads, progress=shown, first=first)
    return score_spider(file, scoring.examples, None, n, tokenizer, threads, progress=shown, first=first)


def write_answers(path: Path, examples: Sequence[Example], score: TaskScore, first: int) -> None:
    """What a file answered, to be read: a task file, with "right" in each row. Behind what is there, but for first =
    0."""
    rows = [
        {"messages": [*example.messages[:-1], {"role": "assistant", "content": answer}], "right": hit}
        for example, answer, hit in zip(examples, score.answers, score.hits, strict=True)
    ]
    before = path.read_text(encoding="utf-8") if first and path.is_file() else ""
    with written_atomically(path) as partial:
        partial.write_text(
            before + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
