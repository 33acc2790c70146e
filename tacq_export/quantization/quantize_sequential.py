"""What a matrix really gets to see: the model is run block by block with the matrices before it quantized already.

With x_t the inputs of a matrix in the float model and z_t those in the quantized one, its outputs are right when
sum_t w_t |W x_t - Q z_t|^2 is small. That is tr((V - Q) H (V - Q)^T) and a constant, with

    H = sum_t w_t z_t z_t^T,    V = W + W C H^-1,    C = sum_t w_t (x_t - z_t) z_t^T

so GPTQ gets H and, in place of W, the target V, in which each matrix makes up for what those before it did wrong
(GPTAQ, arXiv 2504.02692). V is fitted to few tokens, and W is no bad guess: the target goes only a part of the way to
it, the `compensation`, and H is shrunk first (quantize_gptq.py). The official TaCQ, as GPTQ's code, has H of the
quantized model's inputs too, but W as the target. tools/LOG.md has what each is worth.

Experts get their inputs and routes in the float model, and no compensation: once matrices are quantized a token may go
to another expert, for which it has neither a float input nor a gradient. Matrices behind them see what they do wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.calibrate import Calibration
from ..calibration.collect_inputs import Done, add_products, add_to_lower, input_rows, mirror, weighted_rows
from ..calibration.hessian import effective_number, inverse_hessian_cholesky, shrink
from ..calibration.walk_blocks import Arguments, BlockWalk, blocks_of
from ..config import ExportConfig
from ..inputs.link_tensors import Linked, LinkedExperts, LinkedTensor, matrices_of
from ..inputs.load_model import LoadedModel
from ..inputs.matrix_calls import MatrixCalls
from ..reporting import Reporter


@dataclass
class Seen:
    """Of matrices with the same input: hessian H, float32 [columns, columns], and by a matrix's name W C, float32
    [rows, columns]."""

    hessian: torch.Tensor
    cross: dict[str, torch.Tensor]

    def target(self, tensor: LinkedTensor, upper: torch.Tensor, compensation: float) -> torch.Tensor:
        """W + compensation * W C H^-1, float32 [rows, columns]; upper: U with U^T U = H^-1."""
        return tensor.weight + compensation * (self.cross[tensor.name] @ upper.t()) @ upper


class QuantizedWalk(BlockWalk):
    """Runs the texts through a model block by block, twice side by side: as it was, and with what is quantized so far.

    After `enter`, `see` says what matrices of the block see; whoever quantizes them puts the new weights into the
    modules.
    """

    def __init__(
        self, loaded: LoadedModel, blocks: Sequence[torch.nn.Module], texts: Sequence[Sequence[int]], bf16: bool
    ):
        super().__init__(loaded, blocks, texts, bf16)
        self._quantized = list(self._states)  # hidden states of each text, where the blocks before are quantized
        self._float_arguments, self._own_arguments = self._arguments, [_apart(a) for a in self._arguments]

    def see(self, tensors: Sequence[LinkedTensor], weights: torch.Tensor | None) -> Seen:
        """What matrices with the same input see; the first one was named to `enter`. weights: float32 [tokens
        of all texts], or None for 1."""
        stacked = torch.cat([t.weight for t in tensors])
        rows, columns = stacked.shape
        few = 2 * rows <= columns  # then W (x - z), token by token, is less work than C
        hessian = torch.zeros(columns, columns, device=stacked.device)
        cross = torch.zeros(rows if few else columns, columns, device=stacked.device)
        first = 0

        def entering(tensor: LinkedTensor, given: torch.Tensor) -> None:
            z, x = input_rows(tensor, given), self.inputs(tensor)[text]
            weighted = weighted_rows(z, weights, first)
            add_to_lower(hessian, z, weighted)
            with torch.autocast(z.device.type, enabled=False):
                moved = (x - z) @ stacked.t() if few else x - z
            add_products(cross, moved, weighted)
            raise Done

        with MatrixCalls(tensors[:1], entering), self._as_quantized():
            for text, states in enumerate(self._quantized):
                try:
                    self._run(states, text)
                except Done:
                    pass
                first += len(self.inputs(tensors[0])[text])
        of_each = (cross if few else stacked @ cross).split([len(t.weight) for t in tensors])
        return Seen(mirror(hessian), {t.name: part for t, part in zip(tensors, of_each, strict=True)})

    def leave(self) -> None:
        """Run the block with its new weights, and go on to the next one."""
        with self._as_quantized():
            self._quantized = [self._run(states, i) for i, states in enumerate(self._quantized)]
        super().leave()

    @contextmanager
    def _as_quantized(self) -> Iterator[None]:
        """Blocks are called with the quantized model's own arguments, for as long as the `with` lasts."""
        self._arguments = self._own_arguments
        try:
            yield
        finally:
            self._arguments = self._float_arguments


def _apart(arguments: list[Arguments]) -> list[Arguments]:
    """Of one text, what each block is called with, but for another mapping in place of one through which blocks pass
    on what they computed (keys and values that later ones use again): two models cannot share it."""
    own: dict[int, MutableMapping] = {}

    def apart(value: Any) -> Any:
        return own.setdefault(id(value), copy.copy(value)) if isinstance(value, MutableMapping) else value

    return [
        (tuple(map(apart, args)), {key: apart(value) for key, value in kwargs.items()}) for args, kwargs in arguments
    ]


def quantize_in_order(
    loaded: LoadedModel,
    calibration: Calibration,
    texts: Sequence[Sequence[int]],
    config: ExportConfig,
    wanted: Callable[[Linked], bool],
    visit: Callable[[LinkedTensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
    visit_experts: Callable[[Sequence[LinkedExperts], BlockWalk], None],
    quantized: Callable[[Linked], torch.Tensor | None],
    reporter: Reporter,
) -> None:
    """visit(tensor, hessian shrunk, its inverse Cholesky, target) for every wanted matrix in a block, in the order in
    which the model runs them, and visit_experts(tensors with the same input, the walk in their block) for experts.

    quantized(tensor): the weights [rows, columns] that the model goes on with, wanted or not; None leaves them as they
    are. The torch model holds the new weights afterwards.
    """
    blocks = blocks_of(loaded)
    names = {t.name for _, tensors in blocks for t in tensors}
    groups = [(k, group) for k, group in enumerate(calibration.groups) if group[0].name in names]
    walk = QuantizedWalk(loaded, [block for block, _ in blocks], texts, config.precision == "bf16")
    total, done = sum(1 for t in loaded.linear if wanted(t)), 0
    for _, tensors in blocks:
        inside = {t.name for t in tensors}
        of_block = [(k, group, [t for t in group if wanted(t)]) for k, group in groups if group[0].name in inside]
        of_experts = [g for g in calibration.expert_groups if g[0].name in inside]
        experts = [some for g in of_experts if (some := [t for t in g if wanted(t)])]
        walk.enter([c[0] for _, _, c in of_block if c] + [m for c in experts for m in c[0].matrices])
        for k, group, chosen in of_block:
            if chosen:
                weights = calibration.token_weights(k, config.hessian)
                seen = walk.see(chosen, weights)
                shrink(seen.hessian, effective_number(weights), config.shrinkage)
                upper = inverse_hessian_cholesky(seen.hessian, config.damping, group[0].name)
            for tensor in chosen:
                visit(tensor, seen.hessian, upper, seen.target(tensor, upper, config.compensation))
                done += 1
                reporter.progress(done, total, "quantizing")
            for tensor in group:
                put_quantized(tensor, quantized)
        for same_input in experts:
            visit_experts(same_input, walk)
            done += len(same_input)
            reporter.progress(done, total, "quantizing")
        for expert_tensor in (t for g in of_experts for t in g):
            put_quantized(expert_tensor, quantized)
        walk.leave()


def put_quantized(tensor: Linked, quantized: Callable[[Linked], torch.Tensor | None]) -> None:
    """Let the torch model go on with the quantized weights, where there are any."""
    if (weight := quantized(tensor)) is not None:
        first = 0
        for matrix in matrices_of(tensor):
            matrix.put(weight[first : first + matrix.shape[0]])
            first += matrix.shape[0]
