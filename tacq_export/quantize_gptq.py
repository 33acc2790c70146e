"""Quantize one matrix: GPTQ by groups of 32 columns, then coordinate descent over all groups, kept weights free.

The loss is tr(D H D^T) with D the error of the matrix and H the second moment of its inputs.

1. GPTQ (Frantar et al., arXiv 2210.17323): groups from left to right, the columns still to come moved to make up for each
   group's error. With those free to move, a group's own loss has the matrix S = ((H^-1)_gg)^-1 over the columns from g on,
   and all 32 codes and the scale byte are chosen under it (group_descent.c).
2. Coordinate descent (QuantEase, arXiv 2309.01885) with everything else held still, `sweeps` times over all groups: codes and
   scale bytes now see the errors of all columns.

Tokens are few, and H exaggerates how inputs go together: what the code of one weight does wrong is made good by codes of others, on these
tokens only. `shrink` adds to each element of the diagonal a share of itself, as if correlations were smaller: a ridge in units of
each input (Schaefer and Strimmer 2005 shrink covariances so), and the larger, the more columns there are for a token.

A kept weight takes the value of least loss; what is stored is its difference to its base value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import TacqError
from .group_descent import PanelDescent
from .tensor_types import GROUP_SIZE

BLOCK_GROUPS = 8  # as GPTQ's lazy batches: one product of 256 columns costs less than 8 of 32


@dataclass
class GptqResult:
    """codes uint8 [rows, columns], scale_bytes uint8 [rows, columns / 32], kept_values float32 [rows, columns] (the
    difference to the base value where kept, 0 elsewhere) or None, error: sum of tr((W - Q) H (W - Q)^T) / tr(W H W^T)."""

    codes: torch.Tensor
    scale_bytes: torch.Tensor
    kept_values: torch.Tensor | None
    error: float


def relative_error(weights: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T)."""
    difference, h = weights - quantized, hessian.float()
    return float(((difference @ h) * difference).sum().double() / ((weights @ h) * weights).sum().double().clamp_min(1e-30))


def damped_hessian(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping * mean(diag H) * I in H's precision; a column that no example ever used (zero diagonal) gets a unit diagonal, as in
    the official code."""
    h = hessian.clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return h


def shrink(hessian: torch.Tensor, tokens: float, shrinkage: float) -> torch.Tensor:
    """H + share * diag(H), in place, with share = shrinkage * columns / tokens. tokens: how many H was made of, those of equal weight."""
    hessian.diagonal().mul_(1 + shrinkage * len(hessian) / tokens)
    return hessian


def inverse_hessian_cholesky(hessian: torch.Tensor, damping: float, name: str = "") -> torch.Tensor:
    """Upper triangular U with U^T U = damped_hessian(H)^-1, float32 [columns, columns], computed in float64.

    Raises TacqError if the matrix is not positive definite in spite of the damping.
    """
    return _inverse_factor(damped_hessian(hessian.double(), damping), damping, name).float()


def inverse_diagonal(hessian: torch.Tensor, damping: float, name: str = "") -> torch.Tensor:
    """float32 [columns]: diag(damped_hessian(H)^-1), computed in H's precision. Raises TacqError as above.

    float32 is enough: rounding moves an eigenvalue by some 1e-7 of the largest, which is at most the trace, that is columns x the mean
    of the diagonal, of which the damping alone is 1 %.
    """
    return _inverse_factor(damped_hessian(hessian, damping), damping, name).square_().sum(0)


def _inverse_factor(matrix: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """Upper triangular U with U^T U = M^-1: with M's rows and columns turned round M = L L^T, and U is L^-1 turned round."""
    try:
        lower = torch.linalg.cholesky(matrix.flip(0, 1))
    except torch.linalg.LinAlgError:
        raise TacqError(f"tensor '{name}': the Hessian is not positive definite; use more or longer examples, or a damping above {damping}") from None
    _invert_lower(lower)
    return lower.flip(0, 1)


def _invert_lower(lower: torch.Tensor) -> None:
    """Lower triangular L becomes L^-1, in place: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. Half the work of solving for all columns."""
    half = len(lower) // 2
    if half < 128:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False))
        return
    a, b, c = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower(a)
    _invert_lower(c)
    b.copy_((c @ (b @ a)).neg_())


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

    weights: float32 [rows, columns], columns a multiple of 64; hessian: [columns, columns]; kept: bool [rows, columns] or
    None; damping: 0 for a hessian that is float32, on the CPU and damped already; upper: `inverse_hessian_cholesky(hessian, damping)` when the caller already has it (matrices with the same input
    share it); sweeps: of coordinate descent; feed_forward: False leaves GPTQ's out (groups are rounded one by one), which needs no
    Cholesky factor. The damped loss never rises from sweep to sweep.
    """
    rows, columns = weights.shape
    n_groups = columns // GROUP_SIZE
    if upper is None and feed_forward:
        upper = inverse_hessian_cholesky(hessian, damping, name)
    weights = weights.cpu()
    h = damped_hessian(hessian, damping).float().cpu() if damping else hessian
    descend = PanelDescent(bits, rows)
    codes = torch.zeros((n_groups, rows, GROUP_SIZE), dtype=torch.uint8)  # panel by panel
    scale_bytes = torch.zeros((n_groups, rows), dtype=torch.uint8)
    base = torch.zeros((n_groups, rows, GROUP_SIZE))
    panels = None if kept is None else kept.cpu().reshape(rows, n_groups, GROUP_SIZE).transpose(0, 1).contiguous()
    values, target = torch.empty_like(weights), weights.clone()

    # What a group changes is told to the rest of its block at once, and to the columns behind it when the block is done.
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
                inverse = torch.linalg.inv(upper[own, own].cpu().double())
                matrix = inverse @ inverse.t()
            change = panel(g, matrix, torch.zeros(rows, GROUP_SIZE), target[:, own].contiguous(), fresh=True)
            if feed_forward:
                passed_on[:, at] = change @ inverse.float()
                target[:, later] += passed_on[:, at] @ upper[own, later].cpu()
        if feed_forward:
            target[:, later.stop :] += passed_on @ upper[columns_of(block[0], block[-1]), later.stop :].cpu()
    for _ in range(sweeps):
        dh = (values - weights) @ h  # exact again at the start of each sweep
        for block in blocks:
            changes = torch.empty(rows, len(block) * GROUP_SIZE)
            for g in block:
                own, later, at = columns_of(g), columns_of(g + 1, block[-1]), columns_of(g - block[0])
                changes[:, at] = panel(g, h[own, own], dh[:, own].contiguous(), values[:, own].contiguous(), fresh=False)
                dh[:, later] += changes[:, at] @ h[own, later]
            dh[:, later.stop :] += changes @ h[columns_of(block[0], block[-1]), later.stop :]
    flat = [x.transpose(0, 1).reshape(rows, columns) for x in (codes, base)]
    kept_values = None if kept is None else torch.where(kept.cpu(), values - flat[1], torch.zeros(()))
    return GptqResult(flat[0].contiguous(), scale_bytes.t().contiguous(), kept_values, relative_error(weights, values, hessian.cpu()))
