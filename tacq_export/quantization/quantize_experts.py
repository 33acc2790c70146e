"""Quantize the experts of a block: each is a matrix with the Hessian of its own tokens, and all are one tensor.

Hessians are made one after the other from the inputs that a walk has caught, and dropped. An expert that no token
reaches, or none that the loss feels, takes the mean Hessian of its block's experts. What routing does to few tokens is
what `shrink` is for: the fewer there are for a column, the more the Hessian is its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ..calibration.calibrate import Calibration
from ..calibration.collect_inputs import second_moment
from ..calibration.expert_statistics import expert_weights, is_reached
from ..calibration.hessian import effective_number, inverse_hessian_cholesky, shrink
from ..calibration.walk_blocks import BlockWalk, blocks_of, walk_through
from ..config import ExportConfig
from ..inputs.link_tensors import Linked, LinkedExperts
from ..inputs.load_model import LoadedModel
from ..reporting import Reporter
from .quantize_gptq import GptqResult
from .quantize_rows import quantize_rows


def quantize_experts(
    tensors: Sequence[LinkedExperts],
    calibration: Calibration,
    walk: BlockWalk,
    bits: Mapping[str, int],
    masks: Mapping[str, torch.Tensor | None],
    config: ExportConfig,
    reporter: Reporter,
) -> Iterator[tuple[LinkedExperts, GptqResult]]:
    """Each of some tensors with the same input, and its result: that of all experts' matrices, one under another.

    walk: has entered the block with the matrices of the first tensor; masks: bool [experts x rows, columns] of the kept
    weights, or None.
    """
    group = next(g for g in calibration.expert_groups if any(t.name == tensors[0].name for t in g))
    n_experts = len(group[0].matrices)
    weights = [expert_weights(calibration, group, e, config.hessian) for e in range(n_experts)]
    mean: tuple[torch.Tensor, float] | None = None
    parts: dict[str, list[GptqResult]] = {t.name: [] for t in tensors}
    energy: dict[str, list[float]] = {t.name: [] for t in tensors}
    for e in reporter.track(range(n_experts), "experts"):
        if is_reached(weights[e]):
            hessian = second_moment(walk.inputs(tensors[0].matrices[e]), weights[e])
            tokens = effective_number(weights[e])
        else:
            if mean is None:
                mean = mean_hessian(tensors[0], weights, walk)
            hessian, tokens = mean[0].clone(), mean[1]
        shrink(hessian, tokens, config.shrinkage)
        upper = inverse_hessian_cholesky(hessian, config.damping, tensors[0].matrices[e].name)
        hessian = hessian.cpu()
        for t in tensors:
            matrix, mask = t.matrices[e], masks[t.name]
            rows = slice(e * matrix.shape[0], (e + 1) * matrix.shape[0])
            weight = matrix.weight.contiguous()
            parts[t.name].append(
                quantize_rows(
                    bits[t.name], matrix, weight, hessian, None if mask is None else mask[rows], config, upper
                )
            )
            energy[t.name].append(float(((weight.cpu() @ hessian) * weight.cpu()).sum(dtype=torch.float64)))
    for t in tensors:
        yield t, _all(parts.pop(t.name), energy[t.name], masks[t.name] is not None)


def _all(parts: list[GptqResult], energy: list[float], mixed: bool) -> GptqResult:
    """One result of several matrices, one under another; each one's error counts by tr(W H W^T)."""
    return GptqResult(
        codes=torch.cat([p.codes for p in parts]),
        scale_bytes=torch.cat([p.scale_bytes for p in parts]),
        kept_values=torch.cat([p.kept_values for p in parts if p.kept_values is not None]) if mixed else None,
        error=sum(p.error * w for p, w in zip(parts, energy, strict=True)) / max(sum(energy), 1e-30),
    )


def mean_hessian(tensor: LinkedExperts, weights: Sequence[torch.Tensor], walk: BlockWalk) -> tuple[torch.Tensor, float]:
    """The mean Hessian of the experts that tokens reach, float32 [columns, columns], and of how many tokens of equal
    weight it is made."""
    total, tokens, reached = None, 0.0, 0
    for e, of_tokens in enumerate(weights):
        if is_reached(of_tokens):
            hessian = second_moment(walk.inputs(tensor.matrices[e]), of_tokens)
            total = hessian if total is None else total.add_(hessian)
            tokens, reached = tokens + effective_number(of_tokens), reached + 1
    assert total is not None, "a token of the task reaches some expert"
    return total / reached, tokens


def quantize_experts_by_block(
    loaded: LoadedModel,
    calibration: Calibration,
    texts: Sequence[Sequence[int]],
    wanted: Callable[[Linked], bool],
    visit_experts: Callable[[Sequence[LinkedExperts], BlockWalk], None],
    config: ExportConfig,
    reporter: Reporter,
) -> None:
    """visit_experts(tensors with the same input, a walk in their block) for the wanted ones, in the float model."""
    groups = [chosen for g in calibration.expert_groups if (chosen := [t for t in g if wanted(t)])]
    if not groups:
        return
    walk = walk_through(loaded, texts, config.precision == "bf16")
    for _, tensors in blocks_of(loaded):
        inside = {t.name for t in tensors}
        of_block = [chosen for chosen in groups if chosen[0].name in inside]
        walk.enter([m for chosen in of_block for m in chosen[0].matrices])
        for chosen in of_block:
            visit_experts(chosen, walk)
        walk.leave()
