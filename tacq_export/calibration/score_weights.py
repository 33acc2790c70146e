"""How much each weight matters to the task: the saliency made of its gradients (calibrate.py).

TaCQ, arXiv 2504.07389, sections 3.2 (quantization-aware localization) and 3.3 (magnitude-sharpened gradient). With
`g_s = dL_s/dW` the gradient of example s alone, `G = sum |g_s|` and `F = sum g_s^2`:

    tacq                G * |W - Q(W)| * |W|
    tacq-no-magnitude   G * |W - Q(W)|
    tacq-no-error       G * |W|
    fisher              F * (W - Q(W))^2
    obs                 a_r / [H^-1]_jj * W^2   (the least rise of the loss when the weight goes and its row makes up
                        for it)
    gradient            G
    magnitude           |W|
    random              uniform

`obs` is the saliency of the Optimal Brain Surgeon (Hassibi and Stork, 1992) for a loss a_r d H d^T of row r, with H and
a_r of calibrate.py. It is not in the paper: with GPTQ making up for errors, it keeps what is worth more (tools/LOG.md).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch

from ..errors import TacqError
from ..inputs.link_tensors import Linked, LinkedExperts, LinkedTensor
from ..reporting import Reporter

NEEDS_GRADIENT = {"tacq", "tacq-no-magnitude", "tacq-no-error", "gradient", "fisher"}
NEEDS_STATISTIC = NEEDS_GRADIENT | {"obs"}
NEEDS_REFERENCE = {"tacq", "tacq-no-magnitude", "fisher"}


def gradient_power(score: str) -> int | None:
    """P of the sum over examples of |dL/dW|^P that a score is made of; None for one that needs no gradients of
    weights."""
    return (2 if score == "fisher" else 1) if score in NEEDS_GRADIENT else None


def saliency(
    score: str,
    name: str,
    weight: torch.Tensor,
    statistic: torch.Tensor | None,
    error: torch.Tensor | None,
    seed: int = 0,
) -> torch.Tensor:
    """Saliency of one matrix by the formula of `score`, float32, not negative.

    statistic: G, F or a_r / [H^-1]_jj as the score needs; error: W - Q(W). Both may be None where the formula has none.
    The random score depends on seed and name only.
    """
    if score == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # it uses 32 bits only
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    if score == "magnitude":
        return weight.abs()
    assert statistic is not None  # all others are made of one
    if score == "gradient":
        return statistic
    if score == "obs":
        return statistic * weight.square()
    if score == "tacq-no-error":
        return statistic * weight.abs()
    assert error is not None
    if score == "fisher":
        return statistic * error.square()
    if score == "tacq-no-magnitude":
        return statistic * error.abs()
    return statistic * error.abs() * weight.abs()


def score_tensor(
    score: str,
    tensor: Linked,
    statistic: Callable[[str], torch.Tensor],
    reference_error: Callable[[LinkedTensor], torch.Tensor],
    seed: int,
) -> torch.Tensor:
    """Saliency of one matrix, float32 [rows, columns], torch's row order; of experts one under another.

    statistic(name) gives G, F or a_r / [H^-1]_jj, as the score needs; reference_error(tensor) gives W - Q(W). Raises
    TacqError when a saliency is not finite.
    """
    if isinstance(tensor, LinkedExperts):
        return torch.cat([score_tensor(score, m, statistic, reference_error, seed) for m in tensor.matrices])
    error = reference_error(tensor) if score in NEEDS_REFERENCE else None
    found = saliency(
        score, tensor.name, tensor.weight, statistic(tensor.name) if score in NEEDS_STATISTIC else None, error, seed
    )
    if not torch.isfinite(found).all():
        raise TacqError(
            f"tensor '{tensor.name}': the score '{score}' is not finite; a gradient overflowed, check the model and "
            "the task."
        )
    return found


def score_weights(
    score: str,
    linear: Sequence[Linked],
    statistic: Callable[[str], torch.Tensor],
    reference_error: Callable[[LinkedTensor], torch.Tensor],
    seed: int,
    reporter: Reporter,
) -> dict[str, torch.Tensor]:
    """{GGUF name: `score_tensor`} of the matrices `linear`."""
    return {t.name: score_tensor(score, t, statistic, reference_error, seed) for t in reporter.track(linear, "scoring")}
