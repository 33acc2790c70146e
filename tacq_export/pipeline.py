"""load -> calibrate -> score -> select -> quantize -> pack (-> tune) -> write -> verify: the whole way of an export on
one screen."""

from __future__ import annotations

import functools
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import torch

from .calibration.calibrate import Calibration, calibrate, disk_bytes
from .calibration.score_weights import NEEDS_REFERENCE
from .config import ExportConfig, parse_columns, parse_size
from .errors import TacqError
from .files import claimed, need_space
from .format.gguf_file import numpy_shape, open_gguf, raw_bytes, type_named
from .format.pack_tensor import unpack_tensor
from .format.tensor_types import FORMAT_VERSION, TYPES_BY_ID
from .format.write_gguf import PlannedTensor, copied, encoded, write_gguf
from .inputs.check_function import check_function
from .inputs.check_source import check_source
from .inputs.link_tensors import Linked, LinkedTensor
from .inputs.load_model import LoadedModel, load_model, pick_device
from .inputs.load_task import load_task
from .inputs.tokenize_task import tokenize_for_loss, tokens_sha256
from .planning.plan_types import fixed_types, plan_types, predicted_loss
from .planning.select_weights import TensorSelection
from .quantization.quantize_model import (
    encode_stock,
    gptq_error,
    head_tensor,
    quantize_embedding,
    quantize_matrices,
    rounding_error,
)
from .quantization.trial_errors import TRIAL
from .quantization.tune_vectors import plan_tuning, save_head_inputs, tune_vectors
from .reporting import Reporter
from .workdir import WorkDir


@dataclass(frozen=True)
class ExportResult:
    """What was written. bpw_file: 8 x bytes of the file / all weights; bpw_linear: true bits per weight of the linear
    matrices, scales and indices counted; kept: weights kept at 16 bits, selected: those of the global top among them;
    predicted_loss: nats a token that the blocks' types were predicted to cost, None if what is kept was not
    measured."""

    outfile: Path
    file_bytes: int
    n_weights: int
    n_linear: int
    bpw_file: float
    bpw_linear: float
    kept: int
    selected: int
    predicted_loss: float | None
    seconds: float
    peak_rss_bytes: int

    def as_dict(self) -> dict:
        return asdict(self) | {"outfile": str(self.outfile)}


def export(config: ExportConfig, reporter: Reporter | None = None) -> ExportResult | None:
    """Write the GGUF that `config` asks for; None after a dry run. Deterministic for a seed, a thread count and a
    device.

    Raises TacqError, in one sentence, for whatever cannot be done; then there is no output, and the work folder lets
    `resume` go on.
    """
    config.validate()
    pick_device(config.device)
    assert config.workdir is not None  # ExportConfig names one where the user does not
    with claimed(config.workdir, f"writes {config.outfile}"):
        return _export(config, reporter or Reporter())


def _export(config: ExportConfig, reporter: Reporter) -> ExportResult | None:
    """The steps, when no other export works in the same folder."""
    started = time.monotonic()
    task = load_task(config.task, parse_columns(config.columns), config.n_samples * (2 if config.tune else 1))
    if config.threads:
        torch.set_num_threads(config.threads)
    source = check_source(config.model, reporter)  # before there is a work folder
    work = WorkDir.open(config)
    try:
        loaded = load_model(source, work.path, config.device, reporter)
        texts, begins = tokenize_for_loss(config.loss, task, loaded.tokenizer, config.n_samples, config.seq_len)
        check_function(loaded, texts, source.gguf is not None, config.threads, reporter)
        fixed, head = fixed_types(loaded, config), head_tensor(loaded)
        tuning = plan_tuning(loaded, task, len(texts), config) if config.tune else None
        if task.unused:
            reporter.say(f"Keys of the task's rows that are not read: {', '.join(task.unused)}.")
        reporter.say(describe(loaded, texts, task.name, fixed, config))
    except BaseException:
        work.discard()  # nothing was computed yet that would be worth keeping
        raise
    if config.dry_run:
        work.remove()
        return None
    hashes = {"texts": tokens_sha256(texts, begins)}
    if tuning:
        hashes["tuning"] = tokens_sha256(tuning.texts, tuning.begins)
    work.settle_tokens(hashes, config.resume)
    need_space(
        config.outfile.parent, 1.1e-9 * upper_bound_bytes(loaded), "the output", "give --outfile on a larger disk"
    )
    need_space(
        work.calibration,
        1e-9 * disk_bytes(loaded, head, config.score, work.calibration),
        "the calibration",
        "give --workdir on a larger disk",
    )

    calibration = calibrate(loaded, head, texts, begins, TRIAL, config, work.calibration, reporter)
    selection = work.load_selection()
    if selection is None:
        error = reference_error(loaded.linear, calibration, config, reporter)
        selection = plan_types(loaded, calibration, texts, head, fixed, config, error, reporter)
        encode_stock(loaded, fixed, work, reporter)
        work.save_selection(selection)
    if tuning:
        save_head_inputs(loaded, tuning.texts, config, work.calibration, reporter)
    quantize_matrices(loaded, calibration, texts, selection, config, work, reporter)
    quantize_embedding(loaded, selection, work, reporter)
    if tuning:
        tune_vectors(tuning, loaded, fixed, config, work, reporter)
    keys = metadata(config, task.name, selection, fixed, len(texts), loaded)
    write_gguf(config.outfile, loaded.reference, planned_tensors(loaded, fixed, work), keys, reporter)
    check_written(config.outfile, work)
    predicted = predicted_loss(calibration, selection, config.score, config.seed)
    result = summarize(config.outfile, loaded, selection, predicted, started)
    if not config.keeps_workdir:
        work.remove()
    return result


def reference_error(linear: list[Linked], calibration: Calibration, config: ExportConfig, reporter: Reporter):
    """(tensor, bits) -> W - Q(W) of the score, as --reference says; GPTQ's is computed once for each width asked
    for."""
    if config.reference == "rtn" or config.score not in NEEDS_REFERENCE:
        return rounding_error
    by_width: dict[int, dict[str, torch.Tensor]] = {}

    def error(tensor: LinkedTensor, bits: int) -> torch.Tensor:
        if bits not in by_width:
            by_width[bits] = gptq_error(bits, calibration, {t.name for t in linear}, config, reporter)
        if tensor.name not in by_width[bits]:  # an expert's, whose Hessian is not kept
            return rounding_error(tensor, bits)
        return by_width[bits][tensor.name].float()

    return error


def describe(
    loaded: LoadedModel, texts: list[list[int]], task: str, fixed: dict[str, str], config: ExportConfig
) -> str:
    """The plan in one line, said before the long work begins."""
    if config.target_size is not None:
        aim = f"a file of at most {parse_size(str(config.target_size))} bytes, types by predicted loss"
    elif config.allocates:
        aim = f"{config.bpw_limit:g} bits per weight, types by predicted loss"
    else:
        limit, ratio = config.bpw_limit, config.ratio
        kept = f"up to {limit:g} bits per weight" if limit is not None or ratio is None else f"{100 * ratio:g} %"
        aim = f"{config.base.name}, kept {kept}"
    ends = [t for t in (loaded.embedding, loaded.head) if t is not None and t.name in fixed]
    others = "".join(f", {t.name} {fixed[t.name].upper()}" for t in ends)
    return (
        f"{loaded.name}: {len(loaded.linear)} matrices, {loaded.n_linear / 1e6:.1f} M weights -> {aim} (kept by "
        f"'{config.score}'){others}. "
        f"Task '{task}': {len(texts)} examples, {sum(map(len, texts))} "
        f"tokens{', of which the answers count' if config.loss == 'answer' else ''}."
    )


def upper_bound_bytes(loaded: LoadedModel) -> float:
    """More than the output can take, for the check of free space."""
    return sum(t.n_bytes for t in loaded.reference.tensors)


def metadata(
    config: ExportConfig,
    task: str,
    selection: dict[str, TensorSelection],
    fixed: dict[str, str],
    n_samples: int,
    loaded: LoadedModel,
) -> dict:
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
        "general.file_type": main_file_type(selection, fixed, loaded),
        "general.quantization_version": 2,
    }


def main_file_type(selection: dict[str, TensorSelection], fixed: dict[str, str], loaded: LoadedModel) -> int:
    """`general.file_type`: the id of the base type of ours that holds most of the linear weights, of which our
    llama.cpp prints the name; where none of ours holds any, llama.cpp's number of the stock type that does."""
    ours: dict[int, int] = {}
    stock: dict[int, int] = {}
    for tensor in loaded.linear:
        if tensor.name in selection:
            kind = selection[tensor.name].type.base.id
            ours[kind] = ours.get(kind, 0) + tensor.n_weights
        else:
            name = fixed[tensor.name].upper()
            kind = int(gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])
            stock[kind] = stock.get(kind, 0) + tensor.n_weights
    weights = ours or stock
    return max(weights, key=lambda kind: (weights[kind], -kind))


def planned_tensors(loaded: LoadedModel, fixed: dict[str, str], work: WorkDir) -> list[PlannedTensor]:
    """Every tensor of the reference in its order: ours from the work folder, the rest converted or copied."""
    planned = []
    for tensor in loaded.reference.tensors:
        if work.has_tensor(tensor.name):
            kind = type_named(work.load_facts(tensor.name)["type"])
            planned.append(
                PlannedTensor(tensor.name, numpy_shape(tensor), kind, functools.partial(work.load_tensor, tensor.name))
            )
        else:
            planned.append(encoded(tensor, fixed[tensor.name]) if tensor.name in fixed else copied(tensor))
    return planned


def check_written(outfile: Path, work: WorkDir) -> None:
    """Read the file again: every tensor of ours must unpack, and hold the bytes that were made for it."""
    for tensor in open_gguf(outfile).tensors:
        ours = TYPES_BY_ID.get(int(tensor.tensor_type))
        if ours is not None:
            unpack_tensor(ours, raw_bytes(tensor), int(np.prod(tensor.shape[1:])), int(tensor.shape[0]), tensor.name)
            if not np.array_equal(raw_bytes(tensor), work.load_tensor(tensor.name)):
                raise TacqError(
                    f"tensor '{tensor.name}' reads back other bytes than were written; the disk of {outfile} is faulty."
                )


def summarize(
    outfile: Path, loaded: LoadedModel, selection: dict[str, TensorSelection], predicted: float | None, started: float
) -> ExportResult:
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
        predicted_loss=predicted,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak,
    )
