"""The allocator against trying every combination, on small random instances."""

from __future__ import annotations

import itertools
import random

import pytest

from tacq_export.format.tensor_types import TYPES
from tacq_export.planning.allocate_bits import Option, allocate, least_bytes, lower_hull

SEEDS = range(60)


def instance(seed: int) -> dict[str, list[Option]]:
    """Up to five tensors with up to six types each; some seeds have few different sizes and losses, so that there are
    ties, and types that are larger and worse than others."""
    rng = random.Random(seed)
    coarse = seed % 3 == 0
    size = (lambda: 10 * rng.randint(1, 6)) if coarse else (lambda: rng.randint(1, 200))
    loss = (lambda: float(rng.randint(0, 5))) if coarse else (lambda: rng.random() ** 3)
    return {
        f"t{i}": [Option(kind, size(), loss()) for kind in rng.sample(TYPES, rng.randint(1, 6))]
        for i in range(rng.randint(1, 5))
    }


def total(chosen: dict[str, Option]) -> tuple[int, float]:
    return sum(o.n_bytes for o in chosen.values()), sum(o.loss for o in chosen.values())


def optimum(options: dict[str, list[Option]], budget: int) -> float:
    """The least loss of all combinations that fit."""
    return min(
        sum(o.loss for o in choice)
        for choice in itertools.product(*options.values())
        if sum(o.n_bytes for o in choice) <= budget
    )


def budgets(options: dict[str, list[Option]], seed: int) -> list[int]:
    least, most = least_bytes(options), sum(max(o.n_bytes for o in choice) for choice in options.values())
    return sorted({least, most, most + 5, *(random.Random(seed).randint(least, most) for _ in range(6))})


def on_hull(options: list[Option]) -> set[tuple[int, float]]:
    """(bytes, loss) that no other option and no mixture of two others reaches with as few bytes and as little loss."""
    points = {(o.n_bytes, o.loss) for o in options}

    def beaten(p) -> bool:
        if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points):
            return True
        below, above = [q for q in points if q[0] < p[0]], [q for q in points if q[0] > p[0]]
        return any(a[1] + (b[1] - a[1]) * (p[0] - a[0]) / (b[0] - a[0]) <= p[1] + 1e-12 for a in below for b in above)

    return {p for p in points if not beaten(p)}


def steps_of(options: dict[str, list[Option]]) -> list[tuple[float, int, float]]:
    """(loss saved per byte, bytes, loss saved) of every step along every hull, steepest first."""
    steps = []
    for choice in options.values():
        corners = sorted(on_hull(choice))
        steps += [
            ((a[1] - b[1]) / (b[0] - a[0]), b[0] - a[0], a[1] - b[1])
            for a, b in zip(corners, corners[1:], strict=False)
        ]
    return sorted(steps, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_hull_is_what_no_mixture_beats(seed):
    for choice in instance(seed).values():
        hull = lower_hull(choice)
        assert {(o.n_bytes, o.loss) for o in hull} == on_hull(choice) and all(o in choice for o in hull)
        assert [o.n_bytes for o in hull] == sorted({o.n_bytes for o in hull}) and [o.loss for o in hull] == sorted(
            {o.loss for o in hull}, reverse=True
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_budget_is_kept_and_the_loss_within_the_step_that_did_not_fit(seed):
    options = instance(seed)
    for budget in budgets(options, seed):
        chosen = allocate(options, budget)
        assert list(chosen) == list(options) and all(chosen[name] in options[name] for name in options)
        spent, loss = total(chosen)
        assert spent <= budget
        left, gap = budget - least_bytes(options), 0.0
        for _, n_bytes, gain in steps_of(options):
            if n_bytes > left:
                gap = gain
                break
            left -= n_bytes
        assert optimum(options, budget) - 1e-9 <= loss <= optimum(options, budget) + gap + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_a_budget_that_ends_a_step_gives_the_optimum(seed):
    options = instance(seed)
    budget = least_bytes(options)
    breakpoints = [budget]
    for _slope, group in itertools.groupby(steps_of(options), key=lambda step: step[0]):
        budget += sum(n_bytes for _, n_bytes, _ in group)  # steps of the same slope, in whatever order
        breakpoints.append(budget)
    for budget in breakpoints:
        assert total(allocate(options, budget))[1] == pytest.approx(optimum(options, budget), abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_single_change_that_fits_lowers_the_loss(seed):
    options = instance(seed)
    for budget in budgets(options, seed):
        chosen = allocate(options, budget)
        left = budget - total(chosen)[0]
        for name, choice in options.items():
            assert not [o for o in choice if o.loss < chosen[name].loss and o.n_bytes - chosen[name].n_bytes <= left]


def test_steps_alone_are_not_always_the_optimum():
    """So the gap in the test above is not always zero: the steep step of the first tensor does not leave room for the
    second's."""
    a, b, c = TYPES[:3]
    options = {
        "x": [Option(a, 1, 10.0), Option(b, 6, 3.0)],
        "y": [Option(a, 1, 10.0), Option(b, 9, 0.0), Option(c, 2, 9.9)],
    }
    chosen = allocate(options, 10)
    assert total(chosen)[1] > optimum(options, 10)


def test_ties_go_to_the_earlier_tensor_and_the_result_is_the_same_every_time():
    a, b = TYPES[:2]
    options = {name: [Option(a, 10, 1.0), Option(b, 20, 0.5)] for name in ("z", "m", "a", "k")}
    chosen = allocate(options, 60)
    assert [o.type for o in chosen.values()] == [b, b, a, a]
    assert all(allocate(options, 60) == chosen for _ in range(5))
    # In the filling, too: two bytes left over, and both could use them.
    filled = {name: [Option(a, 10, 1.0), Option(b, 12, 0.9), Option(TYPES[2], 20, 0.0)] for name in ("y", "x")}
    assert [o.n_bytes for o in allocate(filled, 22).values()] == [12, 10]


def test_a_larger_type_of_no_less_loss_is_never_taken():
    a, b = TYPES[:2]
    assert allocate({"x": [Option(a, 5, 1.0), Option(b, 9, 1.0)]}, 100)["x"].type == a
    assert allocate({"x": [Option(b, 9, 0.5), Option(a, 9, 0.4)]}, 100)["x"].type == a


def test_less_than_the_smallest_types_take_is_refused():
    a, b = TYPES[:2]
    options = {"x": [Option(a, 5, 1.0), Option(b, 3, 4.0)], "y": [Option(a, 7, 1.0)]}
    assert least_bytes(options) == 10 and total(allocate(options, 10))[0] == 10
    with pytest.raises(ValueError, match="the smallest options take 10 bytes, more than the budget of 9"):
        allocate(options, 9)
    assert allocate({}, 0) == {}
