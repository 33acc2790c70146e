#!/usr/bin/env python3
"""Export a tiny random model of every architecture of tests/tiny_architectures.py, and say what became of it: exported
or refused, how far the exported file is from its own float reference in llama.cpp, and how far torch is from llama.cpp
on the float file. Called by tools/check_architectures.

Each architecture has a process of its own, so that a crash or an endless loop ends that one alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the matrices are tiny

from tacq_export.console import guarded, positive, wait_passively  # noqa: E402

wait_passively()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from architecture_table import ARCHITECTURES  # noqa: E402
from tiny_architectures import gpt2_tokenizer, write_architecture  # noqa: E402
from tiny_hf import SENTENCES  # noqa: E402

from tacq_export.config import ExportConfig  # noqa: E402
from tacq_export.errors import TacqError  # noqa: E402
from tacq_export.evaluation.verify import compare_models, token_statistics  # noqa: E402
from tacq_export.inputs.make_reference import make_reference  # noqa: E402
from tacq_export.pipeline import export  # noqa: E402
from tacq_export.reporting import Reporter  # noqa: E402
from tacq_export.runtime.build import tool  # noqa: E402
from tacq_export.runtime.llama_logits import LlamaLogits  # noqa: E402
from tacq_export.runtime.run_model import last_error  # noqa: E402

# Nats a token. What is exported must be nearer to torch than that; arithmetic in another order gives 1e-6 to 1e-4.
TORCH_LIMIT = 1e-3
# How much further from its reference than llama-quantize's Q4_0 an exported file may be. Some of these random models
# are so fragile that 4 bits change them much, whoever chooses them; a wrong scale or order of rows changes all of them
# more.
Q4_FACTOR, Q4_MARGIN = 1.5, 0.1
TASK_ROWS = [
    {"question": f"{a}, and how many apples are {i} and {i + 1}", "answer": f"{b}, so {2 * i + 1} apples are left"}
    for i, (a, b) in enumerate(zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True))
]
# Longer than the sliding windows of the tiny models.
TEXTS = [". ".join(SENTENCES[i] for i in order) for order in ((0, 1, 2), (3, 4, 5), (4, 2, 0))]


def float_reference(folder: Path, work: Path) -> Path:
    """The float GGUF of the tiny model in `folder`: the one that an export left in its work folder, or a new one."""
    path = work / "reference-f16.gguf"
    if not path.is_file():
        path = folder / "float" / "reference-f16.gguf"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            make_reference(str(folder / "model"), path, Reporter())
    return path


def token_texts(reference: Path) -> list[list[int]]:
    """TEXTS in the tokens of the file, BOS first where it wants one."""
    with LlamaLogits(reference, 256, 1) as llama:
        return [llama.bos() + llama.tokenize(text) for text in TEXTS]


def torch_against_llama(model, reference: Path, texts: list[list[int]]) -> tuple[float, float, float]:
    """(mean, largest, mean of the text that agrees best) of KL(torch || llama.cpp) over all positions, nats a token.

    Two experts may be so nearly tied that rounding decides: then one text goes apart from that token on. Another
    function is apart in all texts.
    """
    found = []
    with LlamaLogits(reference, max(map(len, texts)), 1) as llama:
        for text in texts:
            with torch.no_grad():
                ours = model(input_ids=torch.tensor([text])).logits[0].float().numpy()
            theirs = np.concatenate([logits.copy() for _, logits in llama.chunks(text)])
            width = min(ours.shape[1], theirs.shape[1])  # a converter may drop or add rows of padding
            found.append(token_statistics(ours[:, :width], theirs[:, :width], np.array([*text[1:], text[0]]))[:, 0])
    kl = np.concatenate(found)
    return float(kl.mean()), float(kl.max()), min(float(text.mean()) for text in found)


def check(name: str, folder: Path, args: argparse.Namespace, note: Callable[[dict], None]) -> dict:
    """Everything about one architecture, as plain facts. Runs in a process of its own. note: takes what is known before
    llama.cpp runs in this process, which it may abort."""
    facts: dict = {"name": name}
    model = write_architecture(folder / "model", name)
    facts["weights"] = sum(p.numel() for p in model.parameters())
    task, outfile, work = folder / "task.jsonl", folder / "out.gguf", folder / "work"
    if args.float_only:
        facts["outcome"] = "converted"
        return facts | measure(model, folder, work)
    task.write_text("".join(json.dumps(row) + "\n" for row in TASK_ROWS))
    source = folder / "model"
    try:
        if args.from_gguf:
            source = float_reference(folder, work)
        began = time.monotonic()
        result = export(ExportConfig(str(source), task, outfile, target_bpw=args.target_bpw, workdir=work, threads=1))
        facts |= {"outcome": "exported", "seconds": time.monotonic() - began, "bpw_file": result.bpw_file}
    except TacqError as error:
        facts |= {"outcome": "refused", "sentence": str(error)}
        if outfile.exists():
            facts |= {"outcome": "wrong", "sentence": f"refused, and the output was left behind: {error}"}
    note(facts)
    facts |= measure(model, folder, work, source if args.from_gguf else None, outfile)
    if facts["outcome"] == "exported":
        facts |= wrong_file(facts)
    return facts


def measure(model, folder: Path, work: Path, reference: Path | None = None, outfile: Path | None = None) -> dict:
    """torch against llama.cpp on the float file, and the exported file, if there is one, against its reference."""
    facts: dict = {}
    try:
        converted = float_reference(folder, work)
        texts = token_texts(converted)
        facts["torch_kl"], facts["torch_kl_max"], facts["torch_kl_best"] = torch_against_llama(model, converted, texts)
        if outfile is not None and outfile.exists():
            facts["kl"] = compare_models(reference or converted, outfile, texts, 1).kl
            facts["q4_kl"] = compare_models(converted, stock_file(converted, folder / "q4_0.gguf"), texts, 1).kl
    except TacqError as error:
        facts["measured"] = str(error)
    return facts


def stock_file(reference: Path, path: Path) -> Path:
    """llama-quantize's Q4_0 of the float file, embedding and head as they are."""
    ends = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    done = subprocess.run([tool("llama-quantize"), *ends, reference, path, "Q4_0", "1"], capture_output=True, text=True)
    if done.returncode:
        raise TacqError(f"llama-quantize cannot make a Q4_0 of {reference}: {last_error(done.stderr)}")
    return path


def wrong_file(facts: dict) -> dict:
    """What makes an exported file a wrong one; empty if nothing."""
    if "measured" in facts:
        return {"outcome": "wrong", "sentence": f"exported, but cannot be measured: {facts['measured']}"}
    if not facts["torch_kl_best"] < TORCH_LIMIT:
        return {"outcome": "wrong", "sentence": "exported, though torch and llama.cpp compute different functions"}
    if not facts["kl"] < Q4_FACTOR * facts["q4_kl"] + Q4_MARGIN:
        return {"outcome": "wrong", "sentence": "exported, but the file is far from its reference"}
    return {}


def run_child(answer: Path, log: Path, arguments: tuple) -> None:
    """The process of one architecture: its own group, all its words in `log`, its facts in `answer`."""
    os.setsid()
    os.nice(10)
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        facts = check(*arguments, lambda facts: answer.write_text(json.dumps(facts)))
    except Exception as error:
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        cause = (
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(place.filename).name}:{place.lineno})"
        )
        facts = {"name": arguments[0], "outcome": "traceback", "sentence": cause}
    answer.write_text(json.dumps(facts))


def in_own_process(name: str, folder: Path, args: argparse.Namespace) -> dict:
    """`check` in a fork of this process, which has torch loaded already; its whole group is ended at the limit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    answer, log = folder / "facts.json", folder / "log.txt"
    began = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=run_child, args=(answer, log, (name, folder, args)))
    child.start()
    child.join(args.timeout)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        facts = {"name": name, "outcome": "timeout", "sentence": f"took more than {args.timeout} s"}
    else:
        facts = json.loads(answer.read_text()) if answer.is_file() else {"name": name}
        # What was refused may well abort in llama.cpp when it is measured here: that is why it was refused.
        if child.exitcode and facts.get("outcome") != "refused":
            facts |= {"outcome": "crash", "sentence": f"the process ended with status {child.exitcode}"}
    return facts | {"total_seconds": time.monotonic() - began, "log": str(log)}


def number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)


def table(rows: list[dict]) -> list[str]:
    """Markdown: one line an architecture."""
    lines = [
        "| architecture | outcome | KL of the file | of Q4_0 | torch and llama.cpp, mean KL | largest | s | why |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["name"],
            row["outcome"],
            number(row.get("kl"), ".4f"),
            number(row.get("q4_kl"), ".4f"),
            number(row.get("torch_kl"), ".1e"),
            number(row.get("torch_kl_max"), ".1e"),
            number(row["total_seconds"], ".0f"),
            (row.get("sentence") or row.get("measured") or "").replace("|", "\\|")[:300],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in {row["outcome"] for row in rows}}
    lines.append("")
    lines.append(f"{len(rows)} tried: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) + ".")
    return lines


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tools/check_architectures", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone; a part of a name is enough")
    parser.add_argument("--from-gguf", action="store_true", help="give the float GGUF as MODEL, not the folder")
    parser.add_argument("--float-only", action="store_true", help="convert and compare torch with llama.cpp; no export")
    parser.add_argument("--target-bpw", type=float, default=4.25, help="bits a weight of the matrices (default: 4.25)")
    parser.add_argument("--timeout", type=positive, default=240, help="seconds for one architecture (default: 240)")
    parser.add_argument("--outfile-json", metavar="FILE", help="one JSON line for each, as they are done")
    parser.add_argument("--keep", metavar="FOLDER", help="keep models, files and logs there")
    args = parser.parse_args(argv)
    # A whole name is that one alone, though it may be a part of others.
    matches = {part: [n for n in ARCHITECTURES if part.lower() in n.lower()] for part in args.only or [""]}
    matches |= {part: [part] for part in matches if part in ARCHITECTURES}
    names = [name for name in ARCHITECTURES if name in sum(matches.values(), [])]
    if not names:
        parser.error(f"no architecture has {' or '.join(args.only)} in its name; there are: {', '.join(ARCHITECTURES)}")
    args.names = names
    return args


def main(args: argparse.Namespace) -> None:
    rows = []
    gpt2_tokenizer()  # takes seconds: once here, and not in each of the processes
    with tempfile.TemporaryDirectory(prefix="tacq-architectures-") as temporary:
        for name in args.names:
            row = in_own_process(name, Path(args.keep or temporary).absolute() / name, args)
            rows.append(row)
            print(f"{len(rows)}/{len(args.names)} {name}: {row['outcome']} {row.get('sentence', '')}", file=sys.stderr)
            if args.outfile_json:
                with open(args.outfile_json, "a" if len(rows) > 1 else "w") as f:
                    f.write(json.dumps(row) + "\n")
    print("\n".join(table(rows)))
    failed = [row["name"] for row in rows if row["outcome"] not in ("exported", "refused", "converted")]
    if failed:
        raise TacqError(f"{len(failed)} went as they should not: {', '.join(failed)}; read their lines above.")


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    raise SystemExit(guarded(lambda: main(arguments), "interrupted; --only NAME ... does a part"))
