"""Hessians for GPTQ: sum_t w_t x_t x_t^T over the inputs of every linear layer in the calibration texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from .load_model import LinkedTensor
from .reporting import Reporter


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


@torch.no_grad()
def group_by_input(model: PreTrainedModel, tensors: Sequence[LinkedTensor], text: Sequence[int]) -> list[list[LinkedTensor]]:
    """`tensors` in groups that get the very same input (q, k and v; gate and up), in the order in which the model runs them."""
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


def split_by_memory(groups: Sequence[list[LinkedTensor]], limit_bytes: float) -> list[list[list[LinkedTensor]]]:
    """Consecutive groups packed into parts whose matrices take at most `limit_bytes` (one group at the least): of each group a
    Hessian, and one of each of its members."""
    parts: list[list[list[LinkedTensor]]] = []
    used = 0.0
    for group in groups:
        size = 4.0 * group[0].shape[1] ** 2 * (1 + len(group))
        if not parts or used + size > limit_bytes:
            parts.append([])
            used = 0.0
        parts[-1].append(group)
        used += size
    return parts


@torch.no_grad()
def collect_hessians(
    model: PreTrainedModel, groups: Sequence[list[LinkedTensor]], texts: Sequence[Sequence[int]], weights: Sequence[torch.Tensor | None],
    reporter: Reporter, what: str,
) -> list[torch.Tensor]:  # fmt: skip
    """For each group the sum over all tokens of w_t x_t x_t^T, float32 [columns, columns]. A pass stops after the last group's input.

    weights: for each group float32 [tokens of all texts], or None for 1.
    """
    hessians = [torch.zeros(g[0].shape[1], g[0].shape[1], device=model.device) for g in groups]
    first = 0

    def hook_of(i: int) -> Callable[[torch.nn.Module, tuple], None]:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            x = input_rows(args)
            add_products(hessians[i], x, weighted_rows(x, weights[i], first))
            if i == len(groups) - 1:
                raise Done

        return hook

    with hooked((group[0].module, hook_of(i)) for i, group in enumerate(groups)):
        for text in reporter.track(texts, what):
            try:
                model(input_ids=torch.tensor([text], device=model.device), use_cache=False)
            except Done:
                pass
            first += len(text)
    return hessians
