"""Which type each tensor gets: the least predicted loss within a number of bytes.

A multiple-choice knapsack: one option a tensor, bytes add up, losses add up. Steps along the lower convex hulls of all
tensors, steepest first, give the optimum of the Lagrangian relaxation for every budget they pass (Shoham & Gersho,
1988, "Efficient bit allocation for an arbitrary set of quantizers"); what is left below the next step is filled with
the best single changes that still fit. The distance to the true optimum is at most the step that did not fit.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from ..calibration.predict_loss import Option


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over bytes: ascending bytes, falling loss, ever flatter."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue  # more bytes for no less loss
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    """Loss saved per byte from a to b."""
    return (a.loss - b.loss) / (b.n_bytes - a.n_bytes) if b.n_bytes > a.n_bytes else float("inf")


def least_bytes(options: Mapping[str, Sequence[Option]]) -> int:
    """Bytes of the smallest option of every tensor together."""
    return sum(min(o.n_bytes for o in choice) for choice in options.values())


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """{tensor: option} of the least total loss found within `budget` bytes. Deterministic; ties go to the earlier
    tensor.

    Raises ValueError if not even the smallest options fit.
    """
    if least_bytes(options) > budget:
        raise ValueError(f"the smallest options take {least_bytes(options)} bytes, more than the budget of {budget}")
    hulls = {name: lower_hull(choice) for name, choice in options.items()}
    names, at = list(options), dict.fromkeys(options, 0)
    left = budget - sum(hull[0].n_bytes for hull in hulls.values())
    steps: list[tuple[float, int, int]] = []  # (-slope, tensor, position on its hull to go to)

    def push(i: int) -> None:
        hull, position = hulls[names[i]], at[names[i]] + 1
        if position < len(hull):
            heapq.heappush(steps, (-_slope(hull[position - 1], hull[position]), i, position))

    for i in range(len(names)):
        push(i)
    while steps:
        _, i, position = heapq.heappop(steps)
        hull = hulls[names[i]]
        cost = hull[position].n_bytes - hull[position - 1].n_bytes
        if cost <= left:  # else this tensor stays where it is; flatter and smaller steps of others may fit
            left -= cost
            at[names[i]] = position
            push(i)
    chosen = {name: hulls[name][position] for name, position in at.items()}
    while True:
        gains = [
            (chosen[name].loss - o.loss, -i, o)
            for i, name in enumerate(names)
            for o in options[name]
            if o.loss < chosen[name].loss and o.n_bytes - chosen[name].n_bytes <= left
        ]
        if not gains:
            return chosen
        _, i, option = max(gains, key=lambda gain: gain[:2])
        name = names[-i]
        left -= option.n_bytes - chosen[name].n_bytes
        chosen[name] = option
