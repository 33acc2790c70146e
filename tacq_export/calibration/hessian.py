"""Algebra of the Hessians H = sum_t w_t x_t x_t^T: damping, shrinkage, and factors of the inverse.

Tokens are few, and H exaggerates how inputs go together: what the code of one weight does wrong is made good by codes
of others, on these tokens only. `shrink` adds to each element of the diagonal a share of itself, as if correlations
were smaller: a ridge in units of each input (Schaefer and Strimmer 2005 shrink covariances so), and the larger, the
more columns there are for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from ..errors import TacqError


def damped_hessian(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping * mean(diag H) * I in H's precision; a column that no example ever used (zero diagonal) gets a unit
    diagonal, as in the official code."""
    h = hessian.clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return h


def shrink(hessian: torch.Tensor, tokens: float, shrinkage: float) -> torch.Tensor:
    """H + share * diag(H), in place, with share = shrinkage * columns / tokens. tokens: how many H was made of, those
    of equal weight."""
    hessian.diagonal().mul_(1 + shrinkage * len(hessian) / tokens)
    return hessian


def inverse_hessian_cholesky(hessian: torch.Tensor, damping: float, name: str = "") -> torch.Tensor:
    """Upper triangular U with U^T U = damped_hessian(H)^-1, float32 [columns, columns], computed in float64.

    Raises TacqError if the matrix is not positive definite in spite of the damping.
    """
    return _inverse_factor(damped_hessian(hessian.double(), damping), damping, name).float()


def inverse_diagonal(hessian: torch.Tensor, damping: float, name: str = "") -> torch.Tensor:
    """float32 [columns]: diag(damped_hessian(H)^-1), computed in H's precision. Raises TacqError as above.

    float32 is enough: rounding moves an eigenvalue by some 1e-7 of the largest, which is at most the trace, that is
    columns x the mean of the diagonal, of which the damping alone is 1 %.
    """
    return _inverse_factor(damped_hessian(hessian, damping), damping, name).square_().sum(0)


def _inverse_factor(matrix: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """Upper triangular U with U^T U = M^-1: with M's rows and columns turned round M = L L^T, and U is L^-1 turned
    round."""
    try:
        lower = torch.linalg.cholesky(matrix.flip(0, 1))
    except torch.linalg.LinAlgError:
        raise TacqError(
            f"tensor '{name}': the Hessian is not positive definite; use more or longer examples, or a damping above "
            f"{damping}"
        ) from None
    _invert_lower(lower)
    return lower.flip(0, 1)


def _invert_lower(lower: torch.Tensor) -> None:
    """Lower triangular L becomes L^-1, in place: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. Half the work
    of solving for all columns."""
    half = len(lower) // 2
    if half < 128:
        lower.copy_(
            torch.linalg.solve_triangular(
                lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
            )
        )
        return
    a, b, c = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower(a)
    _invert_lower(c)
    b.copy_((c @ (b @ a)).neg_())


def token_weights(of_each: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [tokens], mean 1: how much each token counts for matrices with the same input, from what it counts for
    each."""
    return reduce(torch.add, [w / w.mean().clamp_min(1e-30) for w in of_each]) / len(of_each)


def effective_number(weights: torch.Tensor) -> float:
    """As how many equal weights those of a weighted sum count: (sum w)^2 / sum w^2 (Kish 1965); all of them where all
    are 0."""
    w = weights.double()
    squares = float(w.square().sum())
    return float(w.sum()) ** 2 / squares if squares > 0 else float(len(w))
