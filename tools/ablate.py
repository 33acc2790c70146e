#!/usr/bin/env python3
"""What each part of the method is worth: exports that differ in one option, each measured on held-out examples.

    ablate.py smollm2-135m [--only scores density ...] [--data FOLDER] [--out tools/results/ablation-NAME.json]

Every row is written as soon as it is measured; the same command goes on. Experiments:

    density      kept weights against the same bytes spent on wider types: TACQ2 with more and more kept, and of the
                 same size
                 what the allocator makes, with and without kept weights; and how well it predicts all of them
    scores       which weights are kept: the scores of tacq-export, at equal bytes, TACQ2 everywhere
    quantizer    sweeps of coordinate descent, damping, shrinkage, token weights, norms and biases tuned; inputs of the
                 quantized model and how
                 much is made up for, with the default calibration and with 32 examples
    size         how many examples (256 and 512 need --data)
    calibration  the task's examples, also in windows of 2,048 tokens; another task's and general text (needs --data),
                 alone and mixed in

All rows have the KL, perplexity and top-1 on GSM8K, those of `size` and `calibration` also on Spider and wikitext2
(with --data). All but the rows that say so have --hessian-inputs float, which takes a third of the time: rows are to be
compared with each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fetch_models import MODELS, fetch_model  # noqa: E402

from tacq_export.console import ConsoleReporter, guarded, positive, wait_passively  # noqa: E402

wait_passively()  # before torch is imported

from tacq_export.config import SCORES, ExportConfig  # noqa: E402
from tacq_export.evaluation.verify import compare_models  # noqa: E402
from tacq_export.files import written_atomically  # noqa: E402
from tacq_export.inputs.load_task import load_task  # noqa: E402
from tacq_export.inputs.make_reference import make_reference  # noqa: E402
from tacq_export.inputs.tokenize_task import render_example, tokenize_task  # noqa: E402
from tacq_export.inputs.tokenizer import ModelTokenizer  # noqa: E402
from tacq_export.pipeline import export  # noqa: E402

TOOLS = Path(__file__).resolve().parent
DATA = TOOLS / "data"
RATIOS = (0.001, 0.002, 0.004, 0.008, 0.016)
GSM8K = DATA / "gsm8k-train-128.jsonl"
MIXED = (0.1, 0.25)
GUARDS = [
    (1, 0),
    (1, 0.5),
    (0.5, 0),
    (0.5, 0.5),
    (0.5, 1),
    (0.25, 0.5),
]  # compensation and shrinkage: two ways not to believe few examples too much
KEEP = {"may keep": True, "none kept": False}


def make_tasks(folder: Path, data: Path | None, tokenizer) -> None:
    """Task files made of others: the examples as one text, and with a share of general text in place of as many of
    them."""
    examples = GSM8K.read_text(encoding="utf-8").splitlines()
    texts = [render_example(example, tokenizer) for example in load_task(GSM8K).examples]
    (folder / "packed.txt").write_text("".join(texts), encoding="utf-8")
    if not data:
        return
    general = textwrap.wrap(
        (data / "wikitext2" / "calibration.txt").read_text(encoding="utf-8"), 1000
    )  # about as long as an example
    for share in MIXED:
        n = round(share * len(examples))
        rows = examples[n:] + [json.dumps({"text": text}) for text in general[:n]]
        (folder / f"mixed-{share:g}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def experiments(data: Path | None, made: Path) -> list[tuple[str, str, dict]]:
    """(experiment, name of the row, options of the export that differ from the defaults). made: folder of
    `make_tasks`."""
    found = [
        ("density", f"allocated, {bpw}, {what}", {"target_bpw": bpw, "no_kept": not keep})
        for bpw in (2.6, 3.0, 3.5)
        for what, keep in KEEP.items()
    ]
    found += [
        ("density", f"all {base.upper()}", {"base_type": base, "no_kept": True}) for base in ("tacq2", "tacq3", "tacq4")
    ]
    for ratio in RATIOS:
        name = f"TACQ2, {100 * ratio:g} % kept"
        found += [("density", name, {"base_type": "tacq2", "ratio": ratio})]
        found += [
            ("density", f"as large as {name}: allocated, {what}", {"same_bytes_as": name, "no_kept": not keep})
            for what, keep in KEEP.items()
        ]
    found += [("scores", score, {"base_type": "tacq2", "score": score}) for score in SCORES]
    found += [("scores", "tacq, Q(W) by GPTQ", {"base_type": "tacq2", "score": "tacq", "reference": "gptq"})]
    found += [("quantizer", f"{n} sweeps", {"refine_sweeps": n}) for n in (3, 0, 1, 6)]
    found += [("quantizer", f"damping {d:g}", {"damping": d}) for d in (0.003, 0.03)]
    found += [("quantizer", "equal token weights", {"hessian": "plain"})]
    found += [("quantizer", f"shrinkage {s:g}", {"shrinkage": s}) for s in (0, 0.25, 1)]
    for of, few in (("", {}), (", 32 examples", {"n_samples": 32})):
        found += [
            (
                "quantizer",
                f"inputs of the quantized model, compensation {c:g}, shrinkage {s:g}{of}",
                {"hessian_inputs": "quantized", "compensation": c, "shrinkage": s} | few,
            )
            for c, s in GUARDS
        ]
    found += [("quantizer", "64 examples, norms and biases tuned on the others", {"n_samples": 64, "tune": True})]
    found += [("size", f"{n} examples of the task", {"n_samples": n}) for n in (32, 64, 128)]
    if data:
        found += [
            ("size", f"{n} examples of the task", {"task": data / "gsm8k" / "train.jsonl", "n_samples": n})
            for n in (256, 512)
        ]
    found += [("calibration", "128 examples of the task", {"n_samples": 128})]
    if data:
        found += [("calibration", "Spider", {"task": data / "spider" / "calibration.jsonl"})]
        found += [
            (
                "calibration",
                "wikitext2, 14 windows of 2048",
                {"task": data / "wikitext2" / "calibration.txt", "n_samples": 14},
            )
        ]
    found += [("calibration", "all in windows of 2048", {"task": made / "packed.txt", "n_samples": 14})]
    if data:
        found += [
            ("calibration", f"{100 * share:g} % general text", {"task": made / f"mixed-{share:g}.jsonl"})
            for share in MIXED
        ]
    return found


def run(args: argparse.Namespace) -> None:
    """Every experiment that the results do not have yet."""
    name = args.name or Path(args.model).name.removesuffix(".gguf").lower()
    out, work = args.out or TOOLS / "results" / f"ablation-{name}.json", args.workdir or Path(f"ablate-{name}.work")
    reporter = ConsoleReporter()
    model = str(fetch_model(args.model)) if args.model in MODELS else args.model
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    reference = work / "reference.gguf"
    if not reference.is_file():
        make_reference(model, reference, reporter)
    tokenizer = ModelTokenizer(reference)
    texts = {
        "gsm8k": tokenize_task(
            load_task(args.data / "gsm8k" / "test.jsonl" if args.data else DATA / "gsm8k-test-24.jsonl"),
            tokenizer,
            args.n_eval,
            2048,
        )
    }
    elsewhere = {}  # what a calibration costs where it did not come from
    if args.data:
        elsewhere["spider"] = tokenize_task(
            load_task(args.data / "spider" / "eval.jsonl"), tokenizer, args.n_eval, 2048
        )
        elsewhere["wikitext2"] = tokenize_task(load_task(args.data / "wikitext2" / "test.raw"), tokenizer, 10, 512)
    rows = json.loads(out.read_text()) if out.is_file() else []
    make_tasks(work, args.data, tokenizer)
    for experiment, label, options in experiments(args.data, work):
        if (
            args.only
            and experiment not in args.only
            or any((row["experiment"], row["name"]) == (experiment, label) for row in rows)
        ):
            continue
        print(f"\n== {experiment}: {label}", file=sys.stderr, flush=True)
        task = options.get("task", GSM8K)
        # What calibrates alike shares a work folder, and calibrates once.
        shared = work / "-".join(
            [task.stem, str(options.get("n_samples", args.n_samples)), options.get("hessian", "gradient")]
        )
        options = dict(options)
        if other := options.pop("same_bytes_as", None):
            options["target_bpw"] = next(row["bpw_linear"] for row in rows if row["name"] == other)
        plain = {
            "task": task,
            "n_samples": args.n_samples,
            "hessian_inputs": "float",
            "token_embedding_type": "f16",
            "output_tensor_type": "f16",
            "threads": args.threads,
        }
        outfile = work / "now.gguf"
        started = time.monotonic()
        result = export(
            ExportConfig(model=model, outfile=outfile, workdir=shared, force=True, **(plain | options)), reporter
        )
        row = {
            "experiment": experiment,
            "name": label,
            "bpw_linear": round(result.bpw_linear, 4),
            "file_bytes": result.file_bytes,
            "kept": result.kept,
        }
        row |= {"predicted_loss": result.predicted_loss and round(result.predicted_loss, 5)}
        for held, tokens in (texts | elsewhere if experiment in ("size", "calibration") else texts).items():
            quality = compare_models(
                reference,
                outfile,
                tokens,
                args.threads,
                lambda done, total: reporter.progress(done, total, "measuring"),
            )
            row |= {
                f"{held}_kl": round(quality.kl, 5),
                f"{held}_kl_stderr": round(quality.kl_stderr, 5),
                f"{held}_ppl": round(quality.ppl, 4),
                f"{held}_top1": round(quality.top1, 4),
            }
        rows.append(row | {"seconds": round(time.monotonic() - started)})
        with written_atomically(out) as partial:
            partial.write_text("[" + ",\n ".join(map(json.dumps, rows)) + "]\n")
        print(json.dumps(rows[-1]), flush=True)
        outfile.unlink()
    if (found := rank_correlation(rows)) is not None:
        print(f"Rank correlation of predicted loss and measured KL on the task, {found[1]} files: {found[0]:.4f}")


def rank_correlation(rows: list[dict]) -> tuple[float, int] | None:
    """(Spearman's, number of files) over the rows that have a prediction and the default calibration; None for less
    than three."""
    pairs = [
        (row["predicted_loss"], row["gsm8k_kl"])
        for row in rows
        if row.get("predicted_loss") is not None and row["experiment"] == "density"
    ]
    if len(pairs) < 3:
        return None
    ranks = np.argsort(np.argsort(np.array(pairs), axis=0), axis=0)  # no ties: all are measured
    return float(np.corrcoef(ranks.T)[0, 1]), len(pairs)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/ablate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=f"{', '.join(MODELS)}, or the path of a GGUF")
    parser.add_argument(
        "--only", nargs="+", metavar="E", choices=["density", "scores", "quantizer", "size", "calibration"]
    )
    parser.add_argument(
        "--n-samples", type=positive, default=128, metavar="N", help="calibration examples (default 128)"
    )
    parser.add_argument(
        "--n-eval",
        type=positive,
        default=24,
        metavar="N",
        help="held-out examples of each task (default 24; of wikitext2 10 windows of 512 tokens)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with gsm8k/, spider/ and wikitext2/")
    parser.add_argument("--name", help="of the results (default: the model's)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("-w", "--workdir", type=Path, metavar="DIR", help="default ablate-NAME.work")
    parser.add_argument("--threads", "-t", type=positive, metavar="N")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
