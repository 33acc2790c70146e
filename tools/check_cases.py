#!/usr/bin/env python3
"""Give tacq-export the inputs that used to go wrong, run as a user runs it, and say what each of them gets. Called by
tools/check_cases. The inputs are made by case_inputs.py, and what is right is decided by cases.py."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "inputs")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the matrices are tiny

from tacq_export.console import guarded, wait_passively  # noqa: E402

wait_passively()

from cases import CASES, Wrong  # noqa: E402

from tacq_export.errors import TacqError  # noqa: E402


def check(name: str, folder: Path) -> dict:
    """What one input gets, and whether that is right."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        gets, ok = CASES[name](folder), True
    except Wrong as wrong:
        gets, ok = str(wrong), False
    except Exception as error:  # of what makes the input or measures the file: it has shown nothing
        traceback.print_exc()
        gets, ok = f"could not be checked: {type(error).__name__}: {' '.join(str(error).split())[:200]}", False
    return {"name": name, "gets": gets, "ok": ok, "seconds": time.monotonic() - began}


def table(rows: list[dict]) -> list[str]:
    """Markdown: one line an input."""
    lines = ["| input | what it gets | right |", "|---|---|---|"]
    for row in rows:
        cells = [row["name"], row["gets"].replace("|", "\\|"), "yes" if row["ok"] else "**no**"]
        lines.append("| " + " | ".join(cells) + " |")
    good = sum(row["ok"] for row in rows)
    return [*lines, "", f"{len(rows)} tried: {good} right, {len(rows) - good} wrong."]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tools/check_cases", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="inputs with one of these in their names")
    parser.add_argument("--keep", metavar="FOLDER", help="keep models and files there")
    args = parser.parse_args(argv)
    wanted = [text.lower() for text in args.only or [""]]
    args.names = [name for name in CASES if any(text in name.lower() for text in wanted)]
    if not args.names:
        parser.error(f"no input has {' or '.join(args.only)} in its name; there are: {'; '.join(CASES)}")
    return args


def main(args: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="tacq-cases-") as temporary:
        for number, name in enumerate(args.names, 1):
            row = check(name, Path(args.keep or temporary).absolute() / str(number))
            rows.append(row)
            verdict = "right" if row["ok"] else "WRONG"
            print(
                f"{number}/{len(args.names)} {name}: {verdict}, {row['seconds']:.0f} s: {row['gets']}", file=sys.stderr
            )
    print("\n".join(table(rows)))
    failed = [row["name"] for row in rows if not row["ok"]]
    if failed:
        raise TacqError(f"{len(failed)} went as they should not: {'; '.join(failed)}; read their lines above.")


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    raise SystemExit(guarded(lambda: main(arguments), "interrupted; --only TEXT ... does a part"))
