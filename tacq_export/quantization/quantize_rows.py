"""One matrix of a model through `quantize_gptq`, some rows at a time."""

from __future__ import annotations

import torch

from ..config import ExportConfig
from ..inputs.link_tensors import LinkedTensor
from .quantize_gptq import GptqResult, quantize_gptq

ROWS_AT_ONCE = 16384


def quantize_rows(
    bits: int,
    tensor: LinkedTensor,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    mask: torch.Tensor | None,
    config: ExportConfig,
    upper: torch.Tensor,
) -> GptqResult:
    """`quantize_gptq` of `weight` for a tensor, some rows at a time: rows do not depend on each other, and a head has
    very many."""
    slices = [slice(start, start + ROWS_AT_ONCE) for start in range(0, tensor.shape[0], ROWS_AT_ONCE)]
    parts = []
    for rows in slices:
        kept = None if mask is None else mask[rows]
        parts.append(
            quantize_gptq(bits, weight[rows], hessian, kept, config.damping, tensor.name, upper, config.refine_sweeps)
        )
    if len(parts) == 1:
        return parts[0]
    energy = [float(((weight[rows].cpu() @ hessian) * weight[rows].cpu()).sum(dtype=torch.float64)) for rows in slices]
    return GptqResult(
        codes=torch.cat([p.codes for p in parts]),
        scale_bytes=torch.cat([p.scale_bytes for p in parts]),
        kept_values=None if mask is None else torch.cat([p.kept_values for p in parts if p.kept_values is not None]),
        error=sum(p.error * e for p, e in zip(parts, energy, strict=True)) / max(sum(energy), 1e-30),
    )
