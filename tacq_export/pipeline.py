"""load -> calibrate -> score -> select -> quantize -> pack -> write -> verify: the whole way of an export on one screen."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .config import BASE_TYPES, ExportConfig
from .errors import TacqError
from .load_model import LoadedModel, load_model
from .load_task import load_task, tokenize_task
from .pack_tensor import unpack_tensor
from .quantize_model import embedding_types, gptq_error, quantize_embedding, quantize_matrices, rounding_error
from .reporting import Reporter
from .runtime_source import need_space
from .score_weights import NEEDS_REFERENCE, score_weights
from .select_weights import TensorSelection, keep_for_target, select_weights
from .tensor_types import FORMAT_VERSION, TYPES_BY_ID
from .workdir import WorkDir
from .write_gguf import PlannedTensor, copied, encoded, numpy_shape, open_gguf, our_type, raw_bytes, write_gguf


@dataclass(frozen=True)
class ExportResult:
    """What was written. bpw_file: 8 x bytes of the file / all weights; bpw_linear: true bits per weight of the linear
    matrices, scales and indices counted; kept: weights kept at 16 bits, selected: those of the global top among them."""

    outfile: Path
    file_bytes: int
    n_weights: int
    n_linear: int
    bpw_file: float
    bpw_linear: float
    kept: int
    selected: int
    seconds: float
    peak_rss_bytes: int

    def as_dict(self) -> dict:
        return asdict(self) | {"outfile": str(self.outfile)}


def export(config: ExportConfig, reporter: Reporter | None = None) -> ExportResult | None:
    """Write the GGUF that `config` asks for; None after a dry run. Deterministic for a seed, a thread count and a device.

    Raises TacqError, in one sentence, for whatever cannot be done; then there is no output, and the work folder lets
    `resume` go on.
    """
    reporter = reporter or Reporter()
    started = time.monotonic()
    config.validate()
    task = load_task(config.task)
    if config.threads:
        torch.set_num_threads(config.threads)
    work = WorkDir.open(config)
    try:
        loaded = load_model(config.model, work.path, config.device, reporter)
        texts = tokenize_task(task, loaded.tokenizer, config.n_samples, config.seq_len)
        reporter.say(describe(loaded, texts, task.name, config))
    finally:
        if config.dry_run:
            work.remove()
    if config.dry_run:
        return None
    need_space(config.outfile.parent, 1.1e-9 * upper_bound_bytes(loaded, config), "the output", "give --outfile on a larger disk")

    selection = work.load_selection()
    if selection is None:
        error = rounding_error(config.base.bits)
        if config.reference == "gptq" and config.score in NEEDS_REFERENCE:
            error = gptq_error(config.base.bits, loaded, texts, config.damping, reporter)
        scores = score_weights(config.score, loaded.model, loaded.linear, texts, error, config.seed, reporter)
        selection = select_weights(scores, config.base, n_to_keep(scores, loaded, config))
        del scores
        work.save_selection(selection)
    quantize_matrices(loaded, texts, selection, config, work, reporter)
    quantize_embedding(loaded, config, work, reporter)
    keys = metadata(config, task.name, selection, len(texts), loaded)
    write_gguf(config.outfile, loaded.reference, planned_tensors(loaded, config, work), keys, reporter)
    check_written(config.outfile, work)
    result = summarize(config.outfile, loaded, selection, started)
    if not config.keeps_workdir:
        work.remove()
    return result


def n_to_keep(scores: dict[str, torch.Tensor], loaded: LoadedModel, config: ExportConfig) -> int:
    """Size of the global top: a share of the weights, or as many as the limit's bits hold."""
    if config.bpw_limit is None:
        return round(config.ratio * sum(s.numel() for s in scores.values()))
    return keep_for_target(scores, {t.name: t.shape for t in loaded.linear}, config.base, config.bpw_limit)


def describe(loaded: LoadedModel, texts: list[list[int]], task: str, config: ExportConfig) -> str:
    """The plan in one line, said before the long work begins."""
    keep = f"{100 * config.ratio:g} %" if config.bpw_limit is None else f"up to {config.bpw_limit:g} bits per weight"
    others = ", ".join(f"{t.name} {kind.upper()}" for t, kind in embedding_types(loaded, config))
    return (
        f"{loaded.name}: {len(loaded.linear)} matrices, {loaded.n_linear / 1e6:.1f} M weights -> {config.base.name}, kept by '{config.score}': {keep}; {others}. "
        f"Task '{task}': {len(texts)} examples, {sum(map(len, texts))} tokens."
    )


def upper_bound_bytes(loaded: LoadedModel, config: ExportConfig) -> float:
    """More than the output can take, for the check of free space."""
    return sum(t.n_bytes for t in loaded.reference.tensors) / 2 + sum(4.0 * t.weight.numel() for t, kind in embedding_types(loaded, config) if kind not in BASE_TYPES)


def metadata(config: ExportConfig, task: str, selection: dict[str, TensorSelection], n_samples: int, loaded: LoadedModel) -> dict:
    """Our keys of the GGUF. `tacq.ratio` is the share that was selected; filling the sections keeps a little more."""
    return {
        "tacq.format_version": FORMAT_VERSION,
        "tacq.score": config.score,
        "tacq.ratio": sum(s.selected for s in selection.values()) / loaded.n_linear,
        "tacq.task": task,
        "tacq.n_samples": n_samples,
        "tacq.seq_len": config.seq_len,
        "tacq.base_model": loaded.name,
        "general.quantized_by": "tacq-export",
        "general.file_type": config.base.id,  # our llama.cpp prints the type's name for it
        "general.quantization_version": 2,
    }


def planned_tensors(loaded: LoadedModel, config: ExportConfig, work: WorkDir) -> list[PlannedTensor]:
    """Every tensor of the reference in its order: ours from the work folder, the rest converted or copied."""
    asked = {tensor.name: kind for tensor, kind in embedding_types(loaded, config)}
    planned = []
    for tensor in loaded.reference.tensors:
        if work.has_tensor(tensor.name):
            kind = our_type(work.load_facts(tensor.name)["type"])
            planned.append(PlannedTensor(tensor.name, numpy_shape(tensor), kind, lambda name=tensor.name: work.load_tensor(name)))
        else:
            planned.append(encoded(tensor, asked[tensor.name]) if tensor.name in asked else copied(tensor))
    return planned


def check_written(outfile: Path, work: WorkDir) -> None:
    """Read the file again: every tensor of ours must unpack, and hold the bytes that were made for it."""
    for tensor in open_gguf(outfile).tensors:
        ours = TYPES_BY_ID.get(int(tensor.tensor_type))
        if ours is not None:
            unpack_tensor(ours, raw_bytes(tensor), int(np.prod(tensor.shape[1:])), int(tensor.shape[0]), tensor.name)
            if not np.array_equal(raw_bytes(tensor), work.load_tensor(tensor.name)):
                raise TacqError(f"tensor '{tensor.name}' reads back other bytes than were written; the disk of {outfile} is faulty.")


def summarize(outfile: Path, loaded: LoadedModel, selection: dict[str, TensorSelection], started: float) -> ExportResult:
    """Sizes of what was written, read off the file."""
    tensors = {t.name: t for t in open_gguf(outfile).tensors}
    n_weights = sum(int(t.n_elements) for t in tensors.values())
    file_bytes = outfile.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ExportResult(
        outfile=outfile,
        file_bytes=file_bytes,
        n_weights=n_weights,
        n_linear=loaded.n_linear,
        bpw_file=8 * file_bytes / n_weights,
        bpw_linear=8 * sum(int(tensors[t.name].n_bytes) for t in loaded.linear) / loaded.n_linear,
        kept=sum(len(s.kept) for s in selection.values()),
        selected=sum(s.selected for s in selection.values()),
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak,
    )
