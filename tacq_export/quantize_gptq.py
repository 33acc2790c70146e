"""GPTQ with kept weights: round column by column, feed each error forward to the columns still to come.

Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1, with the changes of DESIGN section 2: the grid of a group of 32
columns is fitted when its first column is reached (weighted by diag(H), kept weights left out), and a kept weight has
error zero, its value stored as the difference to its base value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import TacqError
from .fit_groups import codec_tables, codes_for, fit_scale_bytes
from .tensor_types import GROUP_SIZE

_LAZY_COLUMNS = 128  # columns updated one by one before the rest of the matrix is updated by one product


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


def inverse_hessian_cholesky(hessian: torch.Tensor, damping: float, name: str = "") -> torch.Tensor:
    """Upper triangular U with U^T U = (H + damping * mean(diag H) * I)^-1, float32 [columns, columns].

    Computed in float64. A column that no example ever used (zero diagonal) gets a unit diagonal, as in the official code.
    Raises TacqError if the matrix is not positive definite in spite of the damping.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    except torch.linalg.LinAlgError:
        raise TacqError(f"tensor '{name}': the Hessian is not positive definite; use more or longer examples, or a damping above {damping}") from None


def quantize_gptq(
    bits: int,
    weights: torch.Tensor,
    hessian: torch.Tensor,
    kept: torch.Tensor | None = None,
    damping: float = 0.01,
    name: str = "",
    upper: torch.Tensor | None = None,
) -> GptqResult:
    """Quantize one matrix.

    weights: float32 [rows, columns], columns a multiple of 64; hessian: X^T X, [columns, columns]; kept: bool [rows,
    columns] or None; upper: `inverse_hessian_cholesky(hessian, damping)` when the caller already has it (matrices with
    the same input share it).
    """
    rows, columns = weights.shape
    if upper is None:
        upper = inverse_hessian_cholesky(hessian, damping, name)
    importance = hessian.diagonal().float().clamp_min(1e-12 * float(hessian.diagonal().mean()) + 1e-30)
    scale_of_byte, codebook_of_byte, codebooks = codec_tables(bits, weights.device)
    flat_levels = codebooks.reshape(-1)
    w = weights.clone()
    # Column-major work arrays: the inner loop reads and writes whole columns.
    codes = torch.empty((columns, rows), dtype=torch.uint8, device=w.device)
    scale_bytes = torch.empty((columns // GROUP_SIZE, rows), dtype=torch.uint8, device=w.device)
    quantized = torch.empty((columns, rows), device=w.device)
    base = torch.empty((columns, rows), device=w.device) if kept is not None else None
    for start in range(0, columns, _LAZY_COLUMNS):
        end = min(start + _LAZY_COLUMNS, columns)
        block = w[:, start:end].t().contiguous()
        errors = torch.zeros_like(block)
        u = upper[start:end, start:end]
        for i in range(end - start):
            column = start + i
            if column % GROUP_SIZE == 0:
                group = block[i : i + GROUP_SIZE].t().contiguous()
                weight = importance[column : column + GROUP_SIZE]
                if kept is not None:
                    weight = weight * ~kept[:, column : column + GROUP_SIZE]
                byte = fit_scale_bytes(bits, group, weight)
                scale_bytes[column // GROUP_SIZE] = byte
                scale = scale_of_byte[byte.long()]
                first_level = codebook_of_byte[byte.long()] << bits
            code = codes_for(bits, block[i][:, None], byte)[:, 0]
            codes[column] = code
            value = scale * flat_levels[first_level + code]
            if base is not None:
                base[column] = value
                value = torch.where(kept[:, column], block[i], value)
            quantized[column] = value
            error = (block[i] - value) / u[i, i]
            block[i + 1 :] -= u[i, i + 1 :, None] * error[None, :]
            errors[i] = error
        if end < columns:
            w[:, end:] -= errors.t() @ upper[start:end, end:]
    quantized = quantized.t().contiguous()
    kept_values = None
    if kept is not None:
        kept_values = torch.where(kept, quantized - base.t(), torch.zeros((), device=w.device))
    return GptqResult(codes.t().contiguous(), scale_bytes.t().contiguous(), kept_values, relative_error(weights, quantized, hessian))
