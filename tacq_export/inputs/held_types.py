"""Whether our types can hold a matrix, and which stock types do where ours cannot.

Ours have blocks of 64 weights, and scale bytes of a certain range: a group of 32 whose largest weight lies beyond it is
clipped, or becomes zeros, and the rounding error says nothing of it until it is too late.
"""

from __future__ import annotations

import gguf
import torch

from ..format.block_codec import CODECS
from ..format.tensor_types import BLOCK_SIZE, GROUP_SIZE
from .linked import Linked

STOCK_BLOCK = 32
STOCK_TYPES = ("q4_0", "q5_1", "q8_0")  # those that gguf-py can write, from narrow to wide
MOST_LOST = 0.003  # of a matrix's energy, beside rounding: half of what TACQ4's rounding costs
MOST_ROWS_LOST = 0.05
MOST_STOCK_ERROR = 1e-3  # relative squared error of Q8_0; its own is some 2e-5
_ROWS_AT_ONCE = 1 << 14


def held_peaks() -> tuple[float, float]:
    """The least and the most that the largest magnitude of a group of 32 weights may be, so that each of our widths
    rounds the group as well as any other.

    Below magnitudes[1] times the largest level, the smallest scale that there is is too large; above magnitudes[-1]
    times it the group is clipped. About 3e-7 and 56 in format version 2.
    """
    ends = [
        (float(codec.magnitudes[1]) * codec.largest, float(codec.magnitudes[-1]) * codec.largest)
        for codec in CODECS.values()
    ]
    return max(least for least, _ in ends), min(most for _, most in ends)


def within_range(weight: torch.Tensor) -> bool:
    """Whether the scales of our types reach the groups of float32 `weight` [rows, columns], columns a multiple of 32.

    What lies above the range is clipped, and a group below it is lost. False if more than MOST_LOST of the matrix's
    energy (its squared weights) goes so, or most of it in more than MOST_ROWS_LOST of the rows. Zeros are held exactly.
    """
    least, most = held_peaks()
    total = lost = 0.0
    rows = rows_lost = 0
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        groups = weight[first : first + _ROWS_AT_ONCE].reshape(-1, weight.shape[1] // GROUP_SIZE, GROUP_SIZE).float()
        size, energy = groups.abs(), groups.square().sum(2, dtype=torch.float64)
        wrong = (size - most).clamp_min_(0).square_().sum(2, dtype=torch.float64)
        wrong = torch.where(size.amax(2) < least, energy, wrong)
        of_rows = energy.sum(1)
        total, lost = total + float(of_rows.sum()), lost + float(wrong.sum())
        rows += int((of_rows > 0).sum())
        rows_lost += int((wrong.sum(1) > 0.5 * of_rows).sum())
    return lost <= MOST_LOST * total and rows_lost <= MOST_ROWS_LOST * rows


def stock_types(weight: torch.Tensor) -> tuple[str, ...]:
    """() if our types hold float32 `weight` [rows, columns]; else the stock types that do, from narrow to wide: those
    with blocks of 32 where they fit, or F16."""
    rows, columns = weight.shape
    if columns % BLOCK_SIZE == 0 and within_range(weight):
        return ()
    if columns % STOCK_BLOCK:
        return ("f16",)
    sample = weight[:: max(1, rows // 64)].float()
    return STOCK_TYPES if relative_error(sample, "q8_0") <= MOST_STOCK_ERROR else ("f16",)


def stock_rounded(weight: torch.Tensor, type_name: str) -> torch.Tensor:
    """float32 [rows, columns], on the CPU: `weight` as a stock or float type holds it."""
    qtype = gguf.GGMLQuantizationType[type_name.upper()]
    data = gguf.quants.quantize(weight.float().cpu().contiguous().numpy(), qtype)
    return torch.from_numpy(gguf.quants.dequantize(data, qtype)).reshape(weight.shape)


def relative_error(weight: torch.Tensor, type_name: str) -> float:
    """|W - Q(W)|^2 / |W|^2 of rounding to a stock type; 0 for zeros."""
    error = (weight.cpu() - stock_rounded(weight, type_name)).square().sum(dtype=torch.float64)
    return float(error / weight.cpu().square().sum(dtype=torch.float64).clamp_min(1e-300))


def why_stock(tensor: Linked) -> str:
    """In words, why our types cannot hold a tensor that has `stock` ones."""
    if tensor.shape[1] % BLOCK_SIZE:
        return f"has rows of {tensor.shape[1]} weights, no multiple of {BLOCK_SIZE}"
    least, most = held_peaks()
    return f"has weights outside the range of our scales (groups of {least:.1g} to {most:.2g})"
