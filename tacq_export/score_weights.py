"""How much each weight matters to the task: gradients, and the saliency made of them.

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
from transformers import PreTrainedModel

from .errors import TacqError
from .load_model import LinkedTensor
from .reporting import Reporter

# Power of the gradient that a score adds up; None where it needs no gradient.
GRADIENT_POWER = {
    "tacq": 1, "tacq-no-magnitude": 1, "tacq-no-error": 1, "gradient": 1, "fisher": 2, "magnitude": None, "random": None,
}  # fmt: skip
NEEDS_REFERENCE = {"tacq", "tacq-no-magnitude", "fisher"}


def accumulate_gradients(
    model: PreTrainedModel, modules: dict[str, torch.nn.Module], texts: Sequence[Sequence[int]], power: int, reporter: Reporter
) -> dict[str, torch.Tensor]:
    """{name: sum over texts of |dL/dW|^power}, float32, shaped as each module's weight.

    L is the mean next-token cross-entropy of one text. Each gradient is freed as soon as it is added, so gradient memory
    is one matrix. Raises TacqError when a loss is not finite.
    """
    sums = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    handles = []

    def add_to(total: torch.Tensor) -> Callable[[torch.nn.Parameter], None]:
        def hook(parameter: torch.nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            total.add_(gradient.abs_()) if power == 1 else total.addcmul_(gradient, gradient)

        return hook

    try:
        for name, module in modules.items():
            module.weight.requires_grad_(True)
            handles.append(module.weight.register_post_accumulate_grad_hook(add_to(sums[name])))
        for i, text in enumerate(reporter.track(texts, "scoring")):
            tokens = torch.tensor([text], device=model.device)
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
            if not torch.isfinite(loss):
                raise TacqError(f"The loss of example {i + 1} is {loss.item()}; the model or that example is damaged.")
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            module.weight.requires_grad_(False)
            module.weight.grad = None
    return sums


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


def score_weights(
    score: str,
    model: PreTrainedModel,
    linear: Sequence[LinkedTensor],
    texts: Sequence[Sequence[int]],
    reference_error: Callable[[LinkedTensor], torch.Tensor],
    seed: int,
    reporter: Reporter,
) -> dict[str, torch.Tensor]:
    """{GGUF name: saliency, float32 [rows, columns], torch's row order} of the matrices `linear`.

    reference_error(tensor) gives W - Q(W). Raises TacqError when a saliency is not finite.
    """
    power = GRADIENT_POWER[score]
    sums: dict[str, torch.Tensor] = {}
    if power is not None:
        sums = accumulate_gradients(model, {t.name: t.module for t in linear}, texts, power, reporter)
    scores = {}
    what = "quantizing for reference" if score in NEEDS_REFERENCE else "saliency"
    for tensor in reporter.track(linear, what):
        error = reference_error(tensor) if score in NEEDS_REFERENCE else None
        scores[tensor.name] = saliency(score, tensor.name, tensor.weight, sums.pop(tensor.name, None), error, seed)
        if not torch.isfinite(scores[tensor.name]).all():
            raise TacqError(f"tensor '{tensor.name}': the score '{score}' is not finite; a gradient overflowed, check the model and the task.")
    return scores
