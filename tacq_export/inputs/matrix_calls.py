"""Sees every product of an input with a matrix of the model, wherever the model's code makes it.

Modules differ: a Linear is called with one tensor, GPT-2's Conv1D holds its matrix transposed, an experts module loops
over views of one parameter of three dimensions. The products are the same few functions of torch, and the matrix in a
call is known by its place in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.overrides import TorchFunctionMode

from .linked import LinkedTensor

Entering = Callable[[LinkedTensor, torch.Tensor], None]
Leaving = Callable[[LinkedTensor, torch.Tensor, torch.Tensor, int | None], None]
_TIMES = {
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
}
_BATCHED = {torch.bmm, torch.Tensor.bmm}
Place = tuple[int, tuple[int, ...], tuple[int, ...]]


def _place(matrix: torch.Tensor) -> Place:
    """What two views of the same numbers in the same order have in common."""
    return matrix.data_ptr(), tuple(matrix.shape), tuple(matrix.stride())


class MatrixCalls(TorchFunctionMode):
    """For as long as the `with` lasts: entering(tensor, x) before, and leaving(tensor, x, y, part) after each
    y = x M^T (+ bias) with the matrix M of whose rows a tensor is made.

    x: [..., columns]; y: [..., rows of M], as it goes on in the model; part: None, or which of a batch of products
    y[part] is the tensor's (`own_output` picks). Tensors of one M are told one after the other. A call without a token
    is not told.
    """

    def __init__(
        self, tensors: Iterable[LinkedTensor], entering: Entering | None = None, leaving: Leaving | None = None
    ):
        super().__init__()
        self._entering, self._leaving = entering, leaving
        self._of: dict[Place, list[LinkedTensor]] = {}
        for tensor in tensors:
            self._of.setdefault(_place(tensor.source.matrix), []).append(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            calls = [(x, self._tensors(weight))]
        elif func in _TIMES and len(args) == 2 and args[1].dim() == 2:
            calls = [(args[0], self._tensors(args[1].t()))]
        elif func is torch.addmm and len(args) == 3:
            calls = [(args[1], self._tensors(args[2].t()))]
        elif (func in _BATCHED or func in _TIMES) and len(args) == 2 and args[1].dim() == 3 and args[0].dim() == 3:
            calls = [(x, self._tensors(m.t())) for x, m in zip(args[0], args[1], strict=True)]
            return self._run(func, args, kwargs, calls, batched=True)
        else:
            return func(*args, **kwargs)
        return self._run(func, args, kwargs, calls, batched=False)

    def _tensors(self, matrix: torch.Tensor) -> list[LinkedTensor]:
        return self._of.get(_place(matrix), []) if matrix.dim() == 2 else []

    def _run(self, func, args, kwargs, calls: list[tuple[torch.Tensor, list[LinkedTensor]]], batched: bool):
        told = [(i, x, tensor) for i, (x, tensors) in enumerate(calls) if x.numel() for tensor in tensors]
        if self._entering is not None:
            for _, x, tensor in told:
                self._entering(tensor, x)
        y = func(*args, **kwargs)
        if self._leaving is not None:
            for i, x, tensor in told:
                self._leaving(tensor, x, y, i if batched else None)
        return y


def routed(tensor: LinkedTensor, x: torch.Tensor) -> torch.Tensor | None:
    """bool [tokens] of those that reach an expert, where some do not: Llama 4 gives each expert all tokens, zeros for
    those of others. None for all."""
    if not tensor.is_expert:
        return None
    reach = x.detach().reshape(-1, x.shape[-1]).any(1)
    return None if bool(reach.all()) else reach


def own_output(tensor: LinkedTensor, y: torch.Tensor, part: int | None) -> torch.Tensor:
    """[tokens, rows] of a tensor, from what `leaving` was told of, or its gradient."""
    rows = y if part is None else y[part]
    rows = rows.reshape(-1, rows.shape[-1])
    return rows if tensor.own is None else rows[:, tensor.own.to(rows.device)]
