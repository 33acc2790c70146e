"""Matrices of the float GGUF, each with the torch matrix that it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .match_rows import Source


@dataclass(frozen=True)
class LinkedTensor:
    """One matrix: its GGUF tensor, or one expert's part of that, and the torch parameter whose rows it is.

    name: of the tensor, NAME[3] for the fourth expert's part (is_expert). own: int64 [n_rows], the rows of the torch
    matrix that make it, ascending, or None for all. rows: int64 [n_rows] or None: GGUF row i is own row rows[i]
    (Llama's q and k are stored in another order). stock: empty, or the stock types that hold the matrix where ours
    cannot (held_types.py). The other fields: as in `Source`.
    """

    name: str
    module_name: str
    module: torch.nn.Module
    rows: torch.Tensor | None
    own: torch.Tensor | None = None
    parameter_name: str = "weight"
    expert: int | None = None
    n_experts: int = 1
    transposed: bool = False
    is_expert: bool = False
    stock: tuple[str, ...] = ()

    @property
    def source(self) -> Source:
        return Source(self.module_name, self.module, self.parameter_name, self.expert, self.n_experts, self.transposed)

    @property
    def parameter(self) -> torch.nn.Parameter:
        return getattr(self.module, self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:
        """float32 [rows, columns], torch's row order."""
        matrix = self.source.matrix
        return matrix if self.own is None else matrix[self.own.to(matrix.device)]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.source.matrix.shape
        return (rows if self.own is None else len(self.own)), columns

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def put(self, weight: torch.Tensor) -> None:
        """The torch model computes with `weight`, [rows, columns], from now on."""
        matrix = self.source.matrix
        if self.own is None:
            matrix.copy_(weight)
        else:
            matrix[self.own.to(matrix.device)] = weight.to(matrix)

    def rows_of_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """[rows, columns] of what is shaped as the parameter."""
        if self.expert is not None:
            gradient = gradient.view(self.n_experts, -1, gradient.shape[-1])[self.expert]
        if self.transposed:
            gradient = gradient.t()
        return gradient if self.own is None else gradient[self.own.to(gradient.device)]


@dataclass(frozen=True)
class LinkedExperts:
    """One GGUF tensor of three dimensions, a matrix for each expert: one type, and one sparse section for all.

    As a matrix it is that of all experts, one under another: `shape` is (experts x rows, columns).
    """

    name: str
    matrices: tuple[LinkedTensor, ...]

    @property
    def stock(self) -> tuple[str, ...]:
        """As of one matrix: what holds the one that is hardest to hold."""
        return min((m.stock for m in self.matrices if m.stock), key=len, default=())

    @property
    def module_name(self) -> str:
        return self.matrices[0].module_name

    @cached_property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrices[0].shape
        return len(self.matrices) * rows, columns

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def weight(self) -> torch.Tensor:
        """float32 [experts x rows, columns]: a copy of all."""
        return torch.cat([m.weight for m in self.matrices])


Linked = LinkedTensor | LinkedExperts


def dense(tensors: list[Linked]) -> list[LinkedTensor]:
    """Those that are one matrix."""
    return [t for t in tensors if isinstance(t, LinkedTensor)]


def of_experts(tensors: list[Linked]) -> list[LinkedExperts]:
    """Those that are a matrix for each expert."""
    return [t for t in tensors if isinstance(t, LinkedExperts)]


def matrices_of(tensor: Linked) -> tuple[LinkedTensor, ...]:
    return tensor.matrices if isinstance(tensor, LinkedExperts) else (tensor,)
