"""One backward pass an example: gradients of the weights, and of what every matrix puts out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..errors import TacqError
from ..inputs.link_tensors import LinkedTensor
from ..inputs.matrix_calls import MatrixCalls, own_output, routed
from ..reporting import Reporter
from .next_token_loss import backward_loss

EMBEDDING_OUTPUT = "embedding"  # under this name the statistics of what the embedding puts out


def accumulate_gradients(
    model: PreTrainedModel,
    of_weights: Sequence[LinkedTensor],
    of_outputs: Sequence[LinkedTensor],
    embedding: torch.nn.Module | None,
    texts: Sequence[Sequence[int]],
    power: int,
    reporter: Reporter,
    bf16: bool = False,
    begins: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """{name: sum over texts of |dL/dW|^power, [rows, columns]} of the matrices `of_weights` and, of the gradients at
    the outputs of those `of_outputs` and of the embedding (which must be given if there are no weights), {name/tokens:
    [tokens of all texts], name/rows: [rows]}; float32. An expert's tokens are those that are routed to it.

    L is the mean next-token cross-entropy of one text for the weights (the paper's), and the sum for the outputs, where
    every token of every text counts alike; of tokens from `begins` on, where it is given. Each gradient is freed as
    soon as it is added, so gradient memory is one parameter. Raises TacqError when a loss is not finite.
    """
    found: dict[str, torch.Tensor] = {t.name: torch.zeros(t.shape, device=t.weight.device) for t in of_weights}
    tokens: dict[str, list[torch.Tensor]] = {t.name: [] for t in of_outputs}
    scale = 1.0
    sharing: dict[torch.nn.Parameter, list[LinkedTensor]] = {}
    for tensor in of_weights:
        sharing.setdefault(tensor.parameter, []).append(tensor)

    def add_weight(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None and isinstance(parameter, torch.nn.Parameter)
        for tensor in sharing[parameter]:
            own, total = tensor.rows_of_gradient(gradient), found[tensor.name]
            total.add_(own.abs()) if power == 1 else total.addcmul_(own, own)

    def add_output(name: str, gradient: torch.Tensor) -> None:
        squared = (gradient.float() * scale).square_()
        tokens[name].append(squared.sum(1))
        rows = squared.sum(0)
        found[f"{name}/rows"] = found[f"{name}/rows"] + rows if f"{name}/rows" in found else rows

    def leaving(tensor: LinkedTensor, x: torch.Tensor, y: torch.Tensor, part: int | None) -> None:
        reach = routed(tensor, x)

        def backward(gradient: torch.Tensor) -> None:
            own = own_output(tensor, gradient.detach(), part)
            add_output(tensor.name, own if reach is None else own[reach])

        if not y.requires_grad:
            y.requires_grad_(True)
        y.register_hook(backward)

    def embedded(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)  # its weights are not asked for
        output.register_hook(
            lambda gradient: add_output(EMBEDDING_OUTPUT, gradient.detach().reshape(-1, gradient.shape[-1]))
        )

    handles = []
    if embedding is not None:
        tokens[EMBEDDING_OUTPUT] = []
        handles.append(embedding.register_forward_hook(embedded))
    try:
        for parameter in sharing:
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(add_weight))
        for i, text in enumerate(reporter.track(texts, "calibrating")):
            begin = begins[i] if begins else 1
            scale = len(text) - begin
            with MatrixCalls(of_outputs, leaving=leaving):
                loss = backward_loss(model, torch.tensor(text, device=model.device), begin, bf16)
            if not math.isfinite(loss):
                raise TacqError(f"The loss of example {i + 1} is {loss}; the model or that example is damaged.")
    finally:
        for handle in handles:
            handle.remove()
        for parameter in sharing:
            parameter.requires_grad_(False)
            parameter.grad = None
    for tensor in of_outputs:
        if not tokens[tensor.name]:  # an expert that no token reaches
            tokens[tensor.name].append(torch.zeros(0, device=tensor.weight.device))
            found[f"{tensor.name}/rows"] = torch.zeros(tensor.shape[0], device=tensor.weight.device)
    return found | {f"{name}/tokens": torch.cat(parts) for name, parts in tokens.items()}
