"""Quantize one matrix: GPTQ by groups of 32 columns, then coordinate descent over all groups, kept weights free.

The loss is tr(D H D^T) with D the error of the matrix and H the second moment of its inputs.

1. GPTQ (Frantar et al., arXiv 2210.17323): groups from left to right, the columns still to come moved to make up for
each
   group's error. With those free to move, a group's own loss has the matrix S = ((H^-1)_gg)^-1 over the columns from g
   on, and all 32 codes and the scale byte are chosen under it (group_descent.c).
2. Coordinate descent (QuantEase, arXiv 2309.01885) with everything else held still, `sweeps` times over all groups:
codes and
   scale bytes now see the errors of all columns.

A kept weight takes the value of least loss; what is stored is its difference to its base value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..calibration.hessian import damped_hessian, inverse_hessian_cholesky
from ..format.tensor_types import GROUP_SIZE
from .group_descent import PanelDescent

BLOCK_GROUPS = 8  # as GPTQ's lazy batches: one product of 256 columns costs less than 8 of 32


@dataclass
class GptqResult:
    """codes uint8 [rows, columns], scale_bytes uint8 [rows, columns / 32], kept_values float32 [rows, columns] (the
    difference to the base value where kept, 0 elsewhere) or None, error: sum of tr((W - Q) H (W - Q)^T) / tr(W H
    W^T)."""

    codes: torch.Tensor
    scale_bytes: torch.Tensor
    kept_values: torch.Tensor | None
    error: float


def relative_error(weights: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T)."""
    difference, h = weights - quantized, hessian.float()
    return float(
        ((difference @ h) * difference).sum().double() / ((weights @ h) * weights).sum().double().clamp_min(1e-30)
    )


def quantize_gptq(
    bits: int,
    weights: torch.Tensor,
    hessian: torch.Tensor,
    kept: torch.Tensor | None = None,
    damping: float = 0.01,
    name: str = "",
    upper: torch.Tensor | None = None,
    sweeps: int = 3,
    feed_forward: bool = True,
) -> GptqResult:
    """Quantize one matrix, on the CPU.

    weights: float32 [rows, columns], columns a multiple of 64; hessian: [columns, columns]; kept: bool [rows, columns]
    or None; damping: 0 for a hessian that is float32, on the CPU and damped already; upper:
    `inverse_hessian_cholesky(hessian, damping)` when the caller already has it (matrices with the same input share it);
    sweeps: of coordinate descent; feed_forward: False leaves GPTQ's out (groups are rounded one by one), which needs no
    Cholesky factor. The damped loss never rises from sweep to sweep.
    """
    rows, columns = weights.shape
    n_groups = columns // GROUP_SIZE
    factor = torch.empty(0)
    if feed_forward:
        factor = inverse_hessian_cholesky(hessian, damping, name) if upper is None else upper
    weights = weights.cpu()
    h = damped_hessian(hessian, damping).float().cpu() if damping else hessian
    descend = PanelDescent(bits, rows)
    codes = torch.zeros((n_groups, rows, GROUP_SIZE), dtype=torch.uint8)  # panel by panel
    scale_bytes = torch.zeros((n_groups, rows), dtype=torch.uint8)
    base = torch.zeros((n_groups, rows, GROUP_SIZE))
    panels = None if kept is None else kept.cpu().reshape(rows, n_groups, GROUP_SIZE).transpose(0, 1).contiguous()
    values, target = torch.empty_like(weights), weights.clone()

    # What a group changes is told to the rest of its block at once, and to the columns behind it when the block is
    # done.
    blocks = [range(first, min(first + BLOCK_GROUPS, n_groups)) for first in range(0, n_groups, BLOCK_GROUPS)]

    def columns_of(first: int, last: int | None = None) -> slice:
        return slice(first * GROUP_SIZE, ((first if last is None else last) + 1) * GROUP_SIZE)

    def panel(g: int, matrix: torch.Tensor, gradient: torch.Tensor, present: torch.Tensor, fresh: bool) -> torch.Tensor:
        mask = None if panels is None else panels[g]
        change = descend(matrix, gradient, present, base[g], codes[g], scale_bytes[g], mask, fresh)
        values[:, columns_of(g)] = present
        return change

    for block in blocks:
        passed_on = torch.empty(rows, len(block) * GROUP_SIZE)
        for g in block:
            own, later, at = columns_of(g), columns_of(g + 1, block[-1]), columns_of(g - block[0])
            matrix = h[own, own]
            if feed_forward:
                inverse = torch.linalg.inv(factor[own, own].cpu().double())
                matrix = inverse @ inverse.t()
            change = panel(g, matrix, torch.zeros(rows, GROUP_SIZE), target[:, own].contiguous(), fresh=True)
            if feed_forward:
                passed_on[:, at] = change @ inverse.float()
                target[:, later] += passed_on[:, at] @ factor[own, later].cpu()
        if feed_forward:
            target[:, later.stop :] += passed_on @ factor[columns_of(block[0], block[-1]), later.stop :].cpu()
    for _ in range(sweeps):
        dh = (values - weights) @ h  # exact again at the start of each sweep
        for block in blocks:
            changes = torch.empty(rows, len(block) * GROUP_SIZE)
            for g in block:
                own, later, at = columns_of(g), columns_of(g + 1, block[-1]), columns_of(g - block[0])
                changes[:, at] = panel(
                    g, h[own, own], dh[:, own].contiguous(), values[:, own].contiguous(), fresh=False
                )
                dh[:, later] += changes[:, at] @ h[own, later]
            dh[:, later.stop :] += changes @ h[columns_of(block[0], block[-1]), later.stop :]
    flat = [x.transpose(0, 1).reshape(rows, columns) for x in (codes, base)]
    kept_values = None if kept is None else torch.where(kept.cpu(), values - flat[1], torch.zeros(()))
    return GptqResult(
        flat[0].contiguous(), scale_bytes.t().contiguous(), kept_values, relative_error(weights, values, hessian.cpu())
    )
