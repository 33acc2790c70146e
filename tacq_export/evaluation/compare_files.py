"""Stock files of a model, made with llama-imatrix and llama-quantize: what `tacq-export compare` puts beside ours."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np

from ..errors import TacqError
from ..files import written_atomically
from ..format.gguf_file import open_gguf, padded
from ..format.inspect_gguf import FileFacts
from ..format.tensor_types import register_with_gguf
from ..reporting import Reporter
from ..runtime.build import tool
from ..runtime.run_model import last_error

# What `nearest_types` chooses from: llama-quantize's types for models that were not trained for a type. Not Q1_0, Q2_0,
# TQ1_0 and TQ2_0, which round to two or three levels and need such a model.
# In rising quality: of two of one size the later is taken.
CANDIDATES = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "Q2_K_S",
    "Q2_K",
    "Q3_K_S",
    "IQ3_XXS",
    "IQ3_XS",
    "IQ3_S",
    "IQ3_M",
    "Q3_K_M",
    "Q3_K_L",
    "IQ4_XS",
    "Q4_0",
    "IQ4_NL",
    "Q4_K_S",
    "Q4_K_M",
    "Q4_1",
    "Q5_0",
    "Q5_K_S",
    "Q5_K_M",
    "Q5_1",
    "Q6_K",
    "Q8_0",
)
# Of stock types that are larger than our file by about as much, the largest is taken: with fallbacks half a dozen types
# lie within a few percent, and the smallest of them has 1-bit matrices where nothing fell back.
ABOUT_EQUAL = 1.03


@dataclass(frozen=True)
class StockPlan:
    """What llama-quantize will write. file_bytes: within a kilobyte (it notes the imatrix in the metadata);
    fell_back: {"Q2_K -> Q4_0": tensors whose width the type cannot hold}; wanted: {tensor: ggml's name of the type that
    it would have got, could that hold its width}."""

    type: str
    file_bytes: int
    fell_back: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)


def run_tool(command: list[str], reporter: Reporter, what: str, step: str, total: str | None = None) -> str:
    """Run a program of our build with progress; returns what it said. `step` matches its output at each step: the
    number done and, unless the pattern `total` finds that elsewhere in the output, of how many.

    Raises TacqError with the program's reason if it fails.
    """
    log, of = b"", 0
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None  # a pipe
        while piece := os.read(process.stdout.fileno(), 4096):
            log += piece
            recent = log[-8192:].decode(errors="replace")
            if total and not of and (found := re.search(total, recent)):
                of = int(found[1])
            if steps := re.findall(step, recent):
                done, of = (int(steps[-1]), of) if total else map(int, steps[-1])
                reporter.progress(min(done, of), of, what)
    if process.returncode:
        raise TacqError(f"{Path(command[0]).name} failed: {last_error(log.decode(errors='replace'))}")
    return log.decode(errors="replace")


def make_imatrix(reference: Path, text: str, outfile: Path, threads: int | None, reporter: Reporter) -> None:
    """llama-imatrix of the calibration text (in the chat template, control tokens parsed)."""
    source = outfile.with_suffix(".txt")
    source.write_text(text, encoding="utf-8")
    with written_atomically(outfile) as partial:
        command = [
            str(tool("llama-imatrix")),
            "-m",
            str(reference),
            "-f",
            str(source),
            "-o",
            str(partial),
            "--parse-special",
        ]
        command += ["--output-format", "gguf", "-c", "512"] + (["-t", str(threads)] if threads else [])
        run_tool(command, reporter, "imatrix", r"\[(\d+)\]\d", total=r"computing over (\d+) chunks")
        if not partial.is_file():
            raise TacqError(
                "llama-imatrix wrote no file: the calibration text is too short for one window of 512 tokens; use "
                "more examples."
            )


def _quantize_command(imatrix: Path | None, embedding: str, head: str) -> list[str]:
    command = [
        str(tool("llama-quantize")),
        "--token-embedding-type",
        embedding.lower(),
        "--output-tensor-type",
        head.lower(),
    ]
    return command + (["--imatrix", str(imatrix)] if imatrix else [])


def make_stock(
    reference: Path,
    imatrix: Path | None,
    type_name: str,
    outfile: Path,
    token_embedding_type: str,
    output_tensor_type: str,
    threads: int | None,
    reporter: Reporter,
) -> None:
    """llama-quantize of the float reference to a stock type, embedding and head in the types that our file has."""
    with written_atomically(outfile) as partial:
        command = _quantize_command(imatrix, token_embedding_type, output_tensor_type) + [
            str(reference),
            str(partial),
            type_name.upper(),
        ]
        command += [str(threads)] if threads else []
        run_tool(command, reporter, f"llama-quantize {type_name.upper()}", r"\[ *(\d+)/ *(\d+)\]")


def plan_stock(
    reference: Path, imatrix: Path | None, type_name: str, token_embedding_type: str, output_tensor_type: str
) -> StockPlan:
    """Size and fallbacks of a stock file, by llama-quantize's own dry run. Raises TacqError for a type it does not
    know."""
    command = _quantize_command(imatrix, token_embedding_type, output_tensor_type) + [
        "--dry-run",
        str(reference),
        type_name.upper(),
    ]
    try:
        log = run_tool(command, Reporter(), "", r"\[ *(\d+)/ *(\d+)\]")
    except TacqError as error:
        raise TacqError(
            f"{type_name.upper()} cannot be planned ({error}); give --types names that llama-quantize --help lists."
        ) from None
    became = dict(re.findall(r"\] +(\S+) +- \[[^\]]*\].*?-> .*?\((\w+)\)", log))
    fell = re.findall(r"warning: +(\S+) +- ncols.*?required for type +(\w+)\).*?falling back to +(\w+)", log)
    names = [f"{wanted.upper()} -> {got.upper()}" for _, wanted, got in fell]
    wanted = became | {name: kind for name, kind, _ in fell}
    return StockPlan(
        type_name.upper(),
        _file_bytes(reference, became),
        {name: names.count(name) for name in dict.fromkeys(names)},
        wanted,
    )


def _file_bytes(reference: Path, became: dict[str, str]) -> int:
    """Bytes of the reference's file with its tensors in other types: {name: ggml's name of the type}."""
    tensors, align = _sizes(reference)
    change = 0
    for name, (n_weights, n_bytes) in tensors.items():
        if (kind := became.get(name, "").upper()) and kind not in gguf.GGMLQuantizationType.__members__:
            raise TacqError(
                f"gguf-py does not know the type {kind} and could not read the file; leave it out of --types."
            )
        if kind:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            change += padded(n_weights // block * size, align) - padded(n_bytes, align)
    return reference.stat().st_size + change


@lru_cache(maxsize=1)  # a reader takes a second to go through the vocabulary, and each candidate asks
def _sizes(reference: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """{tensor: (weights, bytes)} and the alignment of a GGUF."""
    register_with_gguf()
    reader = open_gguf(reference)
    return {t.name: (int(t.n_elements), int(t.n_bytes)) for t in reader.tensors}, int(reader.alignment)


def nearest_types(plans: Sequence[StockPlan], file_bytes: int) -> list[str]:
    """The stock types to put beside a file of that size: the largest below, and the nearest at or above.

    Above, it is the largest of those within 3 % of the nearest, which favours the stock side.
    """
    below = [p for p in plans if p.file_bytes < file_bytes]
    above = [p for p in plans if p.file_bytes >= file_bytes]
    limit = ABOUT_EQUAL * min((p.file_bytes for p in above), default=0)
    near = [p for p in above if p.file_bytes <= limit]
    # reversed: max takes the first of equals
    return [max(reversed(some), key=lambda p: p.file_bytes).type for some in (below, near) if some]


def embedding_and_head(facts: FileFacts) -> tuple[str, str]:
    """Types of a file's token embedding and head; the embedding's where the head is a copy of it. Raises TacqError if
    it has none."""
    kinds = {t.name: t.type for t in facts.tensors}
    if "token_embd.weight" not in kinds:
        raise TacqError(f"{facts.path} has no token_embd.weight; give a GGUF of a language model.")
    embedding = kinds["token_embd.weight"]
    return embedding, kinds.get("output.weight", embedding)


def imatrix_importance(imatrix: Path) -> dict[str, np.ndarray]:
    """{tensor name: float32 [columns], mean square of each input} of an imatrix in llama-imatrix's GGUF format."""
    tensors = {t.name: t for t in open_gguf(imatrix).tensors}
    importance = {}
    for name, tensor in tensors.items():
        counts = tensors.get(name.removesuffix("in_sum2") + "counts")
        if name.endswith(".in_sum2") and counts is not None and counts.n_elements == 1:  # more: one for each expert
            importance[name.removesuffix(".in_sum2")] = np.asarray(tensor.data, np.float32).reshape(-1) / max(
                float(counts.data.reshape(-1)[0]), 1.0
            )
    return importance
