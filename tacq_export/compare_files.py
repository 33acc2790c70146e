"""Our file beside stock ones of the same model: made with llama-quantize and llama-imatrix, measured on the same texts."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import TacqError
from .inspect_gguf import inspect_gguf
from .reporting import Reporter
from .run_model import last_error
from .runtime import tool
from .verify_gguf import compare_models
from .write_gguf import written_atomically


@dataclass(frozen=True)
class ComparedFile:
    """One line of the table. kl: nats a token to the reference; types: {type: how many
    matrices of the blocks have it}; a stock file falls back to larger types where its own does not fit a width."""

    type: str
    file_bytes: int
    bpw_file: float
    bpw_linear: float
    kl: float
    kl_stderr: float
    ppl: float
    ref_ppl: float
    top1: float
    types: dict[str, int]

    def as_dict(self) -> dict:
        return asdict(self)


def _run_tool(command: list[str], reporter: Reporter, what: str, step: str, total: str | None = None) -> None:
    """Run a program of our build with progress. `step` matches its output at each step: the number done and, unless the
    pattern `total` finds that elsewhere in the output, of how many. Raises TacqError with the program's reason if it fails.
    """
    log, of = b"", 0
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
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


def make_imatrix(reference: Path, text: str, outfile: Path, threads: int | None, reporter: Reporter) -> None:
    """llama-imatrix of the calibration text (in the chat template, control tokens parsed)."""
    source = outfile.with_suffix(".txt")
    source.write_text(text, encoding="utf-8")
    with written_atomically(outfile) as partial:
        command = [str(tool("llama-imatrix")), "-m", str(reference), "-f", str(source), "-o", str(partial), "--parse-special"]
        command += ["--output-format", "gguf", "-c", "512"] + (["-t", str(threads)] if threads else [])
        _run_tool(command, reporter, "imatrix", r"\[(\d+)\]\d", total=r"computing over (\d+) chunks")
        if not partial.is_file():
            raise TacqError("llama-imatrix wrote no file: the calibration text is too short for one window of 512 tokens; use more examples.")


def make_stock(
    reference: Path, imatrix: Path | None, type_name: str, outfile: Path, token_embedding_type: str, output_tensor_type: str,
    threads: int | None, reporter: Reporter,
) -> None:  # fmt: skip
    """llama-quantize of the float reference to a stock type, embedding and head in the types that our file has."""
    with written_atomically(outfile) as partial:
        command = [str(tool("llama-quantize")), "--token-embedding-type", token_embedding_type, "--output-tensor-type", output_tensor_type]
        command += (["--imatrix", str(imatrix)] if imatrix else []) + [str(reference), str(partial), type_name.upper()]
        command += [str(threads)] if threads else []
        _run_tool(command, reporter, f"llama-quantize {type_name.upper()}", r"\[ *(\d+)/ *(\d+)\]")


def measure(
    reference: Path, candidate: Path, label: str, texts: Sequence[Sequence[int]], threads: int | None, reporter: Reporter
) -> ComparedFile:
    """Size and quality of one file on token lists held out from calibration."""
    facts = inspect_gguf(candidate)
    quality = compare_models(reference, candidate, texts, threads, lambda done, total: reporter.progress(done, total, f"measuring {label}"))
    return ComparedFile(label, facts.file_bytes, facts.bpw_file, facts.bpw_linear, quality.kl, quality.kl_stderr, quality.ppl, quality.ref_ppl, quality.top1, facts.types())


def table(rows: Sequence[ComparedFile]) -> list[str]:
    """The comparison as aligned text."""
    lines = [f"{'file':<22} {'MB':>8} {'bpw file':>9} {'bpw linear':>11} {'KL':>8} {'+-':>7} {'ppl':>8} {'top-1':>7}"]
    for row in rows:
        lines.append(
            f"{row.type:<22} {row.file_bytes / 1e6:>8.1f} {row.bpw_file:>9.3f} {row.bpw_linear:>11.3f} "
            f"{row.kl:>8.4f} {row.kl_stderr:>7.4f} {row.ppl:>8.3f} {row.top1:>7.3f}"
        )
        lines.append(f"{'':<4}({', '.join(f'{count} {kind}' for kind, count in row.types.items())})")
    return lines
