"""What a matrix really gets to see: the model is run block by block with the matrices before it quantized already.

With x_t the inputs of a matrix in the float model and z_t those in the quantized one, its outputs are right when
sum_t w_t |W x_t - Q z_t|^2 is small. That is tr((V - Q) H (V - Q)^T) and a constant, with

    H = sum_t w_t z_t z_t^T,    V = W + W C H^-1,    C = sum_t w_t (x_t - z_t) z_t^T

so GPTQ gets H and, in place of W, the target V, in which each matrix makes up for what those before it did wrong (GPTAQ,
arXiv 2504.02692). The official TaCQ, as GPTQ's code, has H of the quantized model's inputs too, but W as the target. tools/LOG.md
has what each is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .calibrate import Calibration
from .collect_hessians import Done, add_products, hooked, input_rows, weighted_rows
from .config import ExportConfig
from .errors import TacqError
from .load_model import LinkedTensor, LoadedModel
from .quantize_gptq import inverse_hessian_cholesky
from .reporting import Reporter

Arguments = tuple[tuple, dict]  # of a block, without the hidden states


@dataclass
class Seen:
    """Of matrices with the same input: hessian H, float32 [columns, columns], and by a matrix's name W C, float32 [rows, columns]."""

    hessian: torch.Tensor
    cross: dict[str, torch.Tensor]

    def target(self, tensor: LinkedTensor, upper: torch.Tensor) -> torch.Tensor:
        """V = W + W C H^-1, float32 [rows, columns]; upper: U with U^T U = H^-1."""
        return tensor.weight + (self.cross[tensor.name] @ upper.t()) @ upper


def blocks_of(loaded: LoadedModel, tensors: Sequence[LinkedTensor]) -> list[tuple[torch.nn.Module, list[LinkedTensor]]]:
    """(block, its matrices) in the model's order. A block is what the first number in a module's name says: model.layers.7"""
    found: dict[str, list[LinkedTensor]] = {}
    for tensor in tensors:
        parts = tensor.module_name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            raise TacqError(f"tensor '{tensor.name}' ({tensor.module_name}) is in no block of {loaded.name}; use --hessian-inputs float.")
        found.setdefault(".".join(parts[: number + 1]), []).append(tensor)
    names = sorted(found, key=lambda name: int(name.rsplit(".", 1)[1]))
    return [(loaded.model.get_submodule(name), found[name]) for name in names]


class BlockWalk:
    """Runs the texts through a model block by block, twice side by side: as it was, and with what is quantized so far.

    blocks: all blocks, in order. After `enter`, `see` says what matrices of the block see; whoever quantizes them puts
    the new weights into the modules; `leave` goes on to the next block.
    """

    def __init__(self, loaded: LoadedModel, blocks: Sequence[torch.nn.Module], texts: Sequence[Sequence[int]], bf16: bool):
        self._model, self._bf16 = loaded.model, bf16
        self._arguments: list[list[Arguments]] = []  # of each text and block
        self._float: list[torch.Tensor] = []  # hidden states of each text, float model
        self._inputs: dict[int, list[torch.Tensor]] = {}  # by module: each text's inputs in the float model
        self._at = 0
        wraps = _returns_tuple(loaded.model, blocks[0], texts[0])
        for text in texts:
            states, arguments = self._first_call(blocks, text, wraps)
            self._float.append(states)
            self._arguments.append(arguments)
        self._quantized = list(self._float)
        self._ahead: list[torch.Tensor] = []

    @torch.no_grad()
    def _first_call(self, blocks: Sequence[torch.nn.Module], text: Sequence[int], wraps: bool) -> tuple[torch.Tensor, list[Arguments]]:
        """Hidden states that enter the first block, and with what else each block is called. No block computes anything here."""
        entering: list[torch.Tensor] = []
        arguments: list[Arguments] = []

        def instead(*args, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            entering.append(hidden)
            arguments.append((args[1:], kwargs))
            if len(arguments) == len(blocks):
                raise Done
            return (hidden,) if wraps else hidden

        try:
            for block in blocks:
                block.forward = instead
            with self._precision():
                self._model(input_ids=torch.tensor([list(text)], device=self._model.device), use_cache=False)
        except Done:
            pass
        finally:
            for block in blocks:
                del block.forward  # the class's again
        return entering[0], arguments

    def _precision(self):
        return torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._bf16)

    @torch.no_grad()
    def _run(self, block: torch.nn.Module, states: torch.Tensor, text: int) -> torch.Tensor:
        args, kwargs = self._arguments[text][self._at]
        with self._precision():
            out = block(states, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def enter(self, block: torch.nn.Module, modules: Sequence[torch.nn.Module]) -> None:
        """Run the float model through the block, before any of its matrices is quantized. modules: one of each group that `see` will be asked for."""
        self._inputs = {id(module): [] for module in modules}
        with hooked((module, lambda module, args: self._inputs[id(module)].append(input_rows(args))) for module in modules):
            self._ahead = [self._run(block, states, i) for i, states in enumerate(self._float)]

    def see(self, block: torch.nn.Module, tensors: Sequence[LinkedTensor], weights: torch.Tensor | None) -> Seen:
        """What matrices with the same input see; the first one's module was named to `enter`. weights: float32 [tokens of all texts], or None for 1."""
        module, stacked = tensors[0].module, torch.cat([t.weight for t in tensors])
        rows, columns = stacked.shape
        few = 2 * rows <= columns  # then W (x - z), token by token, is less work than C
        hessian = torch.zeros(columns, columns, device=stacked.device)
        cross = torch.zeros(rows if few else columns, columns, device=stacked.device)
        first = 0

        def hook(module: torch.nn.Module, args: tuple) -> None:
            z, x = input_rows(args), self._inputs[id(module)][text]
            weighted = weighted_rows(z, weights, first)
            add_products(hessian, z, weighted)
            with torch.autocast(z.device.type, enabled=False):
                moved = (x - z) @ stacked.t() if few else x - z
            add_products(cross, moved, weighted)
            raise Done

        with hooked([(module, hook)]):
            for text, states in enumerate(self._quantized):
                try:
                    self._run(block, states, text)
                except Done:
                    pass
                first += len(self._inputs[id(module)][text])
        of_each = (cross if few else stacked @ cross).split([len(t.weight) for t in tensors])
        return Seen(hessian, {t.name: part for t, part in zip(tensors, of_each, strict=True)})

    def leave(self, block: torch.nn.Module) -> None:
        """Run the block with its new weights."""
        self._quantized = [self._run(block, states, i) for i, states in enumerate(self._quantized)]
        self._float, self._ahead, self._inputs = self._ahead, [], {}
        self._at += 1


@torch.no_grad()
def _returns_tuple(model: torch.nn.Module, block: torch.nn.Module, text: Sequence[int]) -> bool:
    """Whether the block puts its hidden states into a tuple, as some versions of transformers do."""
    found: list[bool] = []

    def hook(module: torch.nn.Module, args: tuple, output) -> None:
        found.append(isinstance(output, tuple))
        raise Done

    handle = block.register_forward_hook(hook)
    try:
        model(input_ids=torch.tensor([list(text[:16])], device=model.device), use_cache=False)
    except Done:
        pass
    finally:
        handle.remove()
    return found[0]


def walk_blocks(
    loaded: LoadedModel, calibration: Calibration, texts: Sequence[Sequence[int]], config: ExportConfig,
    wanted: Callable[[LinkedTensor], bool], visit: Callable[[LinkedTensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
    quantized: Callable[[LinkedTensor], torch.Tensor | None], reporter: Reporter,
) -> None:  # fmt: skip
    """visit(tensor, hessian, inverse Cholesky, target) for every wanted matrix in a block, in the order in which the model runs them.

    quantized(tensor): the weights [rows, columns] that the model goes on with, wanted or not; None leaves them as they are.
    Modules hold the new weights afterwards.
    """
    names = {t.name for t in loaded.linear}
    groups = [(k, group) for k, group in enumerate(calibration.groups) if group[0].name in names]
    blocks = blocks_of(loaded, loaded.linear)
    walk = BlockWalk(loaded, [block for block, _ in blocks], texts, config.precision == "bf16")
    total, done = sum(1 for t in loaded.linear if wanted(t)), 0
    for block, tensors in blocks:
        inside = {t.name for t in tensors}
        of_block = [(k, group, [t for t in group if wanted(t)]) for k, group in groups if group[0].name in inside]
        walk.enter(block, [chosen[0].module for _, _, chosen in of_block if chosen])
        for k, group, chosen in of_block:
            if chosen:
                seen = walk.see(block, chosen, calibration.token_weights(k) if config.hessian == "gradient" else None)
                upper = inverse_hessian_cholesky(seen.hessian, config.damping, group[0].name)
            for tensor in chosen:
                visit(tensor, seen.hessian, upper, seen.target(tensor, upper))
                done += 1
                reporter.progress(done, total, "quantizing")
            for tensor in group:
                if (weight := quantized(tensor)) is not None:
                    tensor.module.weight.data.copy_(weight)
        walk.leave(block)
