#!/usr/bin/env python3
"""Measure (and with --fit train) the numbers of the base codec: how a group's scale byte is split, and the codebooks.

    fit_codebooks.py [--models smollm2-135m qwen2.5-coder-0.5b] [--bits 2 3 4]     errors of many splits
    fit_codebooks.py --fit [--fit-on smollm2-135m]                                  train tables under the committed
    split
    fit_codebooks.py --range                                                        scales that the models need

Error of a matrix: tr((W - Q) H (W - Q)^T) / tr(W H W^T), H = X^T X over the inputs of the matrix on the calibration
examples, Q plain rounding without error feedback; reported is the mean over 21 matrices (7 kinds x first, middle, last
block). Scales, codebooks and codes of a group are those of least squared error weighted by diag(H) (--unweighted: by
1). Errors are taken on even rows, tables are trained on odd ones.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from tacq_export.console import guarded, wait_passively  # noqa: E402

wait_passively()  # before torch is imported

import torch  # noqa: E402
from fetch_models import fetch_model  # noqa: E402

from tacq_export.calibration.collect_inputs import collect_inputs, group_by_input, second_moment  # noqa: E402
from tacq_export.format.block_codec import CODECS  # noqa: E402
from tacq_export.format.tensor_types import GROUP_SIZE  # noqa: E402
from tacq_export.inputs.load_model import load_model  # noqa: E402
from tacq_export.inputs.load_task import load_task  # noqa: E402
from tacq_export.inputs.tokenize_task import tokenize_task  # noqa: E402
from tacq_export.quantization.fit_groups import dequantize_groups, round_to_nearest  # noqa: E402
from tacq_export.reporting import Reporter  # noqa: E402

_CHUNK, _TABLE = 4096, 2048  # groups at a time; steps of the table that finds the nearest level


@dataclass(frozen=True)
class Split:
    """One way to store groups of 32. levels: [books][2**bits] ascending; mirrored: a sign bit in the byte;
    magnitudes: the scales of each code k, ascending, float32, or None for a free fp16 scale."""

    name: str
    levels: tuple[tuple[float, ...], ...]
    mirrored: bool
    magnitudes: tuple[float, ...] | None
    trained: bool = False

    def candidates(self, peak: torch.Tensor, top: float):
        """Yield float32 [groups]: the scales worth trying, from 1/4 octave above the first without clipping to 1.4
        below."""
        if self.magnitudes is None:
            yield from ((peak / top * 2 ** (i / 12)).half().float().clamp(min=2.0**-24) for i in range(-16, 4))
            return
        grid, step = torch.tensor(self.magnitudes), math.log2(self.magnitudes[-1] / self.magnitudes[-2])
        k_high, low = torch.searchsorted(grid * top, peak), 1 if self.magnitudes[0] == 0 else 0
        for i in range(-math.ceil(1.4 / step), math.ceil(0.25 / step) + 1):
            yield grid[(k_high + i).clamp(low, len(grid) - 1)]

    def quantize(self, weights: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """Plain rounding of [rows, columns], squared errors weighted by importance [columns]."""
        book, scale, codes = choose(
            self, weights.reshape(-1, GROUP_SIZE), importance.expand_as(weights).reshape(-1, GROUP_SIZE)
        )
        return (scale[:, None] * torch.tensor(self.levels, dtype=torch.float32)[book].gather(1, codes)).reshape(
            weights.shape
        )


def octaves(per_octave: int, bits: int, top: float) -> tuple[float, ...]:
    """Absolute logarithmic scales: 2**bits of them, 1/per_octave octave apart, up to `top`."""
    return tuple(top * 2.0 ** ((k - (1 << bits) + 1) / per_octave) for k in range(1 << bits))


def linear_mantissa(scale_bits: int, origin: float, step: float) -> tuple[float, ...]:
    """The committed kind of scale: F(k) - F(0), F(k) the float `step` octaves (linear mantissa) a step from
    2**`origin`."""
    patterns = int((127 + origin) * (1 << 23)) + np.arange(1 << scale_bits, dtype=np.int64) * round(step * (1 << 23))
    values = patterns.astype(np.uint32).view(np.float32)
    return tuple(float(v) for v in values - values[0])


def committed(bits: int) -> Split:
    codec = CODECS[bits]
    return Split(f"TACQ{bits} as committed", codec.levels, True, tuple(float(m) for m in codec.magnitudes))


def normal_levels(bits: int) -> np.ndarray:
    """float64 [2**bits]: the levels of least error for a normal distribution, variance 1 (Lloyd 1957)."""
    x = np.linspace(-5, 5, 20001)
    density = np.exp(-(x**2) / 2)
    levels = np.linspace(-2, 2, 1 << bits)
    for _ in range(200):
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        levels = np.bincount(codes, density * x) / np.bincount(codes, density)
    return levels


def first_tables(
    bits: int, books: int, mirrored: bool, size: float, noise: float, seed: int
) -> tuple[tuple[float, ...], ...]:
    """Books to start a training from: normal levels, skewed more and more, the last of three or more wide instead."""
    rng, usual = np.random.default_rng(seed), normal_levels(bits)
    tables = [usual + skew for skew in (np.linspace(0 if mirrored else -0.5, 0.5, books) if books > 1 else [0.1])]
    if books > 2:
        tables[-1] = np.sign(usual) * np.abs(usual) ** 1.6
    return tuple(tuple(sorted(size * (t + noise * rng.standard_normal(len(t))))) for t in tables)


def choose(
    split: Split, weights: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Book int64 [groups], signed scale float32 [groups] and codes int64 [groups, 32] of least weighted error for
    groups [groups, 32]."""
    if len(weights) > _CHUNK:
        parts = [
            choose(split, weights[a : a + _CHUNK], importance[a : a + _CHUNK]) for a in range(0, len(weights), _CHUNK)
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=False))
    peak = weights.abs().amax(dim=1)
    tables = torch.tensor(split.levels, dtype=torch.float32)
    best = torch.full_like(peak, float("inf"))
    best_book, best_scale = torch.zeros(len(peak), dtype=torch.int64), torch.ones_like(peak)
    for book, levels in enumerate(tables):
        # Nearest level by table: exact but for values within 1/2048 of the table's span from a border.
        low, per = float(levels[0]), _TABLE / float(levels[-1] - levels[0])
        middle = low + (torch.arange(_TABLE + 1) + 0.5) / per
        nearest = levels[torch.bucketize(middle, (levels[1:] + levels[:-1]) / 2)]
        for scale in split.candidates(peak, float(levels.abs().max())):
            for signed in (scale, -scale) if split.mirrored else (scale,):
                x = weights / signed[:, None]
                index = (x - low).mul_(per).clamp_(0, _TABLE).to(torch.int32)
                x -= nearest.index_select(0, index.reshape(-1)).reshape(x.shape)
                error = x.square_().mul_(importance).sum(dim=1) * signed * signed
                better = error < best
                best = torch.where(better, error, best)
                best_scale = torch.where(better, signed, best_scale)
                best_book = torch.where(better, book, best_book)
    borders = ((tables[:, 1:] + tables[:, :-1]) / 2)[best_book]
    return best_book, best_scale, torch.searchsorted(borders, weights / best_scale[:, None])


class Matrix(NamedTuple):
    """measured, training: float32 [rows, columns], even and odd rows of one weight matrix; hessian: [columns,
    columns]."""

    name: str
    measured: torch.Tensor
    training: torch.Tensor
    hessian: torch.Tensor


class Sample(NamedTuple):
    """What is kept of a model. peaks, embedding_peaks: float32, the largest magnitude of every group of 32."""

    matrices: list[Matrix]
    peaks: torch.Tensor
    embedding_peaks: torch.Tensor
    tokens: int


def evenly(x: torch.Tensor, n: int) -> torch.Tensor:
    """A copy of at most `n` rows of `x`, evenly spaced."""
    return x[torch.linspace(0, len(x) - 1, min(n, len(x))).long()]


def load_sample(name: str, args: argparse.Namespace) -> Sample:
    """Load a model, run it on the calibration examples, keep what is measured."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model(str(fetch_model(name)), Path(folder), "cpu", Reporter())
        n_blocks = loaded.model.config.num_hidden_layers
        wanted = args.blocks or (0, n_blocks // 2, n_blocks - 1)
        chosen = [t for t in loaded.linear if int(t.name.split(".")[1]) in wanted]
        texts = tokenize_task(load_task(args.task), loaded.tokenizer, args.examples, 2048)
        groups = group_by_input(loaded.model, chosen, texts[0])
        hessians = [
            second_moment(inputs, None)
            for inputs in collect_inputs(loaded.model, [group[0].module for group in groups], texts)
        ]
        pairs = [(t, hessian) for group, hessian in zip(groups, hessians, strict=False) for t in group]
        matrices = [
            Matrix(t.name, evenly(t.weight[0::2], args.rows), evenly(t.weight[1::2], args.rows), h) for t, h in pairs
        ]
        parts = loaded.linear, [t for t in (loaded.embedding, loaded.head) if t is not None]
        peaks = [torch.cat([t.weight.reshape(-1, GROUP_SIZE).abs().amax(dim=1) for t in part]) for part in parts]
        return Sample(matrices, *peaks, sum(map(len, texts)))


def mean_error(
    quantize, matrices: list[Matrix], args: argparse.Namespace, factor: float = 1.0, rows: int | None = None
) -> float:
    """Mean over matrices of the error on the measured rows, all weights times `factor`.

    quantize: (float32 [rows, columns], float32 [columns] weights of squared errors) -> float32 [rows, columns].
    """
    total = 0.0
    for m in matrices:
        w = m.measured[:rows] * factor
        lost = w - quantize(w, torch.ones(w.shape[1]) if args.unweighted else m.hessian.diagonal())
        total += float(((lost @ m.hessian) * lost).sum() / ((w @ m.hessian) * w).sum())
    return total / len(matrices)


def train(split: Split, samples: list[Sample], args: argparse.Namespace) -> Split:
    """Lloyd's iteration on float tables: assign every group its best byte and codes, move every level to its weighted
    mean. Each matrix of each model counts the same."""
    weights, importance = [], []
    for m in [m for sample in samples for m in sample.matrices]:
        h = torch.ones(m.training.shape[1]) if args.unweighted else m.hessian.diagonal()
        w, h = (evenly(x.reshape(-1, GROUP_SIZE), args.train_groups) for x in (m.training, h.expand_as(m.training)))
        weights.append(w)
        importance.append(h / (h * w**2).sum())
    w, h = torch.cat(weights), torch.cat(importance)
    for _ in range(args.iterations):
        book, scale, codes = choose(split, w, h)
        old = torch.tensor(split.levels, dtype=torch.float64)
        cell = (book[:, None] * old.shape[1] + codes).reshape(-1)
        mass = (h * (scale * scale)[:, None]).reshape(-1).double()
        total = torch.bincount(cell, mass, old.numel())
        moved = torch.bincount(cell, mass * (w / scale[:, None]).reshape(-1), old.numel()) / total
        tables = torch.where(total > 0, moved, old.reshape(-1)).reshape(old.shape).sort(dim=1).values
        split = replace(split, levels=tuple(map(tuple, tables.tolist())))
    return split


def rounded(split: Split) -> Split:
    """Integer levels within -64 .. 63, the range of the kernels' tables."""
    return replace(split, levels=tuple(tuple(max(-64, min(63, round(v))) for v in book) for book in split.levels))


def splits(bits: int) -> list[Split]:
    """What is measured beside the committed codec. Trained ones start from `first_tables`, once: not the best of
    many."""

    def skew(*skews: float) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(np.array([-1.51, -0.45, 0.45, 1.51]) + s) for s in skews)

    def to_train(name: str, books: int, mirrored: bool, scales: tuple[float, ...]) -> Split:
        size = {2: 12, 3: 25, 4: 22}[bits]
        return Split(
            f"trained: {name}", first_tables(bits, books, mirrored, size, 0.02, 0), mirrored, scales, trained=True
        )

    mine = committed(bits)
    if bits == 2:
        wide = (-2.2, -0.45, 0.45, 2.2)  # the prototype's own numbers are lost
        return [
            Split("symmetric, fp16 scale", skew(0), False, None),
            Split("symmetric, log 1/4 octave, 8 bits", skew(0), False, octaves(4, 8, 4)),
            Split("1 book skewed +.3, sign, log 1/4, 7 bits", skew(0.3), True, octaves(4, 7, 4)),
            Split("symmetric and +.3, sign, log 1/4, 6 bits", skew(0, 0.3), True, octaves(4, 6, 4)),
            Split(
                "prototype: +0 +.25 +.5 wide, sign, log 1/3, 5 bits",
                (*skew(0, 0.25, 0.5), wide),
                True,
                octaves(3, 5, 4),
            ),
            to_train("2 books, sign, F(k)-F(0) 6 bits, 3/16", 2, True, linear_mantissa(6, -13, 3 / 16)),
            to_train("4 books, no sign, F(k)-F(0) 6 bits, 3/16", 4, False, linear_mantissa(6, -13, 3 / 16)),
            to_train("8 books, no sign, 5 bits as TACQ2", 8, False, mine.magnitudes),
            to_train("8 books, sign, F(k)-F(0) 4 bits, 11/16", 8, True, linear_mantissa(4, -13, 11 / 16)),
        ]
    normal = Split("symmetric (normal levels), fp16 scale", (tuple(normal_levels(bits)),), False, None)
    uniform = Split("uniform, fp16 scale", (tuple(np.arange(1 << bits) - ((1 << bits) - 1) / 2),), False, None)
    if bits == 3:
        return [
            normal,
            uniform,
            to_train("1 book, sign, F(k)-F(0) 7 bits, 3/32", 1, True, linear_mantissa(7, -15, 3 / 32)),
            to_train("2 books, no sign, F(k)-F(0) 7 bits, 3/32", 2, False, linear_mantissa(7, -15, 3 / 32)),
            to_train("4 books, sign, F(k)-F(0) 5 bits, 3/8", 4, True, linear_mantissa(5, -15, 3 / 8)),
        ]
    iq4_nl = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl
    return [
        normal,
        uniform,
        Split("IQ4_NL's table, fp16 scale", (iq4_nl,), False, None),
        replace(mine, name="IQ4_NL's table, sign, 7 bits as TACQ4", levels=(tuple(v / 2 for v in iq4_nl),)),
        to_train("1 book, no sign, F(k)-F(0) 8 bits, 3/64", 1, False, linear_mantissa(8, -15, 3 / 64)),
        to_train("2 books, sign, F(k)-F(0) 6 bits, 3/16", 2, True, linear_mantissa(6, -15, 3 / 16)),
    ]


def print_row(name: str, quantize, samples: dict[str, Sample], args: argparse.Namespace, levels=None) -> None:
    """One line of a table: the error on each model, and the `levels` if there are any to show."""
    errors = [mean_error(quantize, s.matrices, args) for s in samples.values()]
    print(f"| {name} | " + " | ".join(f"{e:.5f}" for e in errors) + " |" + (f" {levels}" if levels else ""), flush=True)


def measure(samples: dict[str, Sample], args: argparse.Namespace) -> None:
    for bits in args.bits:
        print(f"| {bits} bits | " + " | ".join(samples) + " |\n|" + "---|" * (len(samples) + 1))
        exporter = lambda w, h, bits=bits: dequantize_groups(bits, *round_to_nearest(bits, w, h))  # noqa: E731
        print_row(f"TACQ{bits}, the exporter's search", exporter, samples, args)
        for split in [committed(bits), *splits(bits)]:
            if split.trained:
                split = rounded(train(split, list(samples.values()), args))
            print_row(split.name, split.quantize, samples, args, split.levels if split.trained else None)


def fit(samples: dict[str, Sample], args: argparse.Namespace) -> None:
    """Train tables under the committed bytes, from several starts, and print each beside the committed ones.
    `finer`: levels twice as large, scales half as large (scale_origin one octave lower): rounding to integers costs
    less."""
    training = [s for name, s in samples.items() if name in (args.fit_on or samples)]
    for bits in args.bits:
        mine = committed(bits)
        print(f"| {bits} bits | " + " | ".join(samples) + " |\n|" + "---|" * (len(samples) + 1))
        print_row("committed", mine.quantize, samples, args, mine.levels)
        size = 0.95 * max(abs(v) for v in mine.levels[0]) / float(normal_levels(bits)[-1])
        for seed in range(args.starts):
            first = first_tables(bits, len(mine.levels), True, size, 0.1 * (seed - 1), seed) if seed else mine.levels
            found = train(replace(mine, levels=first), training, args)
            for factor, suffix in ((1, ""), (2, ", finer"))[: 2 if bits == 2 else 1]:
                levels = tuple(tuple(v * factor for v in book) for book in found.levels)
                grown = rounded(replace(mine, levels=levels, magnitudes=tuple(m / factor for m in mine.magnitudes)))
                print_row(f"trained, start {seed}{suffix}", grown.quantize, samples, args, grown.levels)


def show_range(samples: dict[str, Sample], args: argparse.Namespace) -> None:
    """Print what groups the models have, what each codec reaches, and the error of matrices times powers of two."""
    for name, s in samples.items():
        for what, peaks in (("linear", s.peaks), ("embedding and head", s.embedding_peaks)):
            some = peaks[peaks > 0]
            marks = np.log2(np.quantile(some.numpy(), [0, 0.001, 0.5, 0.999, 1])).round(2).tolist()
            print(
                f"{name}, {what}: {len(peaks)} groups, {len(peaks) - len(some)} all zero; log2 of the largest weight "
                f"(least, .1 %, median, 99.9 %, most): {marks}"
            )
            for bits in args.bits:
                split = committed(bits)
                tops = [max(map(abs, book)) for book in split.levels]
                least, largest = split.magnitudes[1] * min(tops), split.magnitudes[-1] * max(tops)
                print(
                    f"  TACQ{bits}: scales 0, 2^{math.log2(split.magnitudes[1]):.2f} .. "
                    f"2^{math.log2(split.magnitudes[-1]):.2f}, reach "
                    f"2^{math.log2(least):.2f} .. 2^{math.log2(largest):.2f}; groups above "
                    f"{int((some > largest).sum())}, below {int((some < least).sum())}"
                )
    for bits in args.bits:
        for name, s in samples.items():
            powers = range(min(args.factors[0], 0), max(args.factors[1], 0) + 1)
            errors = {
                f: mean_error(committed(bits).quantize, s.matrices, args, 2.0**f, args.range_rows) for f in powers
            }
            ratios = ", ".join(f"{f}: {e / errors[0]:.3f}" for f, e in errors.items())
            print(
                f"TACQ{bits}, {name}, error of weights x 2^f over that at f = 0 ({errors[0]:.5f}): {ratios}", flush=True
            )


def run(args: argparse.Namespace) -> None:
    """What the flags ask for, printed."""
    samples = {name: load_sample(name, args) for name in args.models}
    for name, s in samples.items():
        print(
            f"{name}: {len(s.matrices)} matrices, {s.tokens} tokens, {sum(m.measured.numel() for m in s.matrices)} "
            "weights"
        )
    (fit if args.fit else show_range if args.range else measure)(samples, args)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        default=["smollm2-135m", "qwen2.5-coder-0.5b"],
        metavar="NAME",
        help="as in fetch_models.py",
    )
    add("--bits", nargs="+", type=int, choices=(2, 3, 4), default=[2, 3, 4], help="of the codes")
    add("--task", type=Path, default=ROOT / "tools/data/gsm8k-train-128.jsonl", help="calibration examples")
    add("--examples", type=int, default=32, help="how many of them")
    add(
        "--blocks", nargs="+", type=int, default=[], metavar="N", help="blocks of the models; none: first, middle, last"
    )
    add("--rows", type=int, default=128, help="rows of each matrix to measure, and to train on")
    add("--unweighted", action="store_true", help="fit scales to the plain squared error, not weighted by diag(H)")
    add("--fit", action="store_true", help="train codebooks under the committed split")
    add("--fit-on", nargs="+", metavar="NAME", help="models to train on; none: all")
    add("--starts", type=int, default=3, help="trainings of --fit from different tables")
    add("--iterations", type=int, default=10, help="Lloyd iterations")
    add("--train-groups", type=int, default=500, help="groups of each matrix to train on")
    add("--range", action="store_true", help="report the range of scales")
    add("--range-rows", type=int, default=24, help="rows of each matrix for the error of scaled weights")
    add(
        "--factors",
        nargs=2,
        type=int,
        default=(-6, 4),
        metavar=("LOW", "HIGH"),
        help="powers of two to scale weights by",
    )
    add("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args(argv)
    if unknown := set(args.fit_on or ()) - set(args.models):
        parser.error(f"--fit-on {' '.join(unknown)}: not among --models")
    torch.set_num_threads(args.threads)
    return guarded(lambda: run(args), "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
