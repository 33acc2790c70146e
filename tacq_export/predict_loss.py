"""What each type would cost a tensor in loss, from the calibration alone: the input of the allocator.

For a matrix with error D, outputs y and loss gradients g_t = dL/dy_t, the second-order change of the loss is
1/(2 T) sum_t (g_t^T D x_t)^2 nats a token. With the errors of different outputs taken as independent, and a token's gradient
as independent of which output it is at, that is

    1/(2 T) sum_r a_r (D F D^T)_rr,   a_r = sum_t g_tr^2 / T,   F = sum_t w_t x_t x_t^T,   w_t = |g_t|^2 / mean

D is not guessed: some rows of each matrix are quantized at 2, 3 and 4 bits. Kept weights take their share of the elementwise
part sum_ij (G_ij D_ij)^2 off that. tools/LOG.md has how well the prediction ranks real files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .allocate_bits import Option
from .fit_groups import dequantize_groups, round_to_nearest
from .load_model import LinkedTensor
from .quantize_gptq import quantize_gptq
from .select_weights import MOST_COLUMNS
from .sparse_section import capacity
from .tensor_types import SPARSE_DENSITIES, TYPES_BY_NAME

SAMPLE_ROWS = 96
SAMPLE_SWEEPS = 1
SAMPLE_DAMPING = 0.01
BITS = (2, 3, 4)


def sample_rows(n_rows: int) -> torch.Tensor:
    """int64: SAMPLE_ROWS rows evenly spread, or all there are."""
    return torch.linspace(0, n_rows - 1, min(SAMPLE_ROWS, n_rows)).round().long()


def predict_losses(tensor: LinkedTensor, hessian: torch.Tensor, fisher: torch.Tensor, row_energy: torch.Tensor, n_tokens: int) -> dict[int, float]:
    """{bits: nats a token} of a matrix with nothing kept.

    hessian: what it will be quantized with; fisher: F, both float32 [columns, columns]; row_energy: float32 [rows], T a_r.
    """
    rows = sample_rows(tensor.shape[0])
    weight, energy = tensor.weight.cpu()[rows], row_energy[rows]
    loss = {}
    for bits in BITS:
        result = quantize_gptq(bits, weight, hessian, None, SAMPLE_DAMPING, tensor.name, sweeps=SAMPLE_SWEEPS, feed_forward=False)
        error = weight - dequantize_groups(bits, result.codes, result.scale_bytes)
        of_rows = ((error @ fisher) * error).sum(1)
        # The sample's mean, weighted by row energies, stands for all rows.
        mean = float((energy * of_rows).sum() / energy.sum().clamp_min(1e-30))
        loss[bits] = 0.5 * mean * float(row_energy.sum()) / n_tokens**2
    return loss


def kept_shares(tensor: LinkedTensor, gradient: torch.Tensor, saliency_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[int, list[float]]:
    """{bits: [share of the loss that each of SPARSE_DENSITIES removes]} of a matrix, estimated on the sampled rows.

    gradient: its gradient sum, float32 [rows, columns]; saliency_of(rows, error): the score of some rows for a W - Q(W).
    """
    rows = sample_rows(tensor.shape[0])
    weight, gradient = tensor.weight.cpu()[rows], gradient[rows]
    shares = {}
    for bits in BITS:
        error = weight - dequantize_groups(bits, *round_to_nearest(bits, weight))
        order = saliency_of(rows, error).reshape(-1).argsort(descending=True, stable=True)
        shares[bits] = _shares(tensor, (gradient * error).square().double().reshape(-1)[order].cumsum(0))
    return shares


def _shares(tensor: LinkedTensor, cumulated: torch.Tensor) -> list[float]:
    """For each density the share of the loss that its capacity of kept weights takes off; cumulated: most salient first."""
    shares = []
    n_weights = tensor.shape[0] * tensor.shape[1]
    for p in SPARSE_DENSITIES:
        kept = round(max(capacity(tensor.shape[0], n_weights, p), 0) / n_weights * len(cumulated))
        shares.append(float(cumulated[min(kept, len(cumulated)) - 1] / cumulated[-1].clamp_min(1e-300)) if kept else 0.0)
    return shares


def options_for(tensor: LinkedTensor, loss: dict[int, float], shares: dict[int, list[float]]) -> list[Option]:
    """Every type for a tensor, with its size and predicted loss; mixed types only where there are `shares`."""
    n = tensor.shape[0] * tensor.shape[1]
    options = []
    for bits in BITS:
        base = TYPES_BY_NAME[f"TACQ{bits}"]
        options.append(Option(base, base.nbytes(n), loss[bits]))
        for p, share in zip(SPARSE_DENSITIES, shares.get(bits, ())):
            if share > 0 and tensor.shape[1] <= MOST_COLUMNS:
                mixed = base.with_density(p)
                options.append(Option(mixed, mixed.nbytes(n), loss[bits] * (1 - share)))
    return options


def embedding_loss(embedding: LinkedTensor, row_energy: torch.Tensor, texts: Sequence[Sequence[int]], bits: int) -> float:
    """Predicted loss of an embedding by plain rounding: 1/(2 T) sum_t sum_j a_j dW_tj^2 over the tokens of the texts.

    row_energy: float32 [columns], T a_j of what the embedding puts out, which some architectures (Gemma) scale.
    """
    tokens, counts = torch.tensor([token for text in texts for token in text]).unique(return_counts=True)
    weight = embedding.weight.cpu()[tokens]
    error = weight - dequantize_groups(bits, *round_to_nearest(bits, weight))
    with torch.no_grad():
        put_out = embedding.module(tokens.to(embedding.weight.device)).float().cpu()
    error = error * float(put_out.norm() / weight.norm().clamp_min(1e-30))
    return 0.5 * float((counts[:, None] * error.square() * row_energy).sum(dtype=torch.float64)) / int(counts.sum()) ** 2
