"""What goes into every linear layer in the calibration texts, and its second moment sum_t w_t x_t x_t^T, the Hessian of
GPTQ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..inputs.link_tensors import Linked, LinkedExperts, LinkedTensor, matrices_of, of_experts
from ..inputs.matrix_calls import MatrixCalls, routed

STRIPE = 1024  # rows of a Hessian made at once


class Done(Exception):
    """Raised by a hook: ends a forward pass when all that was wanted has been seen."""


def input_rows(tensor: LinkedTensor, x: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, columns] of what a matrix multiplies; of an expert's those that reach it."""
    rows, reach = x.detach().reshape(-1, x.shape[-1]).float(), routed(tensor, x)
    return rows if reach is None else rows[reach]


def weighted_rows(x: torch.Tensor, weights: torch.Tensor | None, first: int) -> torch.Tensor:
    """w_t x_t of each row; weights: float32 [tokens of all texts], this text's from `first` on, or None for 1."""
    return x if weights is None else x * weights[first : first + len(x), None].to(x.device)


def add_products(total: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> None:
    """total += sum_t x_t z_t^T, in float32 whatever the model's products are."""
    with torch.autocast(x.device.type, enabled=False):
        total.addmm_(x.t(), z)


def add_to_lower(total: torch.Tensor, x: torch.Tensor, weighted: torch.Tensor) -> None:
    """The same for weighted = w x, where the sum is symmetric: only stripes up to the diagonal, which is nearly half
    the work. `mirror` ends it."""
    with torch.autocast(x.device.type, enabled=False):
        for first in range(0, total.shape[0], STRIPE):
            end = min(first + STRIPE, total.shape[0])
            total[first:end, :end].addmm_(x[:, first:end].t(), weighted[:, :end])


def mirror(total: torch.Tensor) -> torch.Tensor:
    """`total` with what lies right of the stripes of `add_to_lower` filled in, in place."""
    for first in range(STRIPE, total.shape[0], STRIPE):
        total[:first, first : first + STRIPE] = total[first : first + STRIPE, :first].t()
    return total


def second_moment(inputs: Sequence[torch.Tensor], weights: torch.Tensor | None) -> torch.Tensor:
    """sum_t w_t x_t x_t^T over the rows x_t of all `inputs`, float32 [columns, columns]. weights: float32 [rows of all
    inputs], or None for 1."""
    total = inputs[0].new_zeros(inputs[0].shape[1], inputs[0].shape[1])
    first = 0
    for x in inputs:
        add_to_lower(total, x, weighted_rows(x, weights, first))
        first += len(x)
    return mirror(total)


@torch.no_grad()
def collect_inputs(
    model: PreTrainedModel, tensors: Sequence[LinkedTensor], texts: Sequence[Sequence[int]]
) -> list[list[torch.Tensor]]:
    """Of each matrix the inputs in each text, float32 [tokens, columns]. A pass stops when all have been called."""
    found: dict[str, list[torch.Tensor]] = {t.name: [] for t in tensors}

    def entering(tensor: LinkedTensor, x: torch.Tensor) -> None:
        found[tensor.name].append(input_rows(tensor, x))
        if len({len(of_tensor) for of_tensor in found.values()}) == 1:
            raise Done

    with MatrixCalls(tensors, entering):
        for text in texts:
            try:
                model(input_ids=torch.tensor([list(text)], device=model.device), use_cache=False)
            except Done:
                pass
    return [found[t.name] for t in tensors]


@torch.no_grad()
def group_by_input(
    model: PreTrainedModel, tensors: list[Linked], text: Sequence[int]
) -> tuple[list[list[LinkedTensor]], list[list[LinkedExperts]]]:
    """`tensors` in groups that get the very same input (q, k and v; gate and up), in the order in which the model runs
    them: those that are one matrix, and those of experts."""
    groups: dict[int, list[LinkedTensor]] = {}
    experts: dict[int, dict[str, LinkedExperts]] = {}
    whole = {m.name: t for t in of_experts(tensors) for m in t.matrices}
    inputs = []  # held, so that no id is used twice

    def entering(matrix: LinkedTensor, x: torch.Tensor) -> None:
        inputs.append(x)
        if matrix.name not in whole:
            groups.setdefault(id(x), []).append(matrix)
        elif not any(whole[matrix.name].name in group for key, group in experts.items() if key != id(x)):
            experts.setdefault(id(x), {})[whole[matrix.name].name] = whole[matrix.name]

    with MatrixCalls([m for t in tensors for m in matrices_of(t)], entering):
        model(input_ids=torch.tensor([list(text[:16])], device=model.device), use_cache=False)
    return list(groups.values()), [list(group.values()) for group in experts.values()]
