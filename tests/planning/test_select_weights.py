"""Selection against sorting, and how the room of the sparse sections is filled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tacq_export.errors import TacqError
from tacq_export.format.tensor_types import TYPES_BY_NAME
from tacq_export.planning.select_weights import (
    density_for,
    global_top,
    keep_for_target,
    select_weights,
    smallest_density,
)

DENSITIES = (1, 2, 3, 4, 6, 8, 12, 16)
TACQ2 = TYPES_BY_NAME["TACQ2"]


def room(rows: int, columns: int, p: int) -> int:
    """Kept weights that fit: p bytes per 64 weights, less header and row pointers, four bytes each."""
    return (rows * columns // 64 * p - 16 - 4 * (rows + 1)) // 4


def by_sorting(scores: dict[str, torch.Tensor], n: int) -> dict[str, list[int]]:
    """A stable sort over all tensors one after the other: equal saliencies in the order of tensors and indices."""
    flat = np.concatenate([s.reshape(-1).numpy() for s in scores.values()])
    chosen = np.sort(np.argsort(-flat, kind="stable")[:n])
    found, start = {}, 0
    for name, score in scores.items():
        end = start + score.numel()
        found[name] = (chosen[(chosen >= start) & (chosen < end)] - start).tolist()
        start = end
    return found


def scores_of(kind: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    shapes = {"a": (8, 64), "b": (4, 128), "c": (16, 64)}
    make = {
        "spread": lambda s: torch.rand(s, generator=g) ** 8,
        "ties": lambda s: torch.randint(0, 4, s, generator=g).float(),
        "all equal": lambda s: torch.full(s, 0.25),
        "zeros": lambda s: torch.where(torch.rand(s, generator=g) < 0.9, 0.0, torch.rand(s, generator=g)),
        "signed zeros": lambda s: torch.where(torch.rand(s, generator=g) < 0.5, torch.tensor(-0.0), torch.tensor(0.0)),
        "denormals": lambda s: torch.rand(s, generator=g) * 1e-40,
        "near ties": lambda s: 1 + torch.randint(0, 3, s, generator=g).float() * 2.0**-23,
        "wide": lambda s: 10 ** (torch.rand(s, generator=g) * 76 - 38),
    }[kind]
    return {name: make(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "kind", ["spread", "ties", "all equal", "zeros", "signed zeros", "denormals", "near ties", "wide"]
)
@pytest.mark.parametrize("n", [0, 1, 2, 17, 512, 513, 1000, 2047, 2048])
def test_the_global_top_is_that_of_a_stable_sort(kind, n):
    scores = scores_of(kind)
    top = global_top(scores, n)
    assert {name: t.tolist() for name, t in top.items()} == by_sorting(scores, n)
    assert all(t.dtype == torch.int64 for t in top.values())


@pytest.mark.parametrize("n", [-1, 2049])
def test_a_number_that_cannot_be_is_refused(n):
    with pytest.raises(ValueError, match=f"cannot keep {n} of 2048 weights"):
        global_top(scores_of("spread"), n)


@pytest.mark.parametrize(("rows", "columns"), [(4, 64), (64, 64), (16, 1024), (512, 576)])
def test_the_smallest_density_has_room_and_the_next_smaller_has_not(rows, columns):
    fitting = [p for p in DENSITIES if room(rows, columns, p) >= 1]
    assert smallest_density(rows, rows * columns, 0) == 0
    for p in fitting:
        n = room(rows, columns, p)
        assert smallest_density(rows, rows * columns, n) == min(q for q in DENSITIES if room(rows, columns, q) >= n)
        assert smallest_density(rows, rows * columns, n + 1) == next(
            (q for q in DENSITIES if room(rows, columns, q) > n), None
        )
    assert density_for(rows, rows * columns, room(rows, columns, 16) + 1) == 16


def model_scores(seed: int = 0) -> dict[str, torch.Tensor]:
    """Three tensors of very unequal importance: one far above the others, one with nothing of the top."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"hot": (64, 512), "plain": (128, 512), "cold": (64, 1024)}
    factor = {"hot": 20.0, "plain": 3.0, "cold": 1e-6}
    return {name: torch.rand(shape, generator=g) ** 6 * factor[name] for name, shape in shapes.items()}


@pytest.mark.parametrize("n", [1, 100, 1500, 6000])
def test_selected_weights_are_the_global_top_and_the_next_ones_to_the_brim(n):
    scores = model_scores()
    top = by_sorting(scores, n)
    for name, selection in select_weights(scores, TACQ2, n).items():
        rows, columns = scores[name].shape
        kept = selection.kept.tolist()
        if not top[name]:
            assert selection.type is TACQ2 and kept == [] and selection.selected == 0
            continue
        p = selection.type.p
        assert (
            p == next((q for q in DENSITIES if room(rows, columns, q) >= len(top[name])), 16)
            and selection.type.bits == 2
        )
        assert len(kept) == room(rows, columns, p), "the room is not used up"
        assert kept == by_sorting({name: scores[name]}, len(kept))[name], "not the most salient ones of this tensor"
        if room(rows, columns, p) >= len(top[name]):
            assert set(top[name]) <= set(kept) and selection.selected == len(top[name])
        else:
            assert set(kept) <= set(top[name]) and selection.selected == len(kept)


def test_what_overflows_the_largest_density_stays_quantized():
    scores = model_scores()
    # Nearly all of them in the hot tensor, where 16 bytes per 64 weights hold 2 x 64 x 512 / 16 = 1979 less row
    # pointers.
    n = 12000
    selection = select_weights(scores, TACQ2, n)["hot"]
    assert len(by_sorting(scores, n)["hot"]) > room(64, 512, 16)
    assert selection.type.name == "TACQ2_S16" and len(selection.kept) == selection.selected == room(64, 512, 16)


def test_nothing_to_keep_gives_base_types():
    assert {s.type.name for s in select_weights(model_scores(), TYPES_BY_NAME["TACQ3"], 0).values()} == {"TACQ3"}


def test_room_for_more_than_there_are_weights_keeps_each_once():
    scores = {"small": torch.rand(2, 64)}
    kept = select_weights(scores, TACQ2, 100)["small"].kept
    assert len(kept) == room(2, 64, 16) == len(set(kept.tolist()))


def test_tensors_too_small_for_a_section_or_too_wide_for_its_indices_keep_nothing():
    """16 bytes per 64 weights do not hold the header of a 1 x 64 matrix; columns are stored in 16 bits."""
    scores = {
        "small": torch.rand(1, 64) + 1,
        "wide": torch.rand(2, 65536 + 64) + 1,
        "widest": torch.rand(2, 65536),
        "plain": torch.rand(8, 64),
    }
    selection = select_weights(scores, TACQ2, 2000)
    for name in ("small", "wide"):
        assert selection[name].type is TACQ2 and len(selection[name].kept) == selection[name].selected == 0
    assert selection["plain"].type is TACQ2 and selection["widest"].type is TACQ2  # nothing of the top
    assert select_weights({"widest": scores["widest"]}, TACQ2, 2000)["widest"].selected == 2000


def linear_bits(scores: dict[str, torch.Tensor], n: int, base) -> float:
    """Bits per weight of what select_weights chooses."""
    chosen = select_weights(scores, base, n)
    return (
        8
        * sum(chosen[name].type.nbytes(s.numel()) for name, s in scores.items())
        / sum(s.numel() for s in scores.values())
    )


@pytest.mark.parametrize("base", ["TACQ2", "TACQ3"])
@pytest.mark.parametrize("above", [0.01, 0.06, 0.125, 0.3, 0.8, 1.4])
def test_the_target_is_not_exceeded_and_one_step_more_would(base, above):
    """A step is a border between upper halves of float32 bit patterns: 2^-7 of a saliency."""
    scores, base = model_scores(1), TYPES_BY_NAME[base]
    target = base.bits_per_weight + above
    n = keep_for_target(scores, {name: tuple(s.shape) for name, s in scores.items()}, base, target)
    assert linear_bits(scores, n, base) <= target
    flat = np.concatenate([s.reshape(-1).numpy() for s in scores.values()])
    order = np.sort(flat)[::-1]
    assert n == 0 or n == len(order) or order[n - 1] > order[n], "not at a border between saliencies"
    following = int((order >= order[n]).sum())
    assert linear_bits(scores, following, base) > target


def test_saliencies_that_are_all_alike_fill_the_target_too():
    """Uniform ones: the highest two upper halves hold 0.4 % each, more than a section of the first size has room
    for."""
    g = torch.Generator().manual_seed(2)
    scores = {name: torch.rand(1536, 576, generator=g) for name in "ab"}
    n = keep_for_target(scores, dict.fromkeys(scores, (1536, 576)), TACQ2, 2.4)
    assert linear_bits(scores, n, TACQ2) == 2.375 and 0.98 * 2 * room(1536, 576, 1) < n <= 2 * room(1536, 576, 1)


def test_a_target_beyond_all_densities_keeps_as_much_as_fits():
    scores = model_scores()
    shapes = {name: tuple(s.shape) for name, s in scores.items()}
    n = keep_for_target(scores, shapes, TACQ2, 6.25)
    assert n == sum(s.numel() for s in scores.values())
    assert all(
        s.type.p == 16 and len(s.kept) == room(*scores[name].shape, 16)
        for name, s in select_weights(scores, TACQ2, n).items()
    )


def test_a_target_of_the_base_alone_keeps_nothing_and_less_is_refused():
    scores = model_scores()
    shapes = {name: tuple(s.shape) for name, s in scores.items()}
    assert keep_for_target(scores, shapes, TACQ2, 2.25) == 0
    with pytest.raises(
        TacqError, match="--target-bpw 2.2 is less than the 2.25 bits per weight of TACQ2 alone; raise it."
    ):
        keep_for_target(scores, shapes, TACQ2, 2.2)


def test_more_bits_never_keep_fewer():
    scores = model_scores()
    shapes = {name: tuple(s.shape) for name, s in scores.items()}
    kept = [keep_for_target(scores, shapes, TACQ2, 2.25 + 0.05 * i) for i in range(40)]
    assert kept == sorted(kept) and kept[0] < kept[-1]
