"""Coordinate descent after GPTQ: every code again, with all other errors known.

GPTQ decides a column knowing only the errors of the columns before it. Afterwards the loss of a row, `d H d^T` with
`d = W - Q`, can only fall if one weight after the other moves to the level nearest to its optimum given all others,
`q_j + (d H)_j / H_jj` (Behdin et al., QuantEase, arXiv 2309.01885, equation 6; there without groups and codebooks). Scale
bytes stay. A kept weight moves to the optimum itself.
"""

from __future__ import annotations

import torch

from .fit_groups import codec_tables, codes_for, dequantize_groups
from .quantize_gptq import GptqResult, relative_error
from .tensor_types import GROUP_SIZE

_BLOCK = 128  # columns visited one by one before the gradient of the others is updated by one product


def refine_codes(
    bits: int, weights: torch.Tensor, hessian: torch.Tensor, result: GptqResult, kept: torch.Tensor | None, sweeps: int, damping: float = 0.01
) -> GptqResult:
    """`result` of quantize_gptq after `sweeps` passes over all columns; the same scale bytes, other codes and kept values.

    weights: float32 [rows, columns]; hessian, kept, damping as for quantize_gptq. The damped loss never rises.
    """
    if sweeps == 0:
        return result
    columns = weights.shape[1]
    h = hessian.float().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    scale_of_byte, codebook_of_byte, codebooks = codec_tables(bits, weights.device)
    flat_levels = codebooks.reshape(-1)
    codes = result.codes.t().contiguous()
    scale_bytes = result.scale_bytes.t().contiguous()
    base = dequantize_groups(bits, result.codes, result.scale_bytes).t().contiguous()
    values = base.clone() if kept is None else base + result.kept_values.t()
    target = weights.t().contiguous()
    for _ in range(sweeps):
        gradient = h @ (target - values)  # [columns, rows], exact again at the start of each sweep
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            block = gradient[start:end]
            moved = torch.empty_like(block)
            for i in range(end - start):
                column = start + i
                best = values[column] + block[i] / h[column, column]
                byte = scale_bytes[column // GROUP_SIZE]
                code = codes_for(bits, best[:, None], byte)[:, 0]
                index = byte.long()
                level = scale_of_byte[index] * flat_levels[(codebook_of_byte[index] << bits) + code]
                codes[column], base[column] = code, level
                value = level if kept is None else torch.where(kept[:, column], best, level)
                moved[i] = value - values[column]
                values[column] = value
                block[i + 1 :] -= h[column, column + 1 : end, None] * moved[i]
            gradient[end:] -= h[end:, start:end] @ moved
    quantized = values.t().contiguous()
    kept_values = None if kept is None else torch.where(kept, (values - base).t(), torch.zeros((), device=weights.device))
    return GptqResult(codes.t().contiguous(), result.scale_bytes, kept_values, relative_error(weights, quantized, hessian))
