#!/usr/bin/env python3
"""Measure, and with --fit train, the numbers of the base codec: tables of levels, and the step of the scales.

    fit_tables.py [--models NAME ...] [--bits 2 3 4]      squared errors of the committed tables under several steps
    fit_tables.py --fit --bits 2                          tables trained from many starts, the best first

Errors are squared errors over squared weights, of groups of 32 that have nothing to do with each other (a diagonal H),
found by the exporter's own search (tacq_export/quantization/group_descent.c). Groups: standard normal ones, and those
of the linear matrices of each model, spread evenly and divided by their root mean square. Training is Lloyd's iteration
on paths: every weight goes to the level that the search gave it, and every level to the mean of its weights. Trained on
half of the groups of the models, measured on the other half.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tacq_export.console import guarded, wait_passively  # noqa: E402

wait_passively()  # before torch is imported

import gguf  # noqa: E402
import torch  # noqa: E402
from fetch_models import MODELS, fetch_model  # noqa: E402

from tacq_export.format.block_codec import CODECS, STATES, level_indices, scale_magnitudes  # noqa: E402
from tacq_export.format.tensor_types import GROUP_SIZE  # noqa: E402
from tacq_export.quantization.group_descent import PanelDescent  # noqa: E402

STEPS = {"3/32": 3 << 18, "1/8": 1 << 20, "3/16": 3 << 19, "7/32": 7 << 18, "1/4": 1 << 21}
LARGEST = 63  # the kernels add 64 and multiply bytes of at most 127
_ORIGIN = (127 - 14) << 23  # a range around the groups' size is enough here


def scales(step: int) -> torch.Tensor:
    """float32 [256]: a sign and 127 magnitudes, `step` patterns of a float apart; byte 0 is 0."""
    values = scale_magnitudes(_ORIGIN, step)
    return torch.from_numpy(np.concatenate([values, -values]))


def model_groups(name: str, n: int) -> torch.Tensor:
    """float32 [n, 32]: groups of the model's linear matrices, as many of each, of mean square 1."""
    reader = gguf.GGUFReader(fetch_model(name))
    tensors = [t for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    found = []
    for tensor in tensors:
        rows = np.linspace(0, len(tensor.data) - 1, min(32, len(tensor.data))).astype(int)
        weights = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type).astype(np.float32)
        groups = weights.reshape(-1, GROUP_SIZE)
        groups = groups[np.square(groups).mean(1) > 0]
        found.append(groups[np.linspace(0, len(groups) - 1, -(-n // len(tensors))).astype(int)])
    groups = np.concatenate(found)
    return torch.from_numpy(groups / np.sqrt(np.square(groups).mean(1, keepdims=True)))[torch.randperm(len(groups))[:n]]


def search(bits: int, levels: torch.Tensor, step: int, groups: torch.Tensor):
    """(values, codes, scale of each group) that the exporter's search finds for float32 groups [n, 32]."""
    n, own = len(groups), scales(step)
    values, base = groups.clone(), torch.empty(n, GROUP_SIZE)
    codes, scale_bytes = torch.zeros(n, GROUP_SIZE, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    descend = PanelDescent(bits, n, scales=own, levels=levels)
    descend(torch.eye(GROUP_SIZE), torch.zeros(n, GROUP_SIZE), values, base, codes, scale_bytes, None, fresh=True)
    return values, codes, own[scale_bytes.int()]


def error(bits: int, levels: torch.Tensor, step: int, groups: torch.Tensor) -> float:
    values, _, _ = search(bits, levels, step, groups)
    return float((values - groups).square().sum() / groups.square().sum())


def train(bits: int, levels: torch.Tensor, step: int, groups: torch.Tensor, iterations: int) -> torch.Tensor:
    """Levels of least squared error, float, the largest LARGEST in size. Levels that nobody uses stay."""
    for _ in range(iterations):
        _, codes, scale = search(bits, levels, step, groups)
        index = torch.from_numpy(level_indices(bits, codes.numpy())).reshape(-1)
        size = scale[:, None].expand_as(groups).double()
        top = torch.bincount(index, (size * groups).reshape(-1), len(levels))
        mass = torch.bincount(index, (size * size).reshape(-1), len(levels))
        levels = torch.where(mass > 0, top / mass, levels.double())
        levels = (levels * LARGEST / levels.abs().max()).float()
        if not CODECS[bits].trellis:
            levels = levels.sort().values  # as the search expects them
    return levels


def starts(bits: int, rng: np.random.Generator):
    """Tables to begin with. Trellis: the levels of a normal distribution in order, every fourth one a state's; which
    state a code leads to is turned against its neighbour state, in all ways. Else: the committed levels, disturbed."""
    codec = CODECS[bits]
    if not codec.trellis:
        for _ in range(24):
            yield torch.from_numpy(np.sort(codec.table + rng.normal(0, 3.5, len(codec.levels))).astype(np.float32))
        return
    n = len(codec.levels)
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])
    for turns in itertools.product(range(STATES), repeat=3):
        for places in itertools.permutations(range(STATES)):
            if places[0] > places[1]:
                continue  # the mirror image
            table = np.zeros(n, np.float32)
            for before, (turn, place) in enumerate(zip((0, *turns), places, strict=True)):
                for i in range(1 << bits):
                    code = STATES * (i // STATES) + (i + turn) % STATES
                    table[STATES * code + before] = quantiles[STATES * i + place]
            yield torch.from_numpy(table * np.float32(LARGEST / np.abs(table).max()))


def print_errors(name: str, bits: int, levels: torch.Tensor, step: int, samples: dict[str, torch.Tensor]) -> None:
    errors = [error(bits, levels, step, groups) for groups in samples.values()]
    print(f"| {name} | " + " | ".join(f"{e:.5f}" for e in errors) + " |", flush=True)


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    halves = {name: model_groups(name, 2 * args.groups).split(args.groups) for name in args.models}
    samples = {"normal": torch.randn(args.groups, GROUP_SIZE)} | {name: half[0] for name, half in halves.items()}
    training = torch.cat([half[1] for half in halves.values()])
    training = training[torch.randperm(len(training))]
    for bits in args.bits:
        print(f"| {bits} bits | " + " | ".join(samples) + " |\n|" + "---|" * (len(samples) + 1))
        committed = torch.from_numpy(CODECS[bits].table)
        if not args.fit:
            for name, step in STEPS.items():
                print_errors(f"committed table, steps of {name} octave", bits, committed, step, samples)
            continue
        step, tried = STEPS["7/32"], []
        for first in starts(bits, np.random.default_rng(args.seed)):
            found = train(bits, first, step, training[: len(training) // 20], 2)
            tried.append((error(bits, found, step, training[: len(training) // 20]), found))
        tried.sort(key=lambda one: one[0])
        print_errors("committed", bits, committed, step, samples)
        for _, first in tried[: args.best]:
            levels = train(bits, first, step, training, args.iterations).round()
            print_errors(" ".join(str(int(v)) for v in levels), bits, levels, step, samples)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), metavar="NAME", help="as in fetch_models.py (default: all)")
    add("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[2, 3, 4], help="of the codes")
    add("--fit", action="store_true", help="train tables")
    add("--groups", type=int, default=8000, help="of each model to measure, and to train on (default 8000)")
    add("--iterations", type=int, default=20, help="of training (default 20)")
    add("--best", type=int, default=3, help="how many of the trained tables are trained on and shown (default 3)")
    add("--seed", type=int, default=0, help="(default 0)")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
