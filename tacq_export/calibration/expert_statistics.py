"""What the task says about experts: the same as about other matrices, of each expert's own tokens.

Each expert is a matrix with the Hessian of the tokens that are routed to it in the float model. A block of 128 experts
has too many Hessians to hold or to keep, so they are made one after the other from the inputs of a walk
(walk_blocks.py) and dropped; what stays on disk of each is the diagonal of its inverse. A few experts stand for all in
the prediction of losses, chosen like the sampled rows of a matrix, by their energy; theirs stay, for what keeping
weights would save.

    hessians/experts-N.safetensors  diagonal/E: float32 [columns], diag(H^-1) of expert E, with 1 % damping;
                                    hessian/E: float32 [columns, columns] of a sampled one
    hessians/experts-N.json         of each tensor the predicted loss of each width, and by sampled expert; how many
                                    experts of how many no token reaches
    hessians/experts-N.kept-S-SEED.json  as for other matrices
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import written_atomically
from ..inputs.link_tensors import LinkedExperts
from ..reporting import Reporter
from .collect_inputs import second_moment
from .hessian import damped_hessian, inverse_diagonal, token_weights
from .predict_loss import SAMPLE_DAMPING, Losses, kept_shares, predict_losses, sample_rows
from .score_weights import NEEDS_STATISTIC
from .walk_blocks import BlockWalk, block_name

if TYPE_CHECKING:
    from .calibrate import Calibration

SAMPLE_EXPERTS = 8


def _file(calibration: Calibration, k: int, ending: str) -> Path:
    return calibration.folder / "hessians" / f"experts-{k}.{ending}"


def losses_file(calibration: Calibration, k: int) -> Path:
    return _file(calibration, k, "json")


def expert_weights(calibration: Calibration, group: Sequence[LinkedExperts], expert: int, how: str) -> torch.Tensor:
    """float32 [tokens that reach the expert]: w_t, mean 1, as --hessian says; all 0 if none of them is felt."""
    energies = [calibration.token_energy(t.matrices[expert].name).sqrt() for t in group]
    return torch.ones(len(energies[0])) if how == "plain" else token_weights(energies)


def is_reached(weights: torch.Tensor) -> bool:
    """Whether an expert has a token that counts."""
    return bool((weights > 0).any())


def measure(calibration: Calibration, k: int, walk: BlockWalk, how: str) -> None:
    """What lies on disk of group k, which the walk has entered with the matrices of its first tensor."""
    group = calibration.expert_groups[k]
    weights = [expert_weights(calibration, group, e, how) for e in range(len(group[0].matrices))]
    sampled = _sample(calibration, group, walk)
    diagonals: dict[str, torch.Tensor] = {}
    losses: dict[str, Losses] = {t.name: {} for t in group}
    of_sampled: dict[str, dict[str, Losses]] = {t.name: {} for t in group}
    for e, of_tokens in enumerate(weights):
        if not is_reached(of_tokens):
            continue
        inputs = walk.inputs(group[0].matrices[e])
        hessian = second_moment(inputs, of_tokens)
        diagonals[f"diagonal/{e}"] = inverse_diagonal(hessian, SAMPLE_DAMPING, group[0].matrices[e].name).cpu()
        if e not in sampled:
            continue
        diagonals[f"hessian/{e}"] = hessian.cpu()
        damped = damped_hessian(hessian, SAMPLE_DAMPING).cpu()
        for t in group:
            name = t.matrices[e].name
            loss = predict_losses(
                calibration.trial,
                t.matrices[e],
                damped,
                inputs,
                calibration.token_energy(name),
                calibration.row_energy(name),
                calibration.n_tokens,
                t.stock,
            )
            of_sampled[t.name][str(e)] = {kind: value * sampled[e] for kind, value in loss.items()}
            for kind, value in loss.items():
                losses[t.name][kind] = losses[t.name].get(kind, 0.0) + value * sampled[e]
    facts = {
        "losses": losses,
        "sampled": of_sampled,
        "experts": len(weights),
        "unreached": sum(not is_reached(w) for w in weights),
    }
    with written_atomically(_file(calibration, k, "safetensors")) as partial:
        save_file(diagonals, partial)
    with written_atomically(losses_file(calibration, k)) as partial:
        partial.write_text(json.dumps(facts))


def _sample(calibration: Calibration, group: Sequence[LinkedExperts], walk: BlockWalk) -> dict[int, float]:
    """{expert: how many times its loss stands for the whole}: all of few experts, else those of most energy and some
    spread over the rest. An expert's energy is that of its outputs' gradients times that of its inputs."""
    energy = torch.zeros(len(group[0].matrices))
    for e in range(len(energy)):
        inputs = walk.inputs(group[0].matrices[e])
        size = sum(float(x.square().sum()) for x in inputs) / max(sum(map(len, inputs)), 1)
        energy[e] = size * sum(float(calibration.row_energy(t.matrices[e].name).sum()) for t in group)
    experts, stands_for = sample_rows(energy, SAMPLE_EXPERTS)
    return {e: float(share / energy[e]) for e, share in zip(experts.tolist(), stands_for, strict=True) if energy[e] > 0}


def _facts(calibration: Calibration, k: int) -> dict:
    return json.loads(losses_file(calibration, k).read_text())


def _by_kind(losses: dict) -> Losses:
    return {int(kind) if kind.isdigit() else kind: value for kind, value in losses.items()}


def losses(calibration: Calibration, k: int) -> dict[str, Losses]:
    """{name of a tensor: {bits, or stock type: nats a token}}, nothing kept."""
    return {name: _by_kind(of_tensor) for name, of_tensor in _facts(calibration, k)["losses"].items()}


def kept_shares_of(calibration: Calibration, k: int, score: str, seed: int) -> dict[str, dict[int, list[float]]]:
    """{name of a tensor: `kept_shares`}, the mean of the sampled experts' by what they lose; on disk once asked for."""
    path = kept_file(calibration, k, score, seed)
    if not path.is_file():
        sampled, found = _facts(calibration, k)["sampled"], {}
        for t in calibration.expert_groups[k]:
            if not t.stock:
                found[t.name] = _mean_shares(calibration, k, t, sampled[t.name], score, seed)
        with written_atomically(path) as partial:
            partial.write_text(json.dumps(found))
    return {
        name: {int(bits): shares for bits, shares in of_bits.items()}
        for name, of_bits in json.loads(path.read_text()).items()
    }


def kept_file(calibration: Calibration, k: int, score: str, seed: int) -> Path:
    return _file(calibration, k, f"kept-{score}-{seed}.json")


def _mean_shares(
    calibration: Calibration, k: int, tensor: LinkedExperts, sampled: dict[str, dict], score: str, seed: int
) -> dict[int, list[float]]:
    total: dict[int, torch.Tensor] = {}
    loss_of: dict[int, float] = {}
    with safe_open(_file(calibration, k, "safetensors"), "pt") as file:
        for e, losses_of in sampled.items():
            matrix = tensor.matrices[int(e)]
            damped = damped_hessian(file.get_tensor(f"hessian/{e}").clone(), SAMPLE_DAMPING)
            statistic = calibration.statistic(score)(matrix.name) if score in NEEDS_STATISTIC else None
            shares = kept_shares(
                calibration.trial, matrix, damped, calibration.row_energy(matrix.name), score, statistic, seed
            )
            for bits, of_densities in shares.items():
                loss = _by_kind(losses_of)[bits]
                total[bits] = total.get(bits, torch.zeros(len(of_densities))) + loss * torch.tensor(of_densities)
                loss_of[bits] = loss_of.get(bits, 0.0) + loss
    return {bits: (shares / max(loss_of[bits], 1e-30)).tolist() for bits, shares in total.items()}


def curvature(calibration: Calibration, k: int, name: str) -> torch.Tensor:
    """float32 [rows, columns] of one expert's matrix: a_r / [H^-1]_jj; zeros where no token reaches it."""
    group = calibration.expert_groups[k]
    e, matrix = next((e, m) for t in group for e, m in enumerate(t.matrices) if m.name == name)
    with safe_open(_file(calibration, k, "safetensors"), "pt") as file:
        if f"diagonal/{e}" not in file.keys():  # noqa: SIM118 - it is no dict
            return torch.zeros(matrix.shape)
        return calibration.row_energy(name)[:, None] / file.get_tensor(f"diagonal/{e}").clone()


def say_unreached(calibration: Calibration, reporter: Reporter) -> None:
    """One line of how many experts no token of the task reaches."""
    facts = [_facts(calibration, k) for k in range(len(calibration.expert_groups))]
    blocks = {block_name(calibration.expert_groups[k][0]): f for k, f in enumerate(facts)}
    if unreached := sum(f["unreached"] for f in blocks.values()):
        reporter.say(
            f"{unreached} of {sum(f['experts'] for f in blocks.values())} experts are reached by no token of the task; "
            "each is quantized for the mean of its block's tokens. More examples reach more of them."
        )
