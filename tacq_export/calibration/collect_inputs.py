"""What goes into every linear layer in the calibration texts, and its second moment sum_t w_t x_t x_t^T, the Hessian of
GPTQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..inputs.link_tensors import LinkedTensor

STRIPE = 1024  # rows of a Hessian made at once


class Done(Exception):
    """Raised by a hook: ends a forward pass when all that was wanted has been seen."""


@contextmanager
def hooked(hooks: Iterable[tuple[torch.nn.Module, Callable[[torch.nn.Module, tuple], None]]]) -> Iterator[None]:
    """Each hook(module, args) runs before its module's forward, for as long as the `with` lasts."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_rows(args: tuple) -> torch.Tensor:
    """float32 [tokens, columns] of what a layer is called with."""
    return args[0].reshape(-1, args[0].shape[-1]).float()


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
    model: PreTrainedModel, modules: Sequence[torch.nn.Module], texts: Sequence[Sequence[int]]
) -> list[list[torch.Tensor]]:
    """Of each module the inputs in each text, float32 [tokens, columns]. A pass stops when all modules have been
    called."""
    found: list[list[torch.Tensor]] = [[] for _ in modules]

    def hook_of(i: int) -> Callable[[torch.nn.Module, tuple], None]:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            found[i].append(input_rows(args))
            if all(len(of_module) == len(found[i]) for of_module in found):
                raise Done

        return hook

    with hooked((module, hook_of(i)) for i, module in enumerate(modules)):
        for text in texts:
            try:
                model(input_ids=torch.tensor([list(text)], device=model.device), use_cache=False)
            except Done:
                pass
    return found


@torch.no_grad()
def group_by_input(
    model: PreTrainedModel, tensors: Sequence[LinkedTensor], text: Sequence[int]
) -> list[list[LinkedTensor]]:
    """`tensors` in groups that get the very same input (q, k and v; gate and up), in the order in which the model runs
    them."""
    groups: dict[int, list[LinkedTensor]] = {}
    inputs = []  # held, so that no id is used twice

    def hook_of(tensor: LinkedTensor) -> Callable[[torch.nn.Module, tuple], None]:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            inputs.append(args[0])
            groups.setdefault(id(args[0]), []).append(tensor)

        return hook

    with hooked((tensor.module, hook_of(tensor)) for tensor in tensors):
        model(input_ids=torch.tensor([list(text[:16])], device=model.device), use_cache=False)
    return list(groups.values())
