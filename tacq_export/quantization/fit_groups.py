"""Fit the scale byte and the codes of groups of 32 weights, weighted, on any torch device.

The exporter's own search: the same candidates as `block_codec.quantize_ref` (sign x codebook x scale), but with a
weight for every error and a narrower window, vectorised over groups. It need not give the reference quantizer's bytes;
whatever bytes it gives decode the same everywhere.
"""

from __future__ import annotations

from functools import cache

import torch

from ..format.block_codec import CODECS
from ..format.tensor_types import GROUP_SIZE

# How many scale steps below the first that does not clip are tried (here and in group_descent.c), and how many above.
# The steps are 3/8, 3/16 and 3/32 octave: clipping the largest weight to about half pays for few levels, not for 16
# (measured in tools/LOG.md).
SEARCH_WINDOW = {2: (4, 1), 3: (6, 1), 4: (8, 4)}
_CHUNK = 8192


@cache
def codec_tables(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scale_of_byte float32 [256], codebook_of_byte int64 [256], codebooks float32 [books, 2**bits]) on `device`."""
    codec = CODECS[bits]
    return (
        torch.from_numpy(codec.scale_of_byte.copy()).to(device),
        torch.from_numpy(codec.codebook_of_byte.copy()).to(device),
        torch.from_numpy(codec.codebooks.copy()).to(device),
    )


@cache
def _nearest_level(bits: int, book: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For y = floor(2 x) in [-128, 127]: the level nearest to x, and its code, as tables indexed by y + 128.

    Levels are integers, so the borders between them are multiples of one half and the table is exact.
    """
    levels = torch.from_numpy(CODECS[bits].codebooks[book].copy())
    middle = (torch.arange(-128, 128) + 0.5) / 2
    codes = torch.bucketize(middle, (levels[1:] + levels[:-1]) / 2)
    return levels[codes].to(device), codes.to(torch.uint8).to(device)


def _round_to_level(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Table entry for every x: clamp to the table's range, round down to halves, look up."""
    index = (x * 2 + 128).clamp_(0, 255).to(torch.int32)
    return table.index_select(0, index.reshape(-1)).reshape(x.shape)


def codes_for(bits: int, weights: torch.Tensor, scale_bytes: torch.Tensor) -> torch.Tensor:
    """uint8 codes nearest to float32 `weights` [..., 32 or 1] under given scale bytes [...]."""
    scale_of_byte, codebook_of_byte, _ = codec_tables(bits, weights.device)
    index = scale_bytes.long()
    scale = scale_of_byte[index]
    x = weights / torch.where(scale == 0, torch.ones_like(scale), scale)[..., None]
    tables = torch.stack([_nearest_level(bits, book, weights.device)[1] for book in range(len(CODECS[bits].levels))])
    y = (x * 2 + 128).clamp_(0, 255).long()
    return tables[codebook_of_byte[index][..., None], y]


def fit_scale_bytes(bits: int, weights: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The scale byte of least weighted squared error of every group.

    weights: float32 [groups, 32]; importance: float32 [groups, 32] or [32], not negative (None: all equal; 0 leaves a
    weight out, as for kept weights). Returns uint8 [groups].
    """
    if weights.shape[0] > _CHUNK:
        return torch.cat(
            [
                fit_scale_bytes(
                    bits,
                    weights[a : a + _CHUNK],
                    importance if importance is None or importance.dim() == 1 else importance[a : a + _CHUNK],
                )
                for a in range(0, weights.shape[0], _CHUNK)
            ]
        )
    codec = CODECS[bits]
    device = weights.device
    magnitudes = torch.from_numpy(codec.magnitudes.copy()).to(device)
    shown = weights if importance is None else torch.where(importance > 0, weights, torch.zeros((), device=device))
    peak = shown.abs().amax(dim=1)
    best_err = torch.full_like(peak, float("inf"))
    best_byte = torch.zeros(peak.shape, dtype=torch.uint8, device=device)
    k_max = len(magnitudes) - 1
    below, above = SEARCH_WINDOW[bits]
    for book in range(len(codec.levels)):
        table, _ = _nearest_level(bits, book, device)
        # Below the table's range the nearest level is the first, above it the last: the clamp in _round_to_level is
        # right.
        k_high = torch.searchsorted(magnitudes * abs(codec.codebooks[book]).max(), peak)
        for sign in (0, 1):
            for offset in range(-below, above + 1):
                k = (k_high + offset).clamp(1, k_max)
                scale = magnitudes[k] * (-1.0 if sign else 1.0)
                x = weights / scale[:, None]
                err = (x - _round_to_level(x, table)).square_()
                if importance is not None:
                    err *= importance
                total = err.sum(dim=1).mul_(scale * scale)
                better = total < best_err
                best_err = torch.where(better, total, best_err)
                byte = (sign << 7) | (book << codec.scale_bits) | k
                best_byte = torch.where(better, byte.to(torch.uint8), best_byte)
    return torch.where(peak > 0, best_byte, torch.zeros_like(best_byte))


def round_to_nearest(
    bits: int, weights: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix without error feedback.

    weights: float32 [rows, columns]; importance: float32 [columns] or None. Returns codes uint8 [rows, columns] and
    scale bytes uint8 [rows, columns / 32].
    """
    rows, columns = weights.shape
    groups = weights.reshape(-1, GROUP_SIZE)
    if importance is not None:
        importance = importance.reshape(-1, GROUP_SIZE).repeat(rows, 1)
    scale_bytes = fit_scale_bytes(bits, groups, importance)
    codes = torch.cat(
        [codes_for(bits, groups[a : a + _CHUNK], scale_bytes[a : a + _CHUNK]) for a in range(0, len(groups), _CHUNK)]
    )
    return codes.reshape(rows, columns), scale_bytes.reshape(rows, -1)


def dequantize_groups(bits: int, codes: torch.Tensor, scale_bytes: torch.Tensor) -> torch.Tensor:
    """float32 [rows, columns]; the torch twin of `block_codec.dequantize_blocks`."""
    scale_of_byte, codebook_of_byte, codebooks = codec_tables(bits, codes.device)
    index = scale_bytes.long()
    groups = codes.reshape(*scale_bytes.shape, GROUP_SIZE).long()
    levels = codebooks.reshape(-1)[groups + (codebook_of_byte[index] << bits)[..., None]]
    return (scale_of_byte[index][..., None] * levels).reshape(codes.shape)
