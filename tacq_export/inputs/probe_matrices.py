"""Whether the torch model multiplies its inputs with the matrices that were found in it: seen while it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..errors import TacqError
from .linked import Linked, LinkedTensor, matrices_of
from .matrix_calls import MatrixCalls

PROBE_TOKENS = 16


def multiply_one_by_one(model: PreTrainedModel) -> None:
    """Let every experts module of transformers run the loop over experts that it is written as, where each product can
    be seen, and none of the functions that replace it."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"


@torch.no_grad()
def not_multiplied(model: PreTrainedModel, tensors: Sequence[Linked]) -> dict[str, str]:
    """{name: why} of those that a pass over a few tokens does not call as y = x M^T (+ bias), once.

    Of experts at least one must be called so, and none twice. Raises TacqError if torch cannot run the model.
    """
    calls: dict[str, int] = {}

    def entering(tensor: LinkedTensor, x: torch.Tensor) -> None:
        calls[tensor.name] = calls.get(tensor.name, 0) + 1

    parts = [m for t in tensors for m in matrices_of(t)]
    if not parts:
        return {}
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    tokens = torch.arange(min(PROBE_TOKENS, len(embedding)), device=model.device)[None]
    try:
        with MatrixCalls(parts, entering):
            model(input_ids=tokens, use_cache=False)
    except Exception as error:  # the model's own code, which may raise anything
        said = (str(error).splitlines() or ["no message"])[0][:200]
        raise TacqError(
            f"torch cannot run the model ({type(error).__name__}: {said}); use an architecture that transformers can "
            "run here."
        ) from error
    reasons = {}
    for tensor in tensors:
        counts = [calls.get(m.name, 0) for m in matrices_of(tensor)]
        if max(counts) == 0:
            reasons[tensor.name] = "torch does not multiply with them as with a linear layer"
        elif max(counts) > 1:
            reasons[tensor.name] = "torch multiplies with them more than once in a pass"
    return reasons
