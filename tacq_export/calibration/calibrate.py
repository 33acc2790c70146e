"""What the task says about the model, gathered once and kept on disk: gradients, and Hessians of every matrix's inputs.

One backward pass an example gives the loss gradient dL/dy of every token at the outputs y of every matrix and, for a
score that is made of them, the gradient sums of its weights (which take as much memory as the model). A token whose
outputs the loss hardly feels need not be computed well, so each counts in the Hessian H = sum_t w_t x_t x_t^T with a
weight w_t = |dL/dy_t|, as a share of the mean. With |dL/dy_t|^2, H would be the Fisher information's factor
(GuidedQuant, arXiv 2505.07004); one label a token is a noisy estimate of it, and the root does better than both that
and equal weights (tools/LOG.md).

    outputs.safetensors        at the outputs of every matrix, head and embedding among them: NAME/tokens float32
                               [tokens]:
                               |dL/dy_t|^2, and NAME/rows float32 [rows]: sum_t (dL/dy_tr)^2
    gradients-P.safetensors    NAME: sum over examples of |dL/dW|^P of every matrix of the blocks, once a score has
                               asked
    hessians/N.safetensors     H of the N-th group of matrices with the same input, and diag(H^-1) with 1 % damping
    hessians/N.json            predicted loss of each of them at each width (predict_loss.py)
    hessians/N.kept-S-SEED.json  what keeping weights by the score S takes off it, once an allocation has asked
    hessians/experts-N.*         the same of the N-th group of experts' tensors (expert_statistics.py)
    fresh_head_inputs.safetensors  for --tune: what enters the head (tune_vectors.py)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..config import ExportConfig
from ..files import written_atomically
from ..inputs.link_tensors import Linked, LinkedExperts, LinkedTensor, dense, matrices_of, of_experts
from ..inputs.load_model import LoadedModel
from ..reporting import Reporter
from . import expert_statistics
from .collect_inputs import collect_inputs, group_by_input, second_moment
from .gradients import EMBEDDING_OUTPUT, accumulate_gradients
from .hessian import damped_hessian, inverse_diagonal, token_weights
from .predict_loss import SAMPLE_DAMPING, Losses, TrialErrors, kept_shares, predict_losses
from .score_weights import NEEDS_STATISTIC, gradient_power
from .walk_blocks import blocks_of, walk_through

__all__ = ["EMBEDDING_OUTPUT", "Calibration", "calibrate"]

# Goes up when what the files below hold is computed otherwise: a work folder of an older number calibrates again.
CALIBRATION_VERSION = 2
OUTPUTS = "outputs.safetensors"


@dataclass(frozen=True)
class Calibration:
    """Statistics of one model and task. groups: matrices that share an input, in the order in which the model runs
    them; expert_groups: the same of tensors that hold a matrix for each expert."""

    folder: Path
    groups: list[list[LinkedTensor]]
    n_tokens: int
    trial: TrialErrors
    expert_groups: list[list[LinkedExperts]] = field(default_factory=list)

    @property
    def all_groups(self) -> list[Sequence[Linked]]:
        """`groups`, and behind them `expert_groups`."""
        return [*self.groups, *self.expert_groups]

    def gradient(self, name: str, power: int) -> torch.Tensor:
        """float32 [rows, columns]: the gradient sum of a matrix."""
        return _read(gradients_file(self.folder, power), name)

    def row_energy(self, name: str) -> torch.Tensor:
        """float32 [rows]: sum over tokens of the squared loss gradient at each output; L is the sum of a text's token
        losses."""
        return _read(self.folder / OUTPUTS, f"{name}/rows")

    def hessian(self, group: int) -> torch.Tensor:
        """float32 [columns, columns]: sum over tokens of w_t x_t x_t^T, the mean of w_t being 1."""
        return _read(self.folder / "hessians" / f"{group}.safetensors", "hessian")

    def token_energy(self, name: str) -> torch.Tensor:
        """float32 [tokens of all texts]: the squared loss gradient at the outputs of each token."""
        return _read(self.folder / OUTPUTS, f"{name}/tokens")

    def token_weights(self, group: int, hessian: str) -> torch.Tensor:
        """float32 [tokens of all texts]: w_t of a group of matrices, mean 1; all 1 for `plain`."""
        if hessian == "plain":
            return torch.ones(self.n_tokens)
        return token_weights([self.token_energy(t.name).sqrt() for t in self.groups[group]])

    def curvature(self, name: str) -> torch.Tensor:
        """float32 [rows, columns]: a_r / [H^-1]_jj, twice the loss per squared change of one weight whose row makes up
        for it."""
        for k, group in enumerate(self.expert_groups):
            if any(m.name == name for t in group for m in t.matrices):
                return expert_statistics.curvature(self, k, name)
        inverse = _read(self.folder / "hessians" / f"{self.group_of(name)}.safetensors", "inverse_diagonal")
        return self.row_energy(name)[:, None] / inverse

    def statistic(self, score: str) -> Callable[[str], torch.Tensor]:
        """name -> what a score multiplies with (score_weights.py)."""
        power = gradient_power(score)
        return self.curvature if power is None else lambda name: self.gradient(name, power)

    def group_of(self, name: str) -> int:
        return next(k for k, group in enumerate(self.groups) if any(t.name == name for t in group))

    def _kept_file(self, group: int, score: str, seed: int) -> Path:
        """group: a number in `all_groups`, here and below."""
        if group >= len(self.groups):
            return expert_statistics.kept_file(self, group - len(self.groups), score, seed)
        return self.folder / "hessians" / f"{group}.kept-{score}-{seed}.json"

    def has_kept_shares(self, group: int, score: str, seed: int) -> bool:
        return self._kept_file(group, score, seed).is_file()

    def kept_shares(self, group: int, score: str, seed: int) -> dict[str, dict[int, list[float]]]:
        """{name: `kept_shares`} of the matrices of a group; made when they are first asked for, then on disk."""
        if group >= len(self.groups):
            return expert_statistics.kept_shares_of(self, group - len(self.groups), score, seed)
        path = self._kept_file(group, score, seed)
        if not path.is_file():
            hessian, statistic, shares = damped_hessian(self.hessian(group), SAMPLE_DAMPING), self.statistic(score), {}
            for t in self.groups[group]:
                if t.stock:
                    continue
                of = statistic(t.name) if score in NEEDS_STATISTIC else None
                shares[t.name] = kept_shares(self.trial, t, hessian, self.row_energy(t.name), score, of, seed)
            with written_atomically(path) as partial:
                partial.write_text(json.dumps(shares))
        return {
            name: {int(bits): s for bits, s in of_bits.items()}
            for name, of_bits in json.loads(path.read_text()).items()
        }

    def losses_file(self, group: int) -> Path:
        return self.folder / "hessians" / f"{group}.json"

    def losses(self) -> dict[str, Losses]:
        """{name: {bits, or stock type: predicted loss in nats a token}} of all tensors, nothing kept."""
        found: dict[str, Losses] = {}
        for k in range(len(self.groups)):
            for name, loss in json.loads(self.losses_file(k).read_text()).items():
                found[name] = {int(kind) if kind.isdigit() else kind: value for kind, value in loss.items()}
        for k in range(len(self.expert_groups)):
            found |= expert_statistics.losses(self, k)
        return found


def gradients_file(folder: Path, power: int) -> Path:
    return folder / f"gradients-{power}.safetensors"


def _read(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(key).clone()  # its own memory: the tensor would hold a mapping of the whole file


def calibrate(
    loaded: LoadedModel,
    head: LinkedTensor,
    texts: Sequence[Sequence[int]],
    begins: Sequence[int] | None,
    trial: TrialErrors,
    config: ExportConfig,
    folder: Path,
    reporter: Reporter,
) -> Calibration:
    """Gather what `folder` does not have yet, for the matrices of the blocks and the `head`, as `config` says.

    begins: of each text the first token whose loss counts, None for all. Raises TacqError when a loss is not finite.
    """
    bf16 = config.precision == "bf16"
    (folder / "hessians").mkdir(parents=True, exist_ok=True)
    groups, experts = group_by_input(loaded.model, [*loaded.linear, head], texts[0])
    calibration = Calibration(folder, groups, sum(map(len, texts)), trial, experts)
    measure_gradients(loaded, head, calibration, texts, begins, config, reporter)
    missing = [k for k in range(len(groups)) if not calibration.losses_file(k).is_file()]
    of_experts = [k for k in range(len(experts)) if not expert_statistics.losses_file(calibration, k).is_file()]
    if total := len(missing) + len(of_experts):
        reporter.progress(0, total, "Hessians")
        found = measure_groups(loaded, calibration, missing, of_experts, texts, config.hessian, bf16)
        for done, _ in enumerate(found, 1):
            reporter.progress(done, total, "Hessians")
    expert_statistics.say_unreached(calibration, reporter)
    return calibration


def measure_gradients(
    loaded: LoadedModel,
    head: LinkedTensor,
    calibration: Calibration,
    texts: Sequence[Sequence[int]],
    begins: Sequence[int] | None,
    config: ExportConfig,
    reporter: Reporter,
) -> None:
    """The files of the backward passes that are not there yet; of the gradient sums, those of the score."""
    outputs, power = calibration.folder / OUTPUTS, gradient_power(config.score)
    matrices = [m for t in loaded.linear for m in matrices_of(t)]
    of_weights = matrices if needs_gradients(config.score, calibration.folder) else []
    of_outputs = [] if outputs.is_file() else [*matrices, head]
    if not of_weights and not of_outputs:
        return
    found = accumulate_gradients(
        loaded.model,
        of_weights,
        of_outputs,
        loaded.embedding.module if of_outputs else None,
        texts,
        power or 1,
        reporter,
        config.precision == "bf16",
        begins,
    )
    names = {t.name for t in of_weights}
    if names:
        assert power is not None
        _save(gradients_file(calibration.folder, power), found, names)
    if of_outputs:
        _save(outputs, found, found.keys() - names)


def _save(path: Path, found: dict[str, torch.Tensor], names: Iterable[str]) -> None:
    with written_atomically(path) as partial:
        save_file({name: found[name].cpu().contiguous() for name in sorted(names)}, partial)


def needs_gradients(score: str, folder: Path) -> bool:
    """True if the gradient sums of a score are still to be made."""
    power = gradient_power(score)
    return power is not None and not gradients_file(folder, power).is_file()


def measure_groups(
    loaded: LoadedModel,
    calibration: Calibration,
    missing: Sequence[int],
    of_experts: Sequence[int],
    texts: Sequence[Sequence[int]],
    hessian: str,
    bf16: bool,
) -> Iterator[int]:
    """Hessian, inverse diagonal and predicted losses of the `missing` groups, and what is kept of those `of_experts`,
    block by block; the head comes last. Yields each when it is on disk."""
    groups, blocks = calibration.groups, blocks_of(loaded)
    walk = walk_through(loaded, texts, bf16)
    left = set(missing)
    for _, tensors in blocks:
        inside = {t.name for t in tensors}
        of_block = [k for k in missing if groups[k][0].name in inside]
        experts = [k for k in of_experts if calibration.expert_groups[k][0].name in inside]
        matrices = [m for k in experts for m in calibration.expert_groups[k][0].matrices]
        walk.enter([groups[k][0] for k in of_block] + matrices)
        for k in of_block:
            measure_group(calibration, k, walk.inputs(groups[k][0]), hessian)
            yield k
        for k in experts:
            expert_statistics.measure(calibration, k, walk, hessian)
            yield k
        walk.leave()
        left -= set(of_block)
    others = sorted(left)
    with walk.passed():
        inputs = collect_inputs(loaded.model, [groups[k][0] for k in others], texts) if others else []
    for k, of_group in zip(others, inputs, strict=True):
        measure_group(calibration, k, of_group, hessian)
        yield k


def measure_group(calibration: Calibration, k: int, inputs: Sequence[torch.Tensor], how: str) -> None:
    """What lies on disk of group k. inputs: of each text, float32 [tokens, columns]; how: tokens count in H, as
    --hessian says."""
    group = calibration.groups[k]
    hessian = second_moment(inputs, calibration.token_weights(k, how))
    with written_atomically(calibration.folder / "hessians" / f"{k}.safetensors") as partial:
        save_file(
            {
                "hessian": hessian.cpu(),
                "inverse_diagonal": inverse_diagonal(hessian, SAMPLE_DAMPING, group[0].name).cpu(),
            },
            partial,
        )
    damped = damped_hessian(hessian, SAMPLE_DAMPING).cpu()
    losses = {
        t.name: predict_losses(
            calibration.trial, t, damped, inputs, calibration.token_energy(t.name), calibration.row_energy(t.name)
        )
        for t in group
    }
    with written_atomically(calibration.losses_file(k)) as partial:
        partial.write_text(json.dumps(losses))


def disk_bytes(loaded: LoadedModel, head: LinkedTensor, score: str, folder: Path) -> float:
    """What is still to be written into `folder`, or more: matrices with the same input share a Hessian."""
    have = sum(path.stat().st_size for path in folder.glob("hessians/*.safetensors"))
    hessians = sum(4.0 * t.shape[1] ** 2 for t in [*dense(loaded.linear), head])
    hessians += sum(4.0 * expert_statistics.SAMPLE_EXPERTS * t.shape[1] ** 2 for t in of_experts(loaded.linear))
    return max(hessians - have, 0.0) + 4.0 * loaded.n_linear * needs_gradients(score, folder)
