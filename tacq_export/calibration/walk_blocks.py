"""A model run block by block over all texts, so that the inputs of one block's matrices are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..inputs.link_tensors import Linked, LinkedTensor
from ..inputs.load_model import LoadedModel
from ..inputs.matrix_calls import MatrixCalls
from .collect_inputs import Done, input_rows

Arguments = tuple[tuple, dict]  # of a block, without the hidden states


def block_name(tensor: Linked) -> str | None:
    """The block that a matrix is in, which is what the first number in its module's name says: model.layers.7; None for
    one outside blocks."""
    parts = tensor.module_name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def blocks_of(loaded: LoadedModel) -> list[tuple[torch.nn.Module, list[Linked]]]:
    """(block, its matrices) in the model's order; blocks whose matrices are all copied have none."""
    found: dict[str, list[Linked]] = {}
    for tensor in loaded.linear:
        if (name := block_name(tensor)) is not None:
            found.setdefault(name, []).append(tensor)
    lists = {name.rsplit(".", 1)[0] for name in found}
    names = [f"{of_list}.{i}" for of_list in lists for i, _ in loaded.model.get_submodule(of_list).named_children()]
    names.sort(key=lambda name: int(name.rsplit(".", 1)[1]))
    return [(loaded.model.get_submodule(name), found.get(name, [])) for name in names]


def walkable(loaded: LoadedModel, text: Sequence[int]) -> bool:
    """Whether the blocks, run one after the other with what each was called with, put out what they do in the model.

    They do not where one gets more from another than hidden states, or the model does something between them.
    """
    blocks = [block for block, _ in blocks_of(loaded)]
    if not blocks:
        return False
    found: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, args: tuple, output) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks[-1].register_forward_hook(hook)
    try:
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor([list(text[:16])], device=loaded.model.device), use_cache=False)
    finally:
        handle.remove()
    try:
        walk = BlockWalk(loaded, blocks, [text[:16]], False)
        for _ in blocks:
            walk.enter([])
            walk.leave()
        walked = walk.states[0]
    except Exception:  # the model's own code, called as it does not expect to be
        return False
    return len(found) == 1 and walked.shape == found[0].shape and torch.allclose(walked, found[0], 1e-4, 1e-5)


def walk_through(loaded: LoadedModel, texts: Sequence[Sequence[int]], bf16: bool) -> BlockWalk:
    """A walk through all blocks of the model as it is, by whole passes where it has to be."""
    blocks = [block for block, _ in blocks_of(loaded)]
    return (BlockWalk if walkable(loaded, texts[0]) else WholePasses)(loaded, blocks, texts, bf16)


class BlockWalk:
    """Runs the texts through a model block by block.

    blocks: all blocks, in order; bf16: matrix products in bfloat16. `enter` runs the next block and catches what its
    matrices are called with; `leave` goes on behind it. Matrices may get other weights in between: what follows is the
    model as it was all the same.
    """

    def __init__(
        self, loaded: LoadedModel, blocks: Sequence[torch.nn.Module], texts: Sequence[Sequence[int]], bf16: bool
    ):
        self._model, self._blocks, self._bf16 = loaded.model, blocks, bf16
        self._arguments: list[list[Arguments]] = []  # of each text and block
        self._states: list[torch.Tensor] = []  # of each text, those that enter the block
        self._ahead: list[torch.Tensor] = []  # and those that leave it
        self._inputs: dict[str, list[torch.Tensor]] = {}  # by tensor: each text's inputs
        self._at = 0
        self._wraps = bool(blocks) and _returns_tuple(loaded.model, blocks[0], texts[0])
        for text in texts if blocks else []:
            states, arguments = self._first_call(text)
            self._states.append(states)
            self._arguments.append(arguments)

    @contextmanager
    def _instead(self, forward) -> Iterator[None]:
        """`forward` in place of every block's, for as long as the `with` lasts."""
        try:
            for block in self._blocks:
                block.forward = forward
            yield
        finally:
            for block in self._blocks:
                del block.forward  # the class's again

    @torch.no_grad()
    def _first_call(self, text: Sequence[int]) -> tuple[torch.Tensor, list[Arguments]]:
        """Hidden states that enter the first block, and with what else each block is called. No block computes anything
        here."""
        entering: list[torch.Tensor] = []
        arguments: list[Arguments] = []

        def forward(*args, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            entering.append(hidden)
            arguments.append((args[1:], kwargs))
            if len(arguments) == len(self._blocks):
                raise Done
            return (hidden,) if self._wraps else hidden

        with self._instead(forward), self._precision():
            try:
                self._model(input_ids=torch.tensor([list(text)], device=self._model.device), use_cache=False)
            except Done:
                pass
        return entering[0], arguments

    def _precision(self):
        return torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._bf16)

    @torch.no_grad()
    def _run(self, states: torch.Tensor, text: int) -> torch.Tensor:
        args, kwargs = self._arguments[text][self._at]
        with self._precision():
            out = self._blocks[self._at](states, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def enter(self, tensors: Sequence[LinkedTensor]) -> None:
        """Run the next block, before any of its matrices is changed. tensors: those whose `inputs` will be asked for,
        each in it; an expert's are empty for a text of which no token reaches it."""
        self._inputs = {t.name: [] for t in tensors}
        nothing = {t.name: torch.empty(0, t.shape[1], device=self._model.device) for t in tensors if t.is_expert}

        def entering(tensor: LinkedTensor, x: torch.Tensor) -> None:
            self._inputs[tensor.name].append(input_rows(tensor, x))

        ahead = []
        with MatrixCalls(tensors, entering):
            for i, states in enumerate(self._states):
                ahead.append(self._run(states, i))
                for name, empty in nothing.items():
                    if len(self._inputs[name]) == i:
                        self._inputs[name].append(empty)
        self._ahead = ahead

    def inputs(self, tensor: LinkedTensor) -> list[torch.Tensor]:
        """Of each text, float32 [tokens, columns]."""
        return self._inputs[tensor.name]

    @property
    def states(self) -> list[torch.Tensor]:
        """Of each text, the hidden states that enter the next block."""
        return self._states

    def leave(self) -> None:
        """Go on behind the block."""
        self._states, self._ahead, self._inputs = self._ahead, [], {}
        self._at += 1

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Behind the last block: for as long as the `with` lasts the model, called with each of the texts in turn,
        computes no block."""
        states = iter(self._states)
        calls = 0

        def forward(*args, **kwargs):
            nonlocal calls
            hidden = next(states) if calls % len(self._blocks) == 0 else args[0] if args else kwargs["hidden_states"]
            calls += 1
            return (hidden,) if self._wraps else hidden

        with self._instead(forward), self._precision():
            yield


class WholePasses(BlockWalk):
    """The same of a model whose blocks cannot be run one by one: each `enter` runs all of it."""

    def __init__(
        self, loaded: LoadedModel, blocks: Sequence[torch.nn.Module], texts: Sequence[Sequence[int]], bf16: bool
    ):
        self._model, self._blocks, self._bf16, self._texts = loaded.model, blocks, bf16, texts
        self._states = [torch.empty(0)] * len(texts)
        self._inputs, self._at = {}, 0

    @torch.no_grad()
    def _run(self, states: torch.Tensor, text: int) -> torch.Tensor:
        with self._precision():
            self._model(input_ids=torch.tensor([list(self._texts[text])], device=self._model.device), use_cache=False)
        return states

    @contextmanager
    def passed(self) -> Iterator[None]:
        """The whole model, in the walk's precision."""
        with self._precision():
            yield


@torch.no_grad()
def _returns_tuple(model: PreTrainedModel, block: torch.nn.Module, text: Sequence[int]) -> bool:
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
