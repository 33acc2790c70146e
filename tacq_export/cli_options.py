"""The options of each command: one parser a command. What an option does at length stands in tacq_export/README.md."""

from __future__ import annotations

import argparse
from dataclasses import fields

from .config import (
    BASE_TYPES,
    DEFAULT_BPW,
    DEFAULT_EMBEDDING_TYPE,
    EMBEDDING_TYPES,
    HESSIAN_INPUTS,
    HESSIANS,
    LOSSES,
    PRECISIONS,
    REFERENCES,
    SCORES,
    ExportConfig,
)
from .console import positive

COMMANDS = {
    "export": "compress a model for a task (the word may be left out: tacq-export MODEL --task FILE)",
    "answer": "let a model write the answers of a task file itself, to calibrate on",
    "inspect": "tensors, types, bits per weight, and where the kept weights sit",
    "verify": "decode in Python and in C; KL divergence, perplexity and top-1 agreement with a reference",
    "compare": "our file beside stock types of the same model",
    "run": "answer a prompt with a GGUF",
    "dequantize": "write a GGUF that stock llama.cpp reads",
    "runtime": "build llama.cpp with our types, or say where the build is",
}
COLUMNS = "columns of the task file that hold the keys expected, such as prompt=Q,completion=A"
# What --outtype takes: the stock types that gguf-py can write.
STOCK_TYPES = [t for t in EMBEDDING_TYPES if t not in BASE_TYPES]


def export_parser(prog: str) -> argparse.ArgumentParser:
    """Flags of an export; each default is ExportConfig's."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compress MODEL for a task and write a GGUF: the few weights that matter to the task stay at 16 "
        "bits, the others get 2 to 4.",
        epilog="other commands:\n"
        + "\n".join(f"  tacq-export {name:<12}{text}" for name, text in COMMANDS.items() if name != "export"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = {f.name: f.default for f in fields(ExportConfig)}

    def add(*flags: str, **settings) -> None:
        name = settings.get("dest") or flags[-1].lstrip("-").replace("-", "_")
        if "action" not in settings and not settings.get("required") and flags[0].startswith("-"):
            settings.setdefault("default", default[name])
            if settings["default"] is not None:
                settings["help"] += " (default %(default)s)"
        parser.add_argument(*flags, **settings)

    add("model", metavar="MODEL", help="Hugging Face folder or hub id, or GGUF file")
    add(
        "--task", required=True, metavar="FILE",
        help="calibration set: examples of the task, JSONL, JSON, CSV, Parquet or plain text",
    )  # fmt: skip
    add("--columns", metavar="K=C,K=C", help=COLUMNS)
    parser.add_argument("--outfile", metavar="OUT.gguf", help="default: MODEL's name with the task's")
    add("--target-bpw", type=float, metavar="B", help=f"most bits per weight of the matrices (default {DEFAULT_BPW})")
    add("--target-size", metavar="S", help="most bytes of the whole file instead: 350M, 1.2G, 512MiB")
    add("--base-type", metavar="T", help=f"one type for all matrices: {', '.join(BASE_TYPES)}")
    add("--no-kept", action="store_true", help="keep no weights at 16 bits: base types only")
    add("--ratio", type=float, metavar="R", help="keep this share of the weights at 16 bits, such as 0.0035")
    parser.add_argument(
        "--tensor-type", action="append", default=[], metavar="REGEX=T", dest="tensor_types",
        help="type of the matrices whose GGUF name matches, such as 'ffn_down=tacq3'; the first match counts",
    )  # fmt: skip
    add("--token-embedding-type", metavar="T", help=f"{', '.join(EMBEDDING_TYPES)} (default {DEFAULT_EMBEDDING_TYPE})")
    add("--output-tensor-type", metavar="T", help="the same for the head, where it is no copy of the embedding")
    add("--n-samples", type=int, metavar="N", help="use the first N examples of the task")
    add("--seq-len", type=int, metavar="N", help="cut each example to N tokens")
    add("--score", metavar="S", help=f"which weights are kept: {', '.join(SCORES)}")
    add("--reference", metavar="R", help=f"how the score's Q(W) is made: {', '.join(REFERENCES)}")
    add("--loss", metavar="L", help=f"tokens whose loss counts: {', '.join(LOSSES)} (the assistant's last turn)")
    add("--hessian", metavar="H", help=f"weight of a token in the Hessian: {', '.join(HESSIANS)}")
    add("--hessian-inputs", metavar="I", help=f"model that gives the Hessian's inputs: {', '.join(HESSIAN_INPUTS)}")
    add("--refine-sweeps", type=int, metavar="N", help="passes of coordinate descent after GPTQ")
    add("--damping", type=float, metavar="D", help="GPTQ's, as a share of the Hessian's mean diagonal")
    add("--shrinkage", type=float, metavar="S", help="raise the Hessian's diagonal by S x columns / tokens of itself")
    add("--compensation", type=float, metavar="A", help="share of earlier matrices' errors that each corrects, 0 to 1")
    add("--precision", metavar="P", help=f"of the calibration: {', '.join(PRECISIONS)} (bf16 is faster)")
    add("--tune", action="store_true", help="fine-tune norms and biases at the end, on N more examples; costs no bytes")
    add("--device", metavar="D", help="auto, cpu, cuda, cuda:N")
    add("--seed", type=int, metavar="N", help="of the random score and of the order of --tune")
    add("-t", "--threads", type=int, metavar="N", help="CPU threads; all unless given")
    add("-w", "--workdir", metavar="DIR", help="keep the calibration here for other sizes; OUT.gguf.work unless given")
    add("--resume", action="store_true", help="go on with an export that was interrupted")
    add("--force", action="store_true", help="replace an output that exists")
    add("--dry-run", action="store_true", help="check everything, say what would be done, write nothing")
    return parser


def answer_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Write FILE's conversations again with MODEL's own greedy answers as their last turns."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face folder or hub id, or GGUF file")
    add("--task", required=True, metavar="FILE", help="examples with questions and answers, as for the export")
    add("--columns", metavar="K=C,K=C", help=COLUMNS)
    add("--outfile", required=True, metavar="OUT.jsonl")
    add("--n-samples", type=positive, default=128, metavar="N", help="answer the first N examples (default 128)")
    add("--n-predict", type=positive, default=512, metavar="N", help="leave out answers of N tokens (default 512)")
    add("--threads", "-t", type=positive, metavar="N", help="CPU threads; all unless given")
    add("--force", action="store_true", help="replace an output that exists")
    return parser


def inspect_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS["inspect"])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    return parser


def verify_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS["verify"])
    add = parser.add_argument
    add("file", metavar="FILE")
    add("--against", metavar="REF", help="GGUF of the same model to compare with, such as the F16 original")
    add("--task", metavar="FILE", help="examples to compare on (not those of the calibration), as for the export")
    add("--columns", metavar="K=C,K=C", help=COLUMNS)
    add("--loss", choices=LOSSES, default="text", help="tokens that count: all, or the answers' alone (default text)")
    add("--text", metavar="FILE", help="plain text to compare on, in windows of 512 tokens")
    add("--n-samples", type=positive, default=24, metavar="N", help="examples or windows (default 24)")
    add("--threads", "-t", type=positive, metavar="N", help="CPU threads; all unless given")
    add("--json", action="store_true", help="one JSON line instead of text")
    return parser


def compare_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure our files and stock ones of the same size (llama-quantize, with llama-imatrix on the same "
        "examples). Prints a table and, as the last line, a JSON list. The same command goes on after an interruption.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face folder, hub id or GGUF; at F16 it is the reference")
    add("--task", required=True, metavar="FILE", help="the calibration set; stock types get their imatrix from it")
    add("--eval", required=True, metavar="FILE", help="other examples, to measure KL, perplexity and top-1 on")
    add("--columns", metavar="K=C,K=C", help=COLUMNS + ", and of --eval")
    add("--file", action="append", metavar="OURS.gguf", help="our file, any number; one is exported unless given")
    add("--types", metavar="T,T", help="stock types; the two nearest in file size unless given")
    add("--emulate", metavar="T,T", help="stock types measured as if they could hold every width, such as Q2_K,Q3_K_M")
    add("--n-samples", type=positive, default=128, metavar="N", help="examples of --task (default 128)")
    add("--n-eval", type=positive, default=24, metavar="N", help="examples of --eval (default 24)")
    add("--loss", choices=LOSSES, default="text", help="tokens that count: all, or the answers' alone (default text)")
    add("--text", metavar="FILE", help="general text, such as wikitext2, to measure what the task costs elsewhere")
    add("--n-windows", type=positive, default=40, metavar="N", help="windows of 512 tokens of --text (default 40)")
    add("--score", choices=["gsm8k", "spider", "none"], default="none", help="count right answers (default none)")
    add("--n-score", type=positive, default=100, metavar="N", help="how many examples are answered (default 100)")
    add("--embedding-type", metavar="T", help="of embedding and head in stock files; as in our file unless given")
    add("--outfile-json", metavar="FILE", help="write the rows there, too")
    add("--png", metavar="FILE", help="draw KL and score against file size (needs matplotlib)")
    add("--threads", "-t", type=positive, metavar="N", help="CPU threads; all unless given")
    add("-w", "--workdir", default="compare.work", metavar="DIR", help="keep files and results (default compare.work)")
    return parser


def run_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=COMMANDS["run"] + ". Other options go to llama.cpp's program as they are."
    )
    add = parser.add_argument
    add("file", metavar="FILE")
    add("-p", "--prompt", required=True)
    add("-n", "--n-predict", type=int, default=256, metavar="N", help="tokens at most (default 256)")
    add("-c", "--ctx-size", type=positive, default=4096, metavar="N", help="context size (default 4096)")
    add("--temp", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default 0)")
    add("--threads", "-t", type=positive, metavar="N", help="CPU threads; all unless given")
    return parser


def dequantize_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS["dequantize"])
    add = parser.add_argument
    add("file", metavar="FILE")
    add("--outfile", required=True, metavar="OUT.gguf")
    add("--outtype", default="f16", choices=STOCK_TYPES, help="type of the matrices (default f16)")
    add("--force", action="store_true", help="replace an output that exists")
    return parser


def runtime_parser(prog: str, backends: list[str]) -> argparse.ArgumentParser:
    """backends: names that --backend takes."""
    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS["runtime"])
    add = parser.add_argument
    add("action", choices=["build", "path"])
    add("--backend", default="cpu", metavar="B", help=f"one of: {', '.join(backends)} (default cpu)")
    add("--jobs", "-j", type=positive, metavar="N", help="compilers at once; all cores unless given")
    return parser
