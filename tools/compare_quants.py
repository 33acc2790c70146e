#!/usr/bin/env python3
"""Our files of several sizes beside stock ones of a model: exports, measures, and writes the table, its JSON and its
picture.

    compare_quants.py smollm2-135m --target-bpw 2.5 3 3.5 --n-gsm8k 100 --data FOLDER -- --refine-sweeps 5

Everything is kept in the work folder as soon as it is done: the same command goes on where it was interrupted, and one
that asks for more sizes, types, scores or questions makes only those. What follows -- goes to each export.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fetch_models import MODELS, fetch_model  # noqa: E402

from tacq_export.console import ConsoleReporter, guarded, positive, wait_passively  # noqa: E402

wait_passively()  # before torch is imported

from tacq_export.config import LOSSES  # noqa: E402
from tacq_export.errors import TacqError  # noqa: E402
from tacq_export.evaluation.compare_rows import json_line, table, write_json  # noqa: E402
from tacq_export.evaluation.compare_stock import CompareConfig, Scoring, check_inputs, claim_workdir, compare_stock  # noqa: E402
from tacq_export.evaluation.plot_compare import check_picture, plot_compare  # noqa: E402

TOOLS = Path(__file__).resolve().parent
DATA = TOOLS / "data"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/compare_quants.py",
        description=__doc__.split("\n")[0],
        epilog="What follows -- goes to each export as it is.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"{', '.join(MODELS)}, or the path of a GGUF or a Hugging Face folder"
    )
    ours = parser.add_argument_group("our files (default: one with the exporter's default options)")
    ours.add_argument(
        "--target-bpw",
        nargs="+",
        default=[],
        metavar="B",
        help="export to these bits per weight of the linear matrices, such as 2.25 2.5 3 3.5",
    )
    ours.add_argument(
        "--target-size", nargs="+", default=[], metavar="S", help="export to these file sizes, such as 350M"
    )
    ours.add_argument(
        "--files", nargs="+", type=Path, default=[], metavar="OURS.gguf", help="files that were exported before"
    )
    ours.add_argument(
        "--task",
        type=Path,
        metavar="FILE",
        help="calibration examples (default: 128 GSM8K train examples, tools/data/gsm8k-train-128.jsonl)",
    )
    ours.add_argument("--n-samples", type=positive, default=128, metavar="N", help="of --task (default 128)")
    stock = parser.add_argument_group("stock files")
    stock.add_argument(
        "--types",
        nargs="+",
        metavar="T",
        help="llama-quantize's types, or 'none' (default: the nearest in size to each of our files; with --types and "
        "nothing of ours they are measured alone)",
    )
    stock.add_argument(
        "--emulate",
        nargs="+",
        default=[],
        metavar="T",
        help="types also measured as if they could hold every width, at nominal bits per weight, such as Q2_K (all "
        "matrices) or Q3_K_M (a mix)",
    )
    stock.add_argument(
        "--embedding-type", metavar="T", help="of embedding and head in the stock files (default: what our file has)"
    )
    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with gsm8k/test.jsonl, spider/eval.jsonl, spider/schemas.json and wikitext2/test.raw; without it "
        "only tools/data is there",
    )
    measured.add_argument(
        "--eval", type=Path, metavar="FILE", help="held-out examples for KL, perplexity and top-1 (default: GSM8K test)"
    )
    measured.add_argument("--n-eval", type=positive, default=24, metavar="N", help="of them (default 24)")
    measured.add_argument(
        "--loss",
        choices=LOSSES,
        default="text",
        help="which of their tokens count: all, or those of the assistant's last turn alone (default text)",
    )
    measured.add_argument(
        "--n-gsm8k",
        type=int,
        default=0,
        metavar="N",
        help="GSM8K test questions that each file answers (default 0: no score)",
    )
    measured.add_argument(
        "--n-spider",
        type=int,
        default=0,
        metavar="N",
        help="Spider questions that each file answers; needs --data (default 0)",
    )
    measured.add_argument(
        "--wikitext", type=Path, metavar="FILE", help="general text (default: wikitext2/test.raw of --data)"
    )
    measured.add_argument(
        "--n-windows", type=positive, default=40, metavar="N", help="windows of 512 tokens of it (default 40)"
    )
    parser.add_argument("--name", help="of the results: compare-NAME.json and .png (default: the model's)")
    parser.add_argument(
        "--out",
        type=Path,
        default=TOOLS / "results",
        metavar="DIR",
        help="where the results go (default tools/results)",
    )
    parser.add_argument(
        "-w", "--workdir", type=Path, metavar="DIR", help="files and measurements stay here (default compare-NAME.work)"
    )
    parser.add_argument("--threads", "-t", type=positive, metavar="N")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.options = argv[split + 1 :]
    return args


def data_file(args: argparse.Namespace, inside: str, fallback: str | None, n: int) -> Path:
    """The data file of --data, or the small one in tools/data if it has `n` examples."""
    if args.data:
        path = args.data / inside
        if not path.is_file():
            raise TacqError(f"{args.data} has no {inside}; give --data the folder that has it.")
        return path
    path = DATA / fallback if fallback else None
    rows = len(path.read_text(encoding="utf-8").splitlines()) if path else 0
    if rows < n:
        raise TacqError(f"{n} examples are asked for and tools/data has {rows}; give --data a folder with {inside}.")
    return path


def configuration(args: argparse.Namespace) -> CompareConfig:
    """What is compared, without our files: they are exported first."""
    model = str(fetch_model(args.model)) if args.model in MODELS else args.model
    name = args.name or (
        args.model if args.model in MODELS else Path(args.model.rstrip("/")).name.removesuffix(".gguf").lower()
    )
    args.name, args.workdir = name, args.workdir or Path(f"compare-{name}.work")
    scoring = []
    for task, inside, fallback, n in (
        ("gsm8k", "gsm8k/test.jsonl", "gsm8k-test-24.jsonl", args.n_gsm8k),
        ("spider", "spider/eval.jsonl", None, args.n_spider),
    ):
        if n > 0:
            scoring.append(Scoring(task, data_file(args, inside, fallback, n), n))
    text = args.wikitext or (
        args.data / "wikitext2" / "test.raw" if args.data and (args.data / "wikitext2" / "test.raw").is_file() else None
    )
    types = None if args.types is None else [t for t in ",".join(args.types).split(",") if t.lower() != "none"]
    return CompareConfig(
        model=model,
        task=args.task or DATA / "gsm8k-train-128.jsonl",
        held_out=args.eval or data_file(args, "gsm8k/test.jsonl", "gsm8k-test-24.jsonl", args.n_eval),
        workdir=args.workdir,
        files=(),
        types=types,
        emulate=[t for t in ",".join(args.emulate).split(",") if t],
        n_samples=args.n_samples,
        n_eval=args.n_eval,
        loss=args.loss,
        text=text,
        n_windows=args.n_windows,
        scoring=scoring,
        embedding_type=args.embedding_type,
        head_type=args.embedding_type,
        threads=args.threads,
    )


def _begun(work: Path, flag: str, value: str) -> bool:
    """True if the exporter's work folder holds the unfinished export of that size."""
    try:
        options = json.loads((work / "state.json").read_text())["options"]
    except (OSError, ValueError, KeyError):
        return False
    then = options.get(flag.lstrip("-").replace("-", "_"))
    return then == value or flag == "--target-bpw" and then == str(float(value))


def export_files(args: argparse.Namespace, config: CompareConfig) -> list[Path]:
    """Our files at the sizes asked for, made as a user would make them; those that are there are not made again."""
    wanted = [("--target-bpw", value) for value in args.target_bpw] + [
        ("--target-size", value) for value in args.target_size
    ]
    files = []
    for flag, value in wanted:
        outfile = config.workdir / f"tacq-{value}.gguf"
        note = outfile.with_suffix(".options.json")  # a file made with other options is not what is asked for
        if outfile.is_file() and note.is_file() and json.loads(note.read_text()) != args.options:
            raise TacqError(f"{outfile} was exported with other options; give another --workdir, or delete the file.")
        if not outfile.is_file():
            note.write_text(json.dumps(args.options))
            command = [
                sys.executable,
                "-m",
                "tacq_export",
                config.model,
                "--task",
                str(config.task),
                "--outfile",
                str(outfile),
                flag,
                value,
                "--n-samples",
                str(config.n_samples),
            ]
            command += (["--threads", str(config.threads)] if config.threads else []) + args.options
            if "--workdir" not in args.options and "-w" not in args.options:
                shared = config.workdir / "export.work"  # all sizes calibrate once
                command += ["--workdir", str(shared)] + (["--resume"] if _begun(shared, flag, value) else [])
            print("\n== " + " ".join(["tacq-export", *command[3:]]), file=sys.stderr, flush=True)
            if subprocess.run(command).returncode:
                raise TacqError("the export failed, as said above; the same command goes on.")
        files.append(outfile)
    return files + args.files


def run(args: argparse.Namespace) -> None:
    """Export, measure, write the results and print them."""
    check_picture()
    config = configuration(args)
    check_inputs(replace(config, files=args.files))
    claim_workdir(config)
    files = export_files(args, config)
    alone = not files and config.types is not None  # stock types were asked for, and nothing of ours
    config = replace(config, files=files if files or alone else None)
    rows = compare_stock(config, ConsoleReporter())
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(rows, args.out / f"compare-{args.name}.json")
    if len(rows) > 1:  # more than the reference alone
        held_out = config.held_out.absolute()
        about = (
            f"calibrated on {config.task.stem}; KL on {rows[0].n_tokens} tokens of "
            f"{held_out.parent.name}/{held_out.name}"
        )
        plot_compare(rows, args.out / f"compare-{args.name}.png", args.name, about)
    print("\n".join(table(rows)))
    print(json_line(rows))


def main(argv: list[str]) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args), "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
