"""What each type would cost a tensor in loss, from the calibration alone: the input of the allocator.

For a matrix with error D, outputs y and loss gradients g_t = dL/dy_t, the second-order change of the loss is
1/(2 T) sum_t (g_t^T D x_t)^2 nats a token. With the errors of different outputs taken as independent, and a token's gradient
as independent of which output it is at, that is

    1/(2 T) sum_r a_r (D H D^T)_rr,   a_r = sum_t g_tr^2 / T,   H = sum_t w_t x_t x_t^T   (calibrate.py)

D is not guessed: some rows of each matrix are quantized at 2, 3 and 4 bits. Kept weights take their share of the elementwise
part sum_ij (G_ij D_ij)^2 off that. tools/LOG.md has how well the prediction ranks real files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .allocate_bits import Option
from .calibrate import EMBEDDING_OUTPUT, Calibration
from .fit_groups import dequantize_groups, round_to_nearest
from .load_model import LinkedTensor
from .quantize_gptq import quantize_gptq
from .reporting import Reporter
from .select_weights import MOST_COLUMNS
from .sparse_section import capacity
from .tensor_types import SPARSE_DENSITIES, TYPES_BY_NAME

SaliencyOf = Callable[[LinkedTensor, torch.Tensor, torch.Tensor], torch.Tensor]
SAMPLE_ROWS = 96
SAMPLE_SWEEPS = 1
BITS = (2, 3, 4)


@dataclass(frozen=True)
class PredictedLoss:
    """loss: {bits: nats a token with nothing kept}; kept_share: {bits: [share of it that each of SPARSE_DENSITIES removes]},
    empty for a head, which keeps no weights."""

    loss: dict[int, float]
    kept_share: dict[int, list[float]]


def sample_rows(n_rows: int) -> torch.Tensor:
    """int64: SAMPLE_ROWS rows evenly spread, or all there are."""
    return torch.linspace(0, n_rows - 1, min(SAMPLE_ROWS, n_rows)).round().long()


def predict_losses(calibration: Calibration, names: set[str], saliency_of: SaliencyOf, damping: float, reporter: Reporter) -> dict[str, PredictedLoss]:
    """{name: PredictedLoss} of those matrices of the calibration that are among `names`.

    saliency_of(tensor, rows, error) gives the score of some rows for a given W - Q(W), by which weights are kept.
    """
    predicted = {}
    groups = [(k, chosen) for k, group in enumerate(calibration.groups) if (chosen := [t for t in group if t.name in names])]
    total, done = sum(len(chosen) for _, chosen in groups), 0
    for k, group in groups:
        hessian = calibration.hessian(k)
        for tensor in group:
            predicted[tensor.name] = _predict(tensor, hessian, calibration, saliency_of, damping)
            done += 1
            reporter.progress(done, total, "predicting losses")
    return predicted


def _predict(tensor: LinkedTensor, hessian: torch.Tensor, calibration: Calibration, saliency_of: SaliencyOf, damping: float) -> PredictedLoss:
    rows = sample_rows(tensor.shape[0])
    weight = tensor.weight.cpu()[rows]
    energy = calibration.row_energy(tensor.name)
    gradient = calibration.gradient(tensor.name)[rows] if calibration.has_gradient(tensor.name) else None
    loss, kept_share = {}, {}
    for bits in BITS:
        result = quantize_gptq(bits, weight, hessian, None, damping, tensor.name, sweeps=SAMPLE_SWEEPS, feed_forward=False)
        error = weight - dequantize_groups(bits, result.codes, result.scale_bytes)
        of_rows = ((error @ hessian) * error).sum(1)
        # The sample's mean, weighted by row energies, stands for all rows.
        loss[bits] = 0.5 * float((energy[rows] * of_rows).sum() / energy[rows].sum()) * float(energy.sum()) / calibration.n_tokens**2
        if gradient is not None:
            plain = weight - dequantize_groups(bits, *round_to_nearest(bits, weight))
            order = saliency_of(tensor, rows, plain).reshape(-1).argsort(descending=True, stable=True)
            kept_share[bits] = _shares(tensor, (gradient * plain).square().double().reshape(-1)[order].cumsum(0))
    return PredictedLoss(loss, kept_share)


def _shares(tensor: LinkedTensor, cumulated: torch.Tensor) -> list[float]:
    """For each density the share of the loss that its capacity of kept weights takes off; cumulated: most salient first."""
    shares = []
    n_weights = tensor.shape[0] * tensor.shape[1]
    for p in SPARSE_DENSITIES:
        kept = round(max(capacity(tensor.shape[0], n_weights, p), 0) / n_weights * len(cumulated))
        shares.append(float(cumulated[min(kept, len(cumulated)) - 1] / cumulated[-1].clamp_min(1e-300)) if kept else 0.0)
    return shares


def options_for(tensor: LinkedTensor, predicted: PredictedLoss) -> list[Option]:
    """Every type for a tensor, with its size and predicted loss; mixed types only where weights may be kept."""
    n = tensor.shape[0] * tensor.shape[1]
    options = []
    for bits in BITS:
        base = TYPES_BY_NAME[f"TACQ{bits}"]
        options.append(Option(base, base.nbytes(n), predicted.loss[bits]))
        for p, share in zip(SPARSE_DENSITIES, predicted.kept_share.get(bits, ())):
            if share > 0 and tensor.shape[1] <= MOST_COLUMNS:
                mixed = base.with_density(p)
                options.append(Option(mixed, mixed.nbytes(n), predicted.loss[bits] * (1 - share)))
    return options


def embedding_loss(embedding: LinkedTensor, calibration: Calibration, texts: Sequence[Sequence[int]], bits: int) -> float:
    """Predicted loss of an embedding by plain rounding: 1/(2 T) sum_t sum_j a_j dW_tj^2 over the tokens of the texts."""
    tokens, counts = torch.tensor([token for text in texts for token in text]).unique(return_counts=True)
    weight = embedding.weight.cpu()[tokens]
    error = weight - dequantize_groups(bits, *round_to_nearest(bits, weight))
    energy = calibration.row_energy(EMBEDDING_OUTPUT)
    return 0.5 * float((counts[:, None] * error.square() * energy).sum(dtype=torch.float64)) / calibration.n_tokens**2
