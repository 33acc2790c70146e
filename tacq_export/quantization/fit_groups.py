"""Quantize and decode groups of 32 weights without a Hessian: the token embedding, trials, and what a file says."""

from __future__ import annotations

from functools import cache

import torch

from ..format.block_codec import CODECS, RING, STATES
from ..format.tensor_types import GROUP_SIZE
from .group_descent import PanelDescent


def round_to_nearest(
    bits: int, weights: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix without error feedback, on the CPU: each group gets codes and a scale byte of its own.

    The search is that of group_descent.c with a diagonal H, which need not give the bytes of
    `format.quantize_ref.quantize_ref`; whatever bytes it gives decode the same everywhere.

    weights: float32 [rows, columns], columns a multiple of 32; importance: float32 [columns], above 0, the weight of
    each column's squared errors, or None for ones. Returns codes uint8 [rows, columns] and scale bytes uint8 [rows,
    columns / 32].
    """
    rows, columns = weights.shape
    weights = weights.cpu().float()
    importance = torch.ones(columns) if importance is None else importance.cpu().float()
    descend = PanelDescent(bits, rows)
    codes = torch.zeros((columns // GROUP_SIZE, rows, GROUP_SIZE), dtype=torch.uint8)
    scale_bytes = torch.zeros((columns // GROUP_SIZE, rows), dtype=torch.uint8)
    nothing, base = torch.zeros(rows, GROUP_SIZE), torch.empty(rows, GROUP_SIZE)
    for g in range(columns // GROUP_SIZE):
        own = slice(g * GROUP_SIZE, (g + 1) * GROUP_SIZE)
        h, values = torch.diag(importance[own]), weights[:, own].clone(memory_format=torch.contiguous_format)
        descend(h, nothing, values, base, codes[g], scale_bytes[g], None, fresh=True)
    return codes.transpose(0, 1).reshape(rows, columns).contiguous(), scale_bytes.t().contiguous()


@cache
def _tables(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scale_of_byte float32 [256], levels float32, where the code before each weight of a group is, int64 [32])."""
    codec, before = CODECS[bits], torch.empty(GROUP_SIZE, dtype=torch.int64)
    ring = torch.from_numpy(RING)
    before[ring] = ring.roll(1)
    return (
        torch.from_numpy(codec.scale_of_byte).to(device),
        torch.from_numpy(codec.table).to(device),
        before.to(device),
    )


def dequantize_groups(bits: int, codes: torch.Tensor, scale_bytes: torch.Tensor) -> torch.Tensor:
    """float32 [rows, columns], on the codes' device; the torch twin of `block_codec.dequantize_blocks`."""
    scale_of_byte, levels, before = _tables(bits, codes.device)
    index = codes.reshape(*scale_bytes.shape, GROUP_SIZE).to(torch.int32)
    if CODECS[bits].trellis:
        index = STATES * index + index[..., before] % STATES
    return (scale_of_byte[scale_bytes.int()][..., None] * levels[index]).reshape(codes.shape)
