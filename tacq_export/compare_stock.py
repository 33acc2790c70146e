"""Make stock files of the same model and measure all of them with ours: the work behind `tacq-export compare`."""

from __future__ import annotations

from pathlib import Path

from .compare_files import ComparedFile, make_imatrix, make_stock, measure
from .errors import TacqError
from .inspect_gguf import inspect_gguf
from .load_model import EMBEDDING, HEAD, make_reference
from .load_task import gguf_tokenizer, load_task, render_example, tokenize_task
from .reporting import Reporter
from .runtime import runtime_path


def compare_stock(
    model: str, ours: Path, task: Path, held_out: Path, types: list[str], n_samples: int, n_eval: int, threads: int | None,
    workdir: Path, reporter: Reporter,
) -> tuple[list[ComparedFile], ComparedFile]:  # fmt: skip
    """(rows, the reference's own): our file first, then each stock type, measured on `n_eval` examples of `held_out`.

    The reference is the float GGUF of `model`; each stock file is quantized from it with an imatrix of the same `n_samples`
    calibration examples, embedding and head in the types that our file has. Files stay in `workdir` and are used again.
    Raises TacqError: runtime not built, a type that llama-quantize does not know, files of another model.
    """
    runtime_path()
    calibration, evaluation = load_task(task), load_task(held_out)
    facts = inspect_gguf(ours)
    kinds = {t.name: t.type.lower() for t in facts.tensors}
    if EMBEDDING not in kinds:
        raise TacqError(f"{ours} has no {EMBEDDING}; give a GGUF of a language model.")
    embedding, head = kinds[EMBEDDING], kinds.get(HEAD, kinds[EMBEDDING])
    workdir.mkdir(parents=True, exist_ok=True)
    reference = workdir / "reference-f16.gguf"
    if not reference.is_file():
        make_reference(model, reference, reporter)
    tokenizer = gguf_tokenizer(reference)
    texts = tokenize_task(evaluation, tokenizer, n_eval, 2048)
    imatrix = workdir / "task.imatrix.gguf"
    if not imatrix.is_file():
        rendered = "\n".join(render_example(example, tokenizer) for example in calibration.examples[:n_samples])
        make_imatrix(reference, rendered, imatrix, threads, reporter)
    rows = [measure(reference, ours, "ours", texts, threads, reporter)]
    for name in types:
        stock = workdir / f"{name.lower()}-{embedding}.gguf"
        if not stock.is_file():
            make_stock(reference, imatrix, name, stock, embedding, head, threads, reporter)
        rows.append(measure(reference, stock, name.upper(), texts, threads, reporter))
    full = inspect_gguf(reference)
    ppl = rows[0].ref_ppl  # it agrees with itself: no divergence, every top token the same
    return rows, ComparedFile("reference, F16", full.file_bytes, full.bpw_file, full.bpw_linear, 0.0, 0.0, ppl, ppl, 1.0, full.types())
