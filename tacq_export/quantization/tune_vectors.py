"""Fine-tuning of what costs no bytes: norms and biases, which every file holds at 32 bits, against the full model.

    1. before anything is quantized: what enters the head in the float model, of every token
    fresh_head_inputs.safetensors
    2. afterwards: one epoch of Adam on all vectors, the matrices at what the file holds; the loss is the KL divergence
    of the
       quantized model's next-token distribution from the float one's
    3. every eighth example is left out of it: vectors that do not help there are written as they were

All of it on examples that the calibration has not seen. Matrices are fitted to those that it has: there the KL is a
half or a quarter of what it is elsewhere, and tuning on them gains nothing elsewhere (tools/LOG.md).

A norm's weight scales the columns of the matrices behind it, so this is a tuning of scales that all rows share (as in
Norm Tweaking, arXiv 2309.02784, which tunes them layer by layer). Distributions are those of the head's outputs, before
a cap or a scale that an architecture puts on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div, linear, log_softmax

from ..calibration.collect_inputs import Done, collect_inputs
from ..config import ExportConfig
from ..errors import TacqError
from ..files import written_atomically
from ..format.gguf_file import numpy_shape, tensor_values
from ..format.write_gguf import encode_as
from ..inputs.link_tensors import Linked, LinkedTensor, tensor_names
from ..inputs.load_model import LoadedModel
from ..inputs.load_task import Task
from ..inputs.matrix_calls import MatrixCalls
from ..inputs.tokenize_task import tokenize_for_loss
from ..reporting import Reporter
from ..workdir import WorkDir
from .quantize_model import finished_weights, head_tensor
from .quantize_sequential import put_quantized

STEP = 0.005  # of Adam, as a share of a vector's mean magnitude
BATCH = 4  # examples a step
HELD_OUT = 8  # every so many examples one is not tuned on
HEAD_INPUTS = "fresh_head_inputs.safetensors"  # in the calibration's folder
POSITIONS = 256  # whose logits are in memory at a time


@dataclass(frozen=True)
class LinkedVector:
    """A one-dimensional GGUF tensor and the torch parameter that it is, but for a constant (Gemma's norms are stored
    plus 1)."""

    name: str
    parameter: torch.nn.Parameter
    stored: np.ndarray  # float32 [n], as the reference file has it

    def values(self, before: torch.Tensor) -> np.ndarray:
        """float32 [n]: what the file is to hold, now that the parameter is no longer `before`."""
        return self.stored + (self.parameter.detach() - before).cpu().numpy()


def link_vectors(loaded: LoadedModel) -> list[LinkedVector]:
    """The norms and biases that torch and the GGUF hold in the same order, in the file's order."""
    name_map = tensor_names(loaded.reference)
    parameters = {
        name_map.get_name(name, (".weight", ".bias")): p for name, p in loaded.model.named_parameters() if p.dim() == 1
    }
    found = []
    for tensor in loaded.reference.tensors:
        parameter = parameters.get(tensor.name)
        if (
            parameter is None
            or tensor.tensor_type != gguf.GGMLQuantizationType.F32
            or numpy_shape(tensor) != tuple(parameter.shape)
        ):
            continue
        stored = tensor_values(tensor)
        apart = stored - parameter.detach().float().cpu().numpy()
        if np.abs(apart - apart.mean()).max() <= 1e-5 * (1 + np.abs(stored).max()):
            found.append(LinkedVector(tensor.name, parameter, stored.copy()))
    return found


@dataclass(frozen=True)
class Tuning:
    """The vectors that --tune tunes, the texts that it does so on, and of each text the first token whose loss counts,
    or None for all."""

    vectors: list[LinkedVector]
    texts: list[list[int]]
    begins: list[int] | None


def plan_tuning(loaded: LoadedModel, task: Task, n_seen: int, config: ExportConfig) -> Tuning:
    """Up to `config.n_samples` of the examples behind those of which the calibration has `n_seen` texts.

    Raises TacqError for a model without vectors, or less than two such examples.
    """
    if not (vectors := link_vectors(loaded)):
        raise TacqError(f"{loaded.name} has no norm or bias that can be tuned; export without --tune.")
    texts, begins = tokenize_for_loss(config.loss, task, loaded.tokenizer, 2 * config.n_samples, config.seq_len)
    if (n_fresh := len(texts) - n_seen) < 2:
        raise TacqError(
            "--tune needs at least two examples that the calibration has not seen, and there "
            f"{'is one' if n_fresh else 'are none'} behind the first "
            f"{config.n_samples} of the task '{task.name}'; give more, or a smaller --n-samples."
        )
    return Tuning(vectors, texts[n_seen:], begins and begins[n_seen:])


def save_head_inputs(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], config: ExportConfig, folder: Path, reporter: Reporter
) -> None:
    """float16 [tokens of all texts, columns] of the float model, into `folder`, unless they are there. No matrix may
    have been changed yet."""
    path = folder / HEAD_INPUTS
    if path.is_file():
        return
    head, found = head_tensor(loaded), []
    with torch.autocast(loaded.model.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        for text in reporter.track(texts, "what the head gets"):
            found.append(collect_inputs(loaded.model, [head], [text])[0][0].half().cpu())
    with written_atomically(path) as partial:
        save_file({"head_inputs": torch.cat(found)}, partial)


class VectorTuner:
    """The quantized model beside the float one's head inputs. `loss` is what is minimized, `step` one batch of it.

    loaded: with the weights that the file will hold in its modules; head: float32 [vocabulary, columns], the float
    model's.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        head: torch.Tensor,
        states: Sequence[torch.Tensor],
        texts: Sequence[Sequence[int]],
        begins: Sequence[int] | None,
        bf16: bool,
    ):
        self._loaded, self._head, self._states, self._texts, self._bf16 = loaded, head, states, texts, bf16
        self._begins = begins or [1] * len(texts)
        self._output = head_tensor(loaded)  # quantized

    def n_predictions(self, texts: Sequence[int]) -> int:
        return sum(len(self._texts[i]) - self._begins[i] for i in texts)

    def loss(self, text: int, share: float | None = None) -> float:
        """KL divergence from the float model, in nats, summed over the predictions that count in one text. share: adds
        share times its gradients to the vectors'."""
        inputs: list[torch.Tensor] = []

        def entering(tensor: LinkedTensor, x: torch.Tensor) -> None:
            inputs.append(x)
            raise Done

        device = self._loaded.model.device
        with (
            torch.set_grad_enabled(share is not None),
            MatrixCalls([self._output], entering),
            torch.autocast(device.type, torch.bfloat16, enabled=self._bf16),
        ):
            try:
                self._loaded.model(input_ids=torch.tensor([list(self._texts[text])], device=device), use_cache=False)
            except Done:
                pass
        own, total = inputs[0][0], 0.0
        gradient = torch.zeros_like(own)
        for first in range(self._begins[text] - 1, len(own) - 1, POSITIONS):
            at = slice(first, min(first + POSITIONS, len(own) - 1))
            piece = own[at].detach().requires_grad_(share is not None)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                logits, aim = (
                    linear(piece, self._output.weight),
                    linear(self._states[text][at].to(device).float(), self._head),
                )
            kl = kl_div(log_softmax(logits.float(), -1), log_softmax(aim.float(), -1), reduction="sum", log_target=True)
            total += float(kl.detach())
            if share is not None:
                (share * kl).backward()
                assert piece.grad is not None
                gradient[at] = piece.grad
        if share is not None:
            own.backward(gradient)
        return total

    def mean_loss(self, texts: Sequence[int]) -> float:
        """Nats a prediction."""
        return sum(self.loss(i) for i in texts) / self.n_predictions(texts)

    def run(self, vectors: Sequence[LinkedVector], texts: Sequence[int], seed: int) -> Iterator[float]:
        """One epoch over `texts` in an order that the seed decides; yields the loss of each batch, in nats a
        prediction."""
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        batches = [[texts[i] for i in order[first : first + BATCH]] for first in range(0, len(texts), BATCH)]
        groups = [{"params": [v.parameter], "lr": STEP * float(v.parameter.detach().abs().mean())} for v in vectors]
        adam = torch.optim.Adam(groups)
        cosine = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        )
        for vector in vectors:
            vector.parameter.requires_grad_(True)
        try:
            for batch in batches:
                n = self.n_predictions(batch)
                loss = sum(self.loss(i, 1 / n) for i in batch) / n
                if not math.isfinite(loss):
                    raise TacqError("the tuning diverged: its loss is not finite; export without --tune.")
                adam.step()
                adam.zero_grad()
                cosine.step()
                yield loss
        finally:
            for vector in vectors:
                vector.parameter.requires_grad_(False)
                vector.parameter.grad = None


def tune_vectors(
    tuning: Tuning, loaded: LoadedModel, fixed: dict[str, str], config: ExportConfig, work: WorkDir, reporter: Reporter
) -> None:
    """Tune the vectors unless `work` has them already, all matrices and the head's inputs being there, and put them
    into it.

    fixed: {tensor: stock type} of matrices that are not in `work`. Modules hold the file's weights afterwards. Raises
    TacqError for a loss that is not finite.
    """
    vectors, texts = tuning.vectors, tuning.texts
    if all(work.has_tensor(v.name) for v in vectors):
        return
    states = load_file(work.calibration / HEAD_INPUTS)["head_inputs"].split([len(text) for text in texts])
    head = head_tensor(loaded).weight.clone()
    put_written_weights(loaded, fixed, work)
    tuner = VectorTuner(loaded, head, states, texts, tuning.begins, config.precision == "bf16")
    held_out = list(range(len(texts)))[HELD_OUT - 1 :: HELD_OUT] or [len(texts) - 1]
    tuned_on = [i for i in range(len(texts)) if i not in held_out]
    original = [v.parameter.detach().clone() for v in vectors]
    before, n_batches = tuner.mean_loss(held_out), -(-len(tuned_on) // BATCH)
    reporter.progress(0, n_batches, "tuning")
    for done, _ in enumerate(tuner.run(vectors, tuned_on, config.seed), 1):
        reporter.progress(done, n_batches, "tuning")
    after = tuner.mean_loss(held_out)
    helps = after < before
    reporter.say(
        f"Tuning of {len(vectors)} norms and biases: KL of {len(held_out)} examples that were left out {before:.4f} "
        f"-> {after:.4f}" + ("." if helps else ", which does not help: they are written as they were.")
    )
    for vector, was in zip(vectors, original, strict=True):
        values = vector.values(was) if helps else vector.stored
        work.save_tensor(vector.name, values.astype(np.float32).view(np.uint8), {"type": "F32"})


@torch.no_grad()
def put_written_weights(loaded: LoadedModel, fixed: dict[str, str], work: WorkDir) -> None:
    """Give every matrix of the torch model what the file will hold."""

    def written(tensor: Linked) -> torch.Tensor | None:
        found = finished_weights(tensor, work)
        if found is None and tensor.name in fixed:
            return _rounded(tensor, fixed[tensor.name])
        return found

    for tensor in [*loaded.linear, loaded.embedding, *([loaded.head] if loaded.head else [])]:
        put_quantized(tensor, written)


def _rounded(tensor: Linked, type_name: str) -> torch.Tensor:
    """float32 [rows, columns] of a matrix in a float or stock type. Rows do not depend on each other, so their order
    does not matter."""
    data = encode_as(tensor.weight.cpu().numpy(), type_name, tensor.name)
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name.upper()])).reshape(
        tensor.shape
    )
