"""How much each weight matters to the task: the saliency made of its gradients (calibrate.py).

TaCQ, arXiv 2504.07389, sections 3.2 (quantization-aware localization) and 3.3 (magnitude-sharpened gradient). With
`g_s = dL_s/dW` the gradient of example s alone, `G = sum |g_s|` and `F = sum g_s^2`:

    tacq                G * |W - Q(W)| * |W|
    tacq-no-magnitude   G * |W - Q(W)|
    tacq-no-error       G * |W|
    fisher              F * (W - Q(W))^2
    gradient            G
    magnitude           |W|
    random              uniform
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch

from .errors import TacqError
from .load_model import LinkedTensor
from .reporting import Reporter

NEEDS_GRADIENT = {"tacq", "tacq-no-magnitude", "tacq-no-error", "gradient", "fisher"}
NEEDS_REFERENCE = {"tacq", "tacq-no-magnitude", "fisher"}


def saliency(
    score: str, name: str, weight: torch.Tensor, gradient: torch.Tensor | None, error: torch.Tensor | None, seed: int = 0
) -> torch.Tensor:
    """Saliency of one matrix by the formula of `score`, float32, not negative.

    gradient: G or F as the score needs; error: W - Q(W). Both may be None where the formula has none. The random score
    depends on seed and name only.
    """
    if score == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # it uses 32 bits only
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    if score == "magnitude":
        return weight.abs()
    if score == "gradient":
        return gradient
    if score == "fisher":
        return gradient * error.square()
    if score == "tacq-no-error":
        return gradient * weight.abs()
    if score == "tacq-no-magnitude":
        return gradient * error.abs()
    return gradient * error.abs() * weight.abs()


def score_tensor(
    score: str, tensor: LinkedTensor, gradient: Callable[[str], torch.Tensor], reference_error: Callable[[LinkedTensor], torch.Tensor], seed: int
) -> torch.Tensor:
    """Saliency of one matrix, float32 [rows, columns], torch's row order.

    gradient(name) gives G or F, as the score needs; reference_error(tensor) gives W - Q(W). Raises TacqError when a saliency
    is not finite.
    """
    error = reference_error(tensor) if score in NEEDS_REFERENCE else None
    sums = gradient(tensor.name) if score in NEEDS_GRADIENT else None
    found = saliency(score, tensor.name, tensor.weight, sums, error, seed)
    if not torch.isfinite(found).all():
        raise TacqError(f"tensor '{tensor.name}': the score '{score}' is not finite; a gradient overflowed, check the model and the task.")
    return found


def score_weights(
    score: str,
    linear: Sequence[LinkedTensor],
    gradient: Callable[[str], torch.Tensor],
    reference_error: Callable[[LinkedTensor], torch.Tensor],
    seed: int,
    reporter: Reporter,
) -> dict[str, torch.Tensor]:
    """{GGUF name: `score_tensor`} of the matrices `linear`."""
    return {t.name: score_tensor(score, t, gradient, reference_error, seed) for t in reporter.track(linear, "scoring")}
