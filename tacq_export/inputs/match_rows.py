"""Where the numbers of a GGUF tensor lie in the torch model: found and proven number by number.

A matrix of the GGUF is some rows of one torch matrix, in some order: all of them as a rule, permuted ones for Llama's q
and k, a half of a fused one, every other row of gpt-oss's. A torch matrix is a parameter, a parameter transposed
(GPT-2's Conv1D), or one expert's part of a parameter that holds all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import TacqError

PROBED_COLUMNS = 16  # so many numbers of a row tell which matrix it may be in


@dataclass(frozen=True)
class Source:
    """A matrix M [n, k] of the torch model that multiplies as x M^T: parameter `parameter_name` of a module, or its
    part number `expert` of `n_experts` equal ones, or the transpose of that."""

    module_name: str
    module: torch.nn.Module
    parameter_name: str
    expert: int | None = None
    n_experts: int = 1
    transposed: bool = False

    @property
    def matrix(self) -> torch.Tensor:
        """A view of the parameter, float [n, k]."""
        found = getattr(self.module, self.parameter_name).detach()
        if self.expert is not None:
            found = found.view(self.n_experts, -1, found.shape[-1])[self.expert]
        return found.t() if self.transposed else found


@dataclass(frozen=True)
class Match:
    """own: int64 [n], the rows of the source's matrix that make the tensor, ascending, or None for all; order: int64
    [n], tensor row i is own row order[i], or None where they are in order."""

    source: Source
    own: torch.Tensor | None
    order: torch.Tensor | None


class TorchMatrices:
    """All matrices of a torch model, by the block that they are in."""

    def __init__(self, model: torch.nn.Module):
        self._parameters: dict[int | None, list[tuple[str, torch.nn.Module, str]]] = {}
        for name, module in model.named_modules():
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2:
                    self._parameters.setdefault(block_number(name), []).append((name, module, parameter_name))

    def sources(self, tensor_name: str, first: str | None, n_experts: int | None = None) -> Iterator[Source]:
        """Matrices of the same block as a GGUF tensor; those of the module called `first` come first.

        n_experts: None for whole two-dimensional parameters, else parts of those that hold as many experts, each
        parameter's first one only, and then, one by one, whole ones (experts that are modules of their own).
        """
        found = sorted(self._parameters.get(block_number(tensor_name), []), key=lambda entry: entry[0] != first)
        if n_experts is not None:
            for name, module, parameter_name in found:
                shape = getattr(module, parameter_name).shape
                fits = shape[0] == n_experts if len(shape) == 3 else len(shape) == 2 and shape[0] % n_experts == 0
                if fits:
                    yield Source(name, module, parameter_name, 0, n_experts)
                    yield Source(name, module, parameter_name, 0, n_experts, transposed=True)
        for name, module, parameter_name in found:
            if getattr(module, parameter_name).dim() == 2:
                yield Source(name, module, parameter_name)
                yield Source(name, module, parameter_name, transposed=True)


def block_number(name: str) -> int | None:
    """The first number in a dotted name: 7 of blk.7.attn_q.weight and of model.layers.7.mlp.experts.3.w1."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def as_stored(values: np.ndarray, what: str) -> np.ndarray:
    """float16 of a GGUF tensor's values, -0.0 as 0.0. Raises TacqError for NaN or Inf."""
    if not np.isfinite(values).all():
        raise TacqError(f"{what} holds NaN or Inf; the model is damaged, fetch it again.")
    return values.astype(np.float16) + np.float16(0)


def match_matrix(stored: np.ndarray, sources: Iterator[Source]) -> Match | None:
    """The first source that holds the rows of `stored` (`as_stored`, [n, k]), rounded to F16, each once."""
    for source in sources:
        if (match := match_source(stored, source)) is not None:
            return match
    return None


def match_source(stored: np.ndarray, source: Source) -> Match | None:
    """Where the rows of `stored` are in one source; None unless all are there."""
    n, k = stored.shape
    matrix = source.matrix
    if matrix.dim() != 2 or matrix.shape[1] != k or matrix.shape[0] < n:
        return None
    probe = torch.from_numpy(stored[0, :PROBED_COLUMNS].copy()).to(matrix.device)
    with_first = (matrix[:, :PROBED_COLUMNS].half() + 0.0 == probe).all(1).nonzero()[:, 0]
    if len(with_first) == 0:
        return None
    own = matrix.to(torch.float16).cpu().numpy() + np.float16(0)  # -0.0 becomes 0.0: equal numbers, equal bytes
    if own.shape == stored.shape and np.array_equal(stored, own):
        return Match(source, None, None)
    first = int(with_first[0])
    for step in (1, 2):  # a part of a fused matrix, or every other row
        part = own[first : first + step * n : step]
        if part.shape == stored.shape and np.array_equal(stored, part):
            return Match(source, torch.arange(first, first + step * n, step), None)
    rows_of: dict[bytes, list[int]] = {}
    for i, row in enumerate(own):
        rows_of.setdefault(row.tobytes(), []).append(i)
    places = [rows_of.get(row.tobytes(), []) for row in stored]
    found = torch.tensor([same.pop(0) if same else -1 for same in places])
    if (found < 0).any():
        return None
    if len(own) == n:
        return Match(source, None, found)
    rows, order = found.sort()
    return Match(source, rows, order.argsort())


def match_experts(stored: list[np.ndarray], sources: list[Source]) -> list[Match] | None:
    """Of each expert's matrix its match; None unless all are found. sources: as `TorchMatrices.sources` gives them for
    experts.

    All experts are in one parameter, or each is in a parameter of its own of the same name in a numbered module.
    """
    first = match_matrix(stored[0], iter(sources))
    if first is None:
        return None
    found = [first]
    by_name = {(s.module_name, s.parameter_name, s.transposed): s for s in sources if s.expert is None}
    for e, matrix in enumerate(stored[1:], 1):
        source = first.source
        if source.expert is not None:
            sibling = Source(
                source.module_name, source.module, source.parameter_name, e, source.n_experts, source.transposed
            )
        else:
            name = _numbered(source.module_name, e)
            if name is None or (name, source.parameter_name, source.transposed) not in by_name:
                return None
            sibling = by_name[name, source.parameter_name, source.transposed]
        match = match_source(matrix, sibling)
        if match is None or not _same_rows(match.own, first.own):
            return None
        found.append(match)
    return found


def _numbered(module_name: str, expert: int) -> str | None:
    """The name of the module of another expert: its number is the last one in the name of the first's."""
    parts = re.match(r"(.*\.)0((?:\.[^.\d][^.]*)*)$", module_name)
    return None if parts is None else f"{parts[1]}{expert}{parts[2]}"


def _same_rows(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
