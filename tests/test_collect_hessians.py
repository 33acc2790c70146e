"""Hessians against X^T X in float64, with the inputs caught by a hook of the test's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tacq_export.collect_hessians import collect_hessians, group_by_input, split_by_memory
from tacq_export.load_model import LinkedTensor
from tacq_export.reporting import Reporter
from tiny_hf import tiny_model

TEXTS = [[1, 5, 9, 20, 33, 270, 4, 8, 15], [1, 300, 12, 5], list(range(1, 40))]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def tensors(model) -> list[LinkedTensor]:
    """In an order that is not the model's: as a GGUF has them."""
    found = [LinkedTensor(name, name, m, None) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]
    return sorted(found, key=lambda t: t.name[::-1])


@pytest.fixture(scope="module")
def expected(model, tensors) -> dict[str, np.ndarray]:
    """{module: sum over tokens of x^T x}, float64."""
    sums = {t.name: np.zeros((t.shape[1], t.shape[1])) for t in tensors}

    def hook(name):
        def add(module, args, output):
            x = args[0].detach().double().numpy().reshape(-1, args[0].shape[-1])
            for token in x:
                sums[name][:] += np.outer(token, token)

        return add

    handles = [t.module.register_forward_hook(hook(t.name)) for t in tensors]
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.tensor([text]))
    for handle in handles:
        handle.remove()
    return sums


def short(group: list[LinkedTensor]) -> tuple[str, ...]:
    return tuple(sorted(t.name.split("layers.")[1] for t in group))


def test_groups_share_an_input_and_come_in_the_order_of_the_model(model, tensors):
    groups = group_by_input(model, tensors, TEXTS[0])
    kinds = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    assert [short(g) for g in groups] == [tuple(sorted(f"{i}.{k}" for k in kind)) for i in range(2) for kind in kinds]
    assert not any(t.module._forward_pre_hooks for t in tensors)


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    """float32 sums of 52 outer products: 1e-5 of the largest entry."""
    assert found.dtype == torch.float32 and np.abs(expected).max() > 0
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_hessians_are_sums_of_outer_products_of_the_inputs(model, tensors, expected):
    groups = group_by_input(model, tensors, TEXTS[0])
    for group, hessian in zip(groups, collect_hessians(model, groups, TEXTS, Reporter(), "Hessians"), strict=True):
        for tensor in group:
            close(hessian, expected[tensor.name])
    assert not any(t.module._forward_pre_hooks for t in tensors)


def test_split_by_memory_gives_the_same(model, tensors, expected):
    groups = group_by_input(model, tensors, TEXTS[0])
    parts = split_by_memory(groups, 3 * 4 * 64**2)
    assert [g for part in parts for g in part] == groups and len(parts) > 2
    for part in parts:
        for group, hessian in zip(part, collect_hessians(model, part, TEXTS, Reporter(), "Hessians"), strict=True):
            close(hessian, expected[group[0].name])


@pytest.mark.parametrize("columns", [1, 2.0, 2.5, 100])
def test_parts_take_at_most_the_limit_or_one_group(model, tensors, columns):
    """limit: so many matrices of 64 x 64."""
    groups = group_by_input(model, tensors, TEXTS[0])
    limit = columns * 4 * 64**2
    parts = split_by_memory(groups, limit)
    assert [g for part in parts for g in part] == groups
    sizes = [[4 * g[0].shape[1] ** 2 for g in part] for part in parts]
    assert all(len(part) == 1 or sum(part) <= limit for part in sizes)
    for part, following in zip(sizes, sizes[1:]):
        assert sum(part) + following[0] > limit, "a part was closed though the next group had room"


def test_a_pass_stops_after_the_last_group(model, tensors):
    """The second layer must not run when only the first is of interest."""
    groups = group_by_input(model, tensors, TEXTS[0])[:2]
    ran = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    collect_hessians(model, groups, TEXTS, Reporter(), "Hessians")
    handle.remove()
    assert ran == []


def test_hooks_are_removed_when_the_model_fails(model, tensors):
    groups = group_by_input(model, tensors, TEXTS[0])
    with pytest.raises(IndexError):
        collect_hessians(model, groups, [[1, 10**6]], Reporter(), "Hessians")
    assert not any(t.module._forward_pre_hooks for t in tensors)
