"""Which weights to keep: the top of the saliency over the whole model, unstructured, and as many more as the room
allows.

The selection is exact at any model size: saliencies are not negative, so their float32 bit patterns order as they do,
and two counting passes over the patterns (upper, then lower 16 bits) find the n-th largest without sorting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import TacqError
from ..format.sparse_section import MOST_COLUMNS, capacity
from ..format.tensor_types import BLOCK_SIZE, SPARSE_DENSITIES, TensorType


@dataclass(frozen=True)
class TensorSelection:
    """type: base or mixed type of the tensor; kept: int64 [nnz], flat indices (torch's row order), ascending; selected:
    how many of them belong to the global top, the others fill the room that is left."""

    type: TensorType
    kept: torch.Tensor
    selected: int


def _patterns(score: torch.Tensor) -> torch.Tensor:
    """int32 [n]: bit patterns of float32 saliencies, in the order of their values (+ 0.0 turns -0.0 into 0.0)."""
    return (score.reshape(-1).float() + 0.0).view(torch.int32)


def count_patterns(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    """int64 [tensors, 32768]: how many saliencies of each tensor have each upper half of a bit pattern."""
    return torch.stack([torch.bincount(_patterns(s) >> 16, minlength=1 << 15).cpu() for s in scores.values()])


def count_lower_halves(score: torch.Tensor, high: int) -> torch.Tensor:
    """int64 [65536]: how many saliencies whose upper half is `high` have each lower half."""
    patterns = _patterns(score)
    return torch.bincount(patterns[(patterns >> 16) == high] & 0xFFFF, minlength=1 << 16).cpu()


def global_top(scores: dict[str, torch.Tensor], n_keep: int) -> dict[str, torch.Tensor]:
    """{name: int64 flat indices, ascending} of the `n_keep` largest saliencies of all tensors together.

    Ties at the border go to the earlier tensor, then to the smaller index.
    """
    total = sum(s.numel() for s in scores.values())
    if not 0 <= n_keep <= total:
        raise ValueError(f"cannot keep {n_keep} of {total} weights")
    if n_keep == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in scores}
    upper = count_patterns(scores).sum(0)
    at_least = upper.flip(0).cumsum(0).flip(0)  # [h]: saliencies whose upper half is h or more
    high = int((at_least >= n_keep).nonzero().max())
    above = int(at_least[high + 1]) if high + 1 < len(at_least) else 0
    lower = torch.stack([count_lower_halves(score, high) for score in scores.values()]).sum(0)
    at_least = lower.flip(0).cumsum(0).flip(0) + above
    low = int((at_least >= n_keep).nonzero().max())
    border = (high << 16) | low
    ties = n_keep - (int(at_least[low + 1]) if low + 1 < len(at_least) else above)
    top = {}
    for name, score in scores.items():
        patterns = _patterns(score)
        at_border = (patterns == border).nonzero()[:ties, 0]
        ties -= len(at_border)
        top[name] = torch.cat([(patterns > border).nonzero()[:, 0], at_border]).sort().values.cpu()
    return top


def smallest_density(n_rows: int, n_weights: int, n_kept: int) -> int | None:
    """The smallest p whose sparse section has room for `n_kept` weights: 0 for none, None if even the largest has
    not."""
    if n_kept == 0:
        return 0
    return next((p for p in SPARSE_DENSITIES if capacity(n_rows, n_weights, p) >= n_kept), None)


def density_for(n_rows: int, n_weights: int, n_kept: int) -> int:
    """`smallest_density`, or the largest there is: what does not fit then stays quantized."""
    p = smallest_density(n_rows, n_weights, n_kept)
    return SPARSE_DENSITIES[-1] if p is None else p


def _linear_bytes(shapes: dict[str, tuple[int, int]], base: TensorType, counts: list[int]) -> int:
    total = 0
    for (rows, columns), count in zip(shapes.values(), counts, strict=True):
        p = density_for(rows, rows * columns, count)
        total += rows * columns // BLOCK_SIZE * (base.base_bytes + p)
    return total


def keep_for_target(
    scores: dict[str, torch.Tensor], shapes: dict[str, tuple[int, int]], base: TensorType, target_bpw: float
) -> int:
    """How many weights of the global top can be kept so that the linear matrices take at most `target_bpw` bits per
    weight.

    Found by bisection over the borders between bit patterns, first of their upper halves, then of the lower ones of the
    first upper half that is too much. Raises TacqError if the base alone takes more.
    """
    n_weights = sum(rows * columns for rows, columns in shapes.values())
    budget = target_bpw * n_weights / 8
    if _linear_bytes(shapes, base, [0] * len(shapes)) > budget:
        raise TacqError(
            f"--target-bpw {target_bpw:g} is less than the {base.bits_per_weight:g} bits per weight of {base.name} "
            "alone; raise it."
        )

    def most(counts: torch.Tensor, already: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(of each tensor the saliencies of the highest patterns that fit beside `already`, the first pattern that does
        not)"""
        within = already[:, None] + counts.flip(1).cumsum(1)  # [:, i]: with the i + 1 highest patterns
        fits, too_much = -1, within.shape[1]
        while too_much - fits > 1:
            middle = (fits + too_much) // 2
            if _linear_bytes(shapes, base, within[:, middle].tolist()) <= budget:
                fits = middle
            else:
                too_much = middle
        return within[:, fits] if fits >= 0 else already, within.shape[1] - 1 - too_much

    kept, high = most(count_patterns(scores), torch.zeros(len(scores), dtype=torch.int64))
    if high >= 0:
        kept, _ = most(torch.stack([count_lower_halves(score, high) for score in scores.values()]), kept)
    return int(kept.sum())


def select_weights(scores: dict[str, torch.Tensor], base: TensorType, n_keep: int) -> dict[str, TensorSelection]:
    """The global top `n_keep`, in the smallest sparse sections that hold it, filled up with the next most salient
    weights.

    A tensor whose share is more than the largest section holds keeps its own most salient ones; one that is too small
    for any section, or too wide for its column indices, keeps none.
    """
    top = global_top(scores, n_keep)
    selections = {}
    for name, score in scores.items():
        rows, columns = score.shape
        p = density_for(rows, rows * columns, len(top[name]))
        room = min(capacity(rows, rows * columns, p), rows * columns) if p else 0
        if room < 1 or columns > MOST_COLUMNS:
            p, room = 0, 0
        if room == 0:
            kept = torch.empty(0, dtype=torch.int64)
        elif room == len(top[name]):
            kept = top[name]
        else:
            kept = global_top({name: score}, room)[name]
        selections[name] = TensorSelection(base.with_density(p), kept, min(room, len(top[name])))
    return selections
