"""Quantize all matrices of a loaded model: GPTQ with the Hessians of the walk through the model or of the calibration,
bytes into the work folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import gguf
import numpy as np
import torch

from ..calibration.calibrate import Calibration
from ..calibration.hessian import effective_number, inverse_hessian_cholesky, shrink
from ..calibration.walk_blocks import BlockWalk, walkable
from ..config import ExportConfig
from ..format.pack_tensor import QuantizedTensor, dequantize_tensor, pack_tensor
from ..format.sparse_section import KeptWeights
from ..format.tensor_types import TYPES_BY_NAME, TensorType
from ..format.write_gguf import encode_as
from ..inputs.held_types import why_stock
from ..inputs.link_tensors import Linked, LinkedExperts, LinkedTensor
from ..inputs.load_model import LoadedModel
from ..planning.select_weights import TensorSelection
from ..reporting import Reporter
from ..workdir import WorkDir
from .fit_groups import dequantize_groups, round_to_nearest
from .quantize_experts import quantize_experts, quantize_experts_by_block
from .quantize_gptq import GptqResult, quantize_gptq
from .quantize_rows import ROWS_AT_ONCE, quantize_rows
from .quantize_sequential import quantize_in_order


def to_gguf_rows(matrix: torch.Tensor, tensor: Linked) -> torch.Tensor:
    """A matrix in torch's row order, in the order of the GGUF tensor's rows."""
    order = gguf_order(tensor)
    return matrix if order is None else matrix[order.to(matrix.device)]


def from_gguf_rows(matrix: torch.Tensor, tensor: Linked) -> torch.Tensor:
    """The inverse of `to_gguf_rows`."""
    order = gguf_order(tensor)
    return matrix if order is None else torch.empty_like(matrix).index_copy_(0, order.to(matrix.device), matrix)


def gguf_order(tensor: Linked) -> torch.Tensor | None:
    """int64 [rows]: GGUF row i is torch row order[i]; None where they are the same."""
    if isinstance(tensor, LinkedTensor):
        return tensor.rows
    if all(m.rows is None for m in tensor.matrices):
        return None
    of_each = [torch.arange(m.shape[0]) if m.rows is None else m.rows for m in tensor.matrices]
    return torch.cat([rows + i * len(rows) for i, rows in enumerate(of_each)])


def pack_result(tensor: Linked, tensor_type: TensorType, result: GptqResult, mask: torch.Tensor | None) -> np.ndarray:
    """uint8 bytes of a quantized matrix; mask: bool [rows, columns] of kept weights for a mixed type."""
    kept = None
    if mask is not None and result.kept_values is not None:
        rows, columns = to_gguf_rows(mask, tensor).nonzero(as_tuple=True)
        row_ptr = np.zeros(tensor.shape[0] + 1, dtype=np.uint32)
        row_ptr[1:] = torch.bincount(rows, minlength=tensor.shape[0]).cumsum(0).cpu().numpy()
        values = to_gguf_rows(result.kept_values, tensor)[rows, columns]
        kept = KeptWeights(row_ptr, columns.cpu().numpy().astype(np.uint16), values.cpu().numpy().astype(np.float16))
    codes, scale_bytes = (to_gguf_rows(x, tensor).cpu().numpy() for x in (result.codes, result.scale_bytes))
    return pack_tensor(QuantizedTensor(tensor_type, codes, scale_bytes, kept))


def kept_mask(selection: TensorSelection, tensor: Linked) -> torch.Tensor | None:
    """bool [rows, columns] of the kept weights, None if the tensor keeps none."""
    if selection.type.p == 0:
        return None
    mask = torch.zeros(tensor.n_weights, dtype=torch.bool)
    mask[selection.kept] = True
    return mask.reshape(tensor.shape)


def finished_weights(tensor: Linked, work: WorkDir) -> torch.Tensor | None:
    """float32 [rows, columns], torch's row order: what llama.cpp will compute with. None for a matrix that is not in
    the work folder, such as one that the user gave a stock type."""
    if not work.has_tensor(tensor.name):
        return None
    kind, data = work.load_facts(tensor.name)["type"], work.load_tensor(tensor.name)
    if kind in TYPES_BY_NAME:
        weights = dequantize_tensor(TYPES_BY_NAME[kind], data, *tensor.shape, tensor.name)
    else:
        weights = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(tensor.shape)
    return from_gguf_rows(torch.from_numpy(weights), tensor)


def encode_stock(loaded: LoadedModel, fixed: dict[str, str], work: WorkDir, reporter: Reporter) -> None:
    """What our types cannot hold, in the stock types that were chosen for it, into the work folder; a line for each."""
    for tensor in [*loaded.linear, loaded.embedding, *([loaded.head] if loaded.head else [])]:
        if tensor.stock and tensor.name in fixed and not work.has_tensor(tensor.name):
            kind = fixed[tensor.name]
            weight = to_gguf_rows(tensor.weight, tensor).cpu().numpy()
            data = encode_as(weight, kind, tensor.name)
            work.save_tensor(tensor.name, data.reshape(-1).view(np.uint8), {"type": kind.upper()})
            reporter.say(f"{tensor.name} {why_stock(tensor)}: stays at {kind.upper()}.")


def quantize_matrices(
    loaded: LoadedModel,
    calibration: Calibration,
    texts: list[list[int]],
    selection: dict[str, TensorSelection],
    config: ExportConfig,
    work: WorkDir,
    reporter: Reporter,
) -> None:
    """GPTQ and coordinate descent for every matrix that multiplies and has a type of ours, into the work folder.

    The head is one of them, be it the embedding or a matrix of its own: its inputs are far from equal in size, so plain
    rounding costs much more (measured in tools/LOG.md). The torch model may hold quantized weights afterwards.
    """

    def wanted(tensor: Linked) -> bool:
        return tensor.name in selection and not work.has_tensor(tensor.name)

    def finish(tensor: Linked, result: GptqResult, mask: torch.Tensor | None, seconds: float) -> None:
        chosen = selection[tensor.name]
        data = pack_result(tensor, chosen.type, result, mask)
        facts = {"type": chosen.type.name, "error": result.error, "kept": len(chosen.kept), "selected": chosen.selected}
        work.save_tensor(tensor.name, data, facts)
        reporter.say(tensor_line(tensor, facts, seconds))

    def visit(
        tensor: LinkedTensor, hessian: torch.Tensor, upper: torch.Tensor, target: torch.Tensor | None = None
    ) -> None:
        started = time.monotonic()
        mask = kept_mask(selection[tensor.name], tensor)
        weight = tensor.weight if target is None else target
        result = quantize_rows(selection[tensor.name].type.bits, tensor, weight, hessian, mask, config, upper)
        finish(tensor, result, mask, time.monotonic() - started)

    def visit_experts(tensors: Sequence[LinkedExperts], walk: BlockWalk) -> None:
        started = time.monotonic()
        masks = {t.name: kept_mask(selection[t.name], t) for t in tensors}
        bits = {t.name: selection[t.name].type.bits for t in tensors}
        for tensor, result in quantize_experts(tensors, calibration, walk, bits, masks, config, reporter):
            finish(tensor, result, masks[tensor.name], (time.monotonic() - started) / len(tensors))

    in_order = config.hessian_inputs == "quantized" and any(wanted(t) for t in loaded.linear)
    if in_order and not walkable(loaded, texts[0]):
        reporter.say("The blocks of this model cannot be run one by one: --hessian-inputs float is taken.")
    elif in_order:
        quantize_in_order(
            loaded,
            calibration,
            texts,
            config,
            wanted,
            visit,
            visit_experts,
            lambda t: finished_weights(t, work),
            reporter,
        )
    for_each_hessian(calibration, wanted, config, visit, reporter)  # the head, or all
    quantize_experts_by_block(loaded, calibration, texts, wanted, visit_experts, config, reporter)


def tensor_line(tensor: Linked, facts: dict, seconds: float) -> str:
    """One line a tensor, as llama-quantize has it."""
    rows, columns = tensor.shape
    kept = f"kept {facts['kept']:>7} ({100 * facts['kept'] / (rows * columns):.2f} %)" if facts["kept"] else ""
    return (
        f"{tensor.name:<28} {rows:>6} x {columns:<6} {facts['type']:<10} error {facts['error']:.4f}  {kept:<22} "
        f"{seconds:5.1f} s"
    )


def for_each_hessian(
    calibration: Calibration,
    wanted: Callable[[LinkedTensor], bool],
    config: ExportConfig,
    visit: Callable[[LinkedTensor, torch.Tensor, torch.Tensor], None],
    reporter: Reporter,
) -> None:
    """visit(tensor, hessian shrunk, its inverse Cholesky) for every wanted tensor, in the order in which the model runs
    them."""
    groups = [(k, chosen) for k, group in enumerate(calibration.groups) if (chosen := [t for t in group if wanted(t)])]
    total, done = sum(len(chosen) for _, chosen in groups), 0
    for k, group in groups:
        tokens = effective_number(calibration.token_weights(k, config.hessian))
        hessian = shrink(calibration.hessian(k), tokens, config.shrinkage)
        upper = inverse_hessian_cholesky(hessian, config.damping, group[0].name)
        for tensor in group:
            visit(tensor, hessian, upper)
            done += 1
            reporter.progress(done, total, "quantizing")


def rounding_error(tensor: LinkedTensor, bits: int) -> torch.Tensor:
    """W - Q(W) by plain rounding, on the CPU."""
    weight = tensor.weight.cpu()
    return weight - dequantize_groups(bits, *round_to_nearest(bits, weight))


def gptq_error(
    bits: int, calibration: Calibration, names: set[str], config: ExportConfig, reporter: Reporter
) -> dict[str, torch.Tensor]:
    """{name: W - Q(W)} by GPTQ without kept weights, held as F16."""
    errors: dict[str, torch.Tensor] = {}

    def visit(tensor: LinkedTensor, hessian: torch.Tensor, upper: torch.Tensor) -> None:
        result = quantize_gptq(bits, tensor.weight, hessian, None, config.damping, tensor.name, upper)
        errors[tensor.name] = (tensor.weight.cpu() - dequantize_groups(bits, result.codes, result.scale_bytes)).half()

    for_each_hessian(calibration, lambda t: t.name in names, config, visit, reporter)
    return errors


def quantize_embedding(
    loaded: LoadedModel, selection: dict[str, TensorSelection], work: WorkDir, reporter: Reporter
) -> None:
    """The token embedding by plain rounding, where it gets one of our types and is not the head as well."""
    tensor = loaded.embedding
    if tensor.name not in selection or loaded.head is None or work.has_tensor(tensor.name):
        return
    started = time.monotonic()
    tensor_type = selection[tensor.name].type
    weight = to_gguf_rows(tensor.weight, tensor)
    pieces, wrong = [], 0.0
    slices = [slice(start, start + ROWS_AT_ONCE) for start in range(0, weight.shape[0], ROWS_AT_ONCE)]
    for rows in reporter.track(slices, "embedding"):
        codes, scale_bytes = round_to_nearest(tensor_type.bits, weight[rows])
        wrong += float(
            (weight[rows] - dequantize_groups(tensor_type.bits, codes, scale_bytes)).square().sum(dtype=torch.float64)
        )
        pieces.append(pack_tensor(QuantizedTensor(tensor_type, codes.cpu().numpy(), scale_bytes.cpu().numpy())))
    error = wrong / max(float(weight.square().sum(dtype=torch.float64)), 1e-30)
    facts = {"type": tensor_type.name, "error": error, "kept": 0, "selected": 0}
    work.save_tensor(tensor.name, np.concatenate(pieces), facts)
    reporter.say(tensor_line(tensor, facts, time.monotonic() - started))


def head_tensor(loaded: LoadedModel) -> LinkedTensor:
    """The matrix that makes the logits, under the name of its GGUF tensor: the embedding's where they are one."""
    if loaded.head is not None:
        return loaded.head
    return replace(loaded.embedding, module_name="output embeddings", module=loaded.model.get_output_embeddings())
