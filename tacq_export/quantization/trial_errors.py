"""The quantizer's errors, as the prediction of losses asks for them (predict_loss.py)."""

from __future__ import annotations

import torch

from ..calibration.predict_loss import TrialErrors
from .fit_groups import dequantize_groups, round_to_nearest
from .quantize_gptq import quantize_gptq

SAMPLE_SWEEPS = 1


def rounded_error(bits: int, weight: torch.Tensor) -> torch.Tensor:
    """W - Q(W), float32 [rows, columns], by plain rounding."""
    return weight - dequantize_groups(bits, *round_to_nearest(bits, weight))


def quantized_error(bits: int, weight: torch.Tensor, damped: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """W - Q(W), float32 [rows, columns], of rows quantized in short: one sweep, and no feedback of errors.

    damped: float32 [columns, columns], the Hessian with its damping; kept: bool [rows, columns], weights that stay, or
    None.
    """
    result = quantize_gptq(bits, weight, damped, kept, 0.0, sweeps=SAMPLE_SWEEPS, feed_forward=False)
    error = weight - dequantize_groups(bits, result.codes, result.scale_bytes)
    return error if result.kept_values is None else error - result.kept_values


TRIAL = TrialErrors(rounded=rounded_error, quantized=quantized_error)
