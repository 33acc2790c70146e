"""What each type would cost a tensor in loss, from the calibration alone: the input of the allocator.

For a matrix with error D, outputs y and loss gradients g_t = dL/dy_t, the second-order change of the loss is
1/(2 T) sum_t (g_t^T D x_t)^2 nats a token. With the errors of different outputs taken as independent, and a token's
gradient as independent of which output it is at, that is

    1/(2 T) sum_r a_r (D F D^T)_rr,   a_r = sum_t g_tr^2 / T,   F = sum_t w_t x_t x_t^T,   w_t = |g_t|^2 / mean

F is of each matrix alone: k and v have the same inputs, but the first token's key is felt by all and its value by none.
D is not guessed: some rows of each matrix are quantized at 2, 3 and 4 bits, and with some of their weights kept.
tools/LOG.md has how well the prediction ranks real files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..format.gguf_file import type_bytes
from ..format.sparse_section import MOST_COLUMNS, capacity
from ..format.tensor_types import SPARSE_DENSITIES, TYPES_BY_NAME, TensorType
from ..inputs.held_types import stock_rounded
from ..inputs.link_tensors import Linked, LinkedTensor
from .score_weights import saliency

SAMPLE_ROWS = 96
SAMPLE_DAMPING = 0.01
BITS = (2, 3, 4)
SHARES_AT = (1, 4, 16)
Losses = dict[int | str, float]  # by bits, or by the name of a stock type


@dataclass(frozen=True)
class Option:
    """One type for a tensor: its size and the loss it is predicted to cost (nats a token). type: ours, or the name of
    a stock type, in lower case."""

    type: TensorType | str
    n_bytes: int
    loss: float


@dataclass(frozen=True)
class TrialErrors:
    """The quantizer's errors W - Q(W), float32 [rows, columns]. The quantizer lies in a folder above this one, so it is
    handed in.

    rounded(bits, weight): by plain rounding.
    quantized(bits, weight, damped, kept): under the damped Hessian, in short; kept is the mask of kept weights, bool,
    or None.
    """

    rounded: Callable[[int, torch.Tensor], torch.Tensor]
    quantized: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def sample_rows(row_energy: torch.Tensor, n: int = SAMPLE_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that stand for all, int64 in rising order, and the energy that each stands for, float32; `n` of them, or all
    there are.

    A third are the rows of most energy, each for itself (a few rows can hold most of it); the others are evenly spread
    over the rest, and the energy of the rest is shared out among them.
    """
    if n >= len(row_energy):
        return torch.arange(len(row_energy)), row_energy
    order = row_energy.argsort(descending=True, stable=True)
    rest = order[n // 3 :].sort().values
    spread = rest[torch.linspace(0, len(rest) - 1, n - n // 3).round().long()]
    factor = row_energy[rest].sum() / row_energy[spread].sum().clamp_min(1e-30)
    rows, at = torch.cat([order[: n // 3], spread]).sort()
    stands_for = torch.cat([row_energy[order[: n // 3]], row_energy[spread] * factor])
    return rows, stands_for[at]


def _row_losses(error: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """float32 [rows]: d M d^T of each row d."""
    return ((error @ second_moment) * error).sum(1)


def _output_losses(error: torch.Tensor, inputs: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """float64 [rows]: sum_t w_t (d x_t)^2 of each row d, over all rows x_t of the inputs."""
    total, first = torch.zeros(len(error), dtype=torch.float64), 0
    for x in inputs:
        total += ((x.cpu() @ error.t()).square() * weights[first : first + len(x), None]).sum(0)
        first += len(x)
    return total


def predict_losses(
    trial: TrialErrors,
    tensor: LinkedTensor,
    damped: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    token_energy: torch.Tensor,
    row_energy: torch.Tensor,
    n_tokens: int | None = None,
    stock: tuple[str, ...] | None = None,
) -> Losses:
    """{bits, or a stock type where ours do not hold the matrix: nats a token} of a matrix with nothing kept.

    damped: what it will be quantized with, damping added, float32 [columns, columns]; inputs: x_t, of each text float32
    [tokens, columns]; token_energy: float32 [tokens of all texts], |g_t|^2; row_energy: float32 [rows], T a_r;
    n_tokens: of all texts, where only some of them reach the matrix (an expert's): the sums are over those, and the
    mean over all; stock: in place of the tensor's own (those of all experts together).
    """
    rows, energy = sample_rows(row_energy)
    weight, n_own = tensor.weight.cpu()[rows], len(token_energy)
    weights = token_energy / token_energy.mean().clamp_min(1e-30)
    scale = n_own * (n_own if n_tokens is None else n_tokens)
    errors: Iterator[tuple[int | str, torch.Tensor]] = (
        ((kind, weight - stock_rounded(weight, kind)) for kind in stock)
        if (stock := tensor.stock if stock is None else stock)
        else ((bits, trial.quantized(bits, weight, damped, None)) for bits in BITS)
    )
    loss: Losses = {}
    for kind, error in errors:
        of_rows = _output_losses(error, inputs, weights)
        loss[kind] = 0.5 * float((energy * of_rows).sum()) / scale
    return loss


def kept_shares(
    trial: TrialErrors,
    tensor: LinkedTensor,
    damped: torch.Tensor,
    row_energy: torch.Tensor,
    score: str,
    statistic: torch.Tensor | None,
    seed: int,
) -> dict[int, list[float]]:
    """{bits: [share of the loss that each of SPARSE_DENSITIES removes]} of a matrix, measured on the sampled rows.

    Half as many are quantized again with their most salient weights kept, at SHARES_AT; between those the share is a
    power of the number kept, and 4 bits have the shares of 3. Elementwise estimates say three times too much: GPTQ
    makes up for most of what a kept weight would save (tools/LOG.md). damped, row_energy: as `predict_losses` has them;
    statistic: of the score, float32 [rows, columns].
    """
    rows, energy = sample_rows(row_energy, SAMPLE_ROWS // 2)
    weight = tensor.weight.cpu()[rows]
    statistic = None if statistic is None else statistic[rows]
    room = {
        p: max(capacity(tensor.shape[0], tensor.weight.numel(), p), 0) / tensor.weight.numel() for p in SPARSE_DENSITIES
    }
    shares = {}
    for bits in BITS[:2]:

        def loss(mask: torch.Tensor | None, bits: int = bits) -> float:
            return float((_row_losses(trial.quantized(bits, weight, damped, mask), damped) * energy).sum())

        error = trial.rounded(bits, weight)
        order = (
            saliency(score, tensor.name, weight, statistic, error, seed)
            .reshape(-1)
            .argsort(descending=True, stable=True)
        )
        nothing_kept, measured = loss(None), {}
        for p in SHARES_AT:
            mask = torch.zeros(weight.numel(), dtype=torch.bool)
            mask[order[: round(room[p] * weight.numel())]] = True
            if mask.any() and nothing_kept > 0:
                measured[room[p]] = max(1 - loss(mask.reshape(weight.shape)) / nothing_kept, 0.0)
        shares[bits] = [_between(measured, room[p]) for p in SPARSE_DENSITIES]
    return shares | {BITS[2]: shares[BITS[1]]}


def _between(measured: dict[float, float], density: float) -> float:
    """The share at a density, from {density: share}: a power law between two of them, the root beyond the first."""
    if density <= 0 or not any(measured.values()):
        return 0.0
    known = sorted((d, s) for d, s in measured.items() if s > 0)
    if density <= known[0][0]:
        return known[0][1] * (density / known[0][0]) ** 0.5
    return float(np.exp(np.interp(np.log(density), *np.log(np.array(known)).T)))


def options_for(tensor: Linked, loss: Losses, shares: dict[int, list[float]]) -> list[Option]:
    """Every type for a tensor, with its size and predicted loss; mixed types only where there are `shares`."""
    n = tensor.n_weights
    if tensor.stock:
        return [Option(kind, type_bytes(tensor.shape, kind), loss[kind]) for kind in tensor.stock]
    options = []
    for bits in BITS:
        base = TYPES_BY_NAME[f"TACQ{bits}"]
        options.append(Option(base, base.nbytes(n), loss[bits]))
        for p, share in zip(SPARSE_DENSITIES, shares.get(bits, ()), strict=False):
            if share > 0 and tensor.shape[1] <= MOST_COLUMNS:
                mixed = base.with_density(p)
                options.append(Option(mixed, mixed.nbytes(n), loss[bits] * (1 - share)))
    return options


def embedding_loss(
    trial: TrialErrors,
    embedding: LinkedTensor,
    row_energy: torch.Tensor,
    texts: Sequence[Sequence[int]],
    kind: int | str,
) -> float:
    """Predicted loss of an embedding by plain rounding to a width of ours or a stock type: 1/(2 T) sum_t sum_j a_j
    dW_tj^2 over the tokens of the texts.

    row_energy: float32 [columns], T a_j of what the embedding puts out, which some architectures (Gemma) scale.
    """
    tokens, counts = torch.tensor([token for text in texts for token in text]).unique(return_counts=True)
    weight = embedding.weight.cpu()[tokens]
    error = trial.rounded(kind, weight) if isinstance(kind, int) else weight - stock_rounded(weight, kind)
    with torch.no_grad():
        put_out = embedding.module(tokens.to(embedding.weight.device)).float().cpu()
    error = error * float(put_out.norm() / weight.norm().clamp_min(1e-30))
    return (
        0.5 * float((counts[:, None] * error.square() * row_energy).sum(dtype=torch.float64)) / int(counts.sum()) ** 2
    )
