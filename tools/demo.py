#!/usr/bin/env python3
"""Export a model for GSM8K, ask it a question in llama-cli, and measure it beside stock files. Called by tools/demo."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from fetch_models import MODELS, fetch_model

from tacq_export.console import ConsoleReporter, guarded, positive, wait_passively  # noqa: E402

wait_passively()  # before torch is imported

from tacq_export.errors import TacqError  # noqa: E402
from tacq_export.evaluation.compare_rows import table  # noqa: E402
from tacq_export.evaluation.compare_stock import CompareConfig, compare_stock  # noqa: E402
from tacq_export.runtime.build import tool  # noqa: E402

DATA = Path(__file__).resolve().parent / "data"
QUESTION = (
    "A baker makes 12 loaves a day and sells each for 3 dollars. How many dollars does he earn in a week of 7 days?"
)


def say(text: str) -> None:
    """Progress and talk on stderr: stdout holds the answer, the table and the JSON line."""
    print(f"\n== {text}", file=sys.stderr, flush=True)


def export_model(model: Path, outfile: Path, options: list[str]) -> None:
    """Run the exporter as a user would."""
    command = [
        sys.executable,
        "-m",
        "tacq_export",
        str(model),
        "--task",
        str(DATA / "gsm8k-train-128.jsonl"),
        "--outfile",
        str(outfile),
        "--force",
        *options,
    ]
    say(" ".join(["tacq-export", *command[3:]]))
    if subprocess.run(command).returncode:
        raise TacqError("the export failed, as said above.")


def ask(file: Path, threads: int | None) -> None:
    """One question, answered by llama-cli."""
    say(f"llama-cli: {QUESTION}")
    command = [
        str(tool("llama-cli")),
        "-m",
        str(file),
        "-p",
        QUESTION,
        "--single-turn",
        "--temp",
        "0",
        "-n",
        "160",
        "--simple-io",
    ]
    done = subprocess.run(
        command + (["-t", str(threads)] if threads else []),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode or not done.stdout.strip():
        raise TacqError(f"llama-cli failed with status {done.returncode}: {done.stderr.strip()[-300:]}")
    print(done.stdout.strip(), flush=True)


def run(args: argparse.Namespace) -> None:
    """Export, ask, compare; the table and one JSON line."""
    started = time.monotonic()
    args.outdir.mkdir(parents=True, exist_ok=True)
    model = fetch_model(args.model)
    outfile = args.outdir / f"{args.model}-gsm8k-tacq2.gguf"
    threads = ["--threads", str(args.threads)] if args.threads else []
    begun = time.monotonic()
    export_model(model, outfile, threads + args.options)
    seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    ask(outfile, args.threads)
    say("comparing with stock files (24 examples that were not calibrated on)")
    rows = compare_stock(
        CompareConfig(
            str(model),
            DATA / "gsm8k-train-128.jsonl",
            DATA / "gsm8k-test-24.jsonl",
            args.outdir / f"{args.model}-stock",
            [outfile],
            args.types.split(","),
            threads=args.threads,
        ),
        ConsoleReporter(),
    )
    print(f"\n{args.model}; reference: its GGUF dequantized to F16; on gsm8k-test-24.jsonl, chat template, whole text")
    print("\n".join(table(rows)))
    print(f"everything: {time.monotonic() - started:.0f} s", flush=True)
    ours, stock = rows[1], [row for row in rows if row.kind == "stock"]
    print(
        json.dumps(
            {
                "file_bytes": ours.file_bytes,
                "bpw_file": ours.bpw_file,
                "bpw_linear": ours.bpw_linear,
                "kl": ours.kl,
                "ppl": ours.ppl,
                "top1": ours.top1,
                "seconds": round(seconds, 1),
                "peak_rss_bytes": peak,
                "stock": [
                    {"type": row.name}
                    | {key: getattr(row, key) for key in ("file_bytes", "bpw_linear", "kl", "ppl", "top1")}
                    for row in stock
                ],
            }
        )
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", choices=sorted(MODELS), help="default smollm2-135m")
    parser.add_argument("--outdir", type=Path, default=Path("demo-out"), help="default demo-out")
    parser.add_argument("--types", default="Q2_K,IQ3_XXS", help="stock types to compare with (default Q2_K,IQ3_XXS)")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("options", nargs="*", help="after --: more flags of tacq-export")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), "interrupted; the same command fetches nothing again and exports anew")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
