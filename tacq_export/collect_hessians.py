"""Hessians for GPTQ: X^T X of every linear layer's inputs over the calibration texts."""

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
    """Consecutive groups packed into parts whose Hessians together take at most `limit_bytes` (one group at the least)."""
    parts: list[list[list[LinkedTensor]]] = []
    used = 0.0
    for group in groups:
        size = 4.0 * group[0].shape[1] ** 2
        if not parts or used + size > limit_bytes:
            parts.append([])
            used = 0.0
        parts[-1].append(group)
        used += size
    return parts


@torch.no_grad()
def collect_hessians(
    model: PreTrainedModel, groups: Sequence[list[LinkedTensor]], texts: Sequence[Sequence[int]], reporter: Reporter, what: str
) -> list[torch.Tensor]:
    """For each group the sum over all tokens of x^T x, float32 [columns, columns]. A pass stops after the last group's input."""
    hessians = [torch.zeros(g[0].shape[1], g[0].shape[1], device=model.device) for g in groups]
    handles = []
    for i, group in enumerate(groups):

        def hook(module, args, hessian=hessians[i], last=i == len(groups) - 1):
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            hessian.addmm_(x.t(), x)
            if last:
                raise _Done

        handles.append(group[0].module.register_forward_pre_hook(hook))
    try:
        for text in reporter.track(texts, what):
            try:
                model(input_ids=torch.tensor([text], device=model.device), use_cache=False)
            except _Done:
                pass
    finally:
        for handle in handles:
            handle.remove()
    return hessians
