"""Hessians for GPTQ: sum_t w_t x_t x_t^T over the inputs of every linear layer in the calibration texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .load_model import LinkedTensor
from .reporting import Reporter


class _Done(Exception):
    """Ends a forward pass after the last layer of interest."""


@torch.no_grad()
def group_by_input(model: PreTrainedModel, tensors: Sequence[LinkedTensor], text: Sequence[int]) -> list[list[LinkedTensor]]:
    """`tensors` in groups that get the very same input (q, k and v; gate and up), in the order in which the model runs them."""
    groups: dict[int, list[LinkedTensor]] = {}
    inputs = []  # held, so that no id is used twice
    handles = []
    for tensor in tensors:

        def hook(module, args, tensor=tensor):
            inputs.append(args[0])
            groups.setdefault(id(args[0]), []).append(tensor)

        handles.append(tensor.module.register_forward_pre_hook(hook))
    try:
        model(input_ids=torch.tensor([list(text[:16])], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
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
    handles, first = [], 0
    for i, group in enumerate(groups):

        def hook(module, args, hessian=hessians[i], weight=weights[i], last=i == len(groups) - 1):
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            weighted = x if weight is None else x * weight[first : first + len(x), None].to(x.device)
            with torch.autocast(x.device.type, enabled=False):  # sums of squares stay in float32
                hessian.addmm_(x.t(), weighted)
            if last:
                raise _Done

        handles.append(group[0].module.register_forward_pre_hook(hook))
    try:
        for text in reporter.track(texts, what):
            try:
                model(input_ids=torch.tensor([text], device=model.device), use_cache=False)
            except _Done:
                pass
            first += len(text)
    finally:
        for handle in handles:
            handle.remove()
    return hessians
