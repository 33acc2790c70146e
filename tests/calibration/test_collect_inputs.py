"""Inputs of layers, and Hessians against weighted sums of outer products in float64, with the inputs caught by a hook
of the test's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_hf import tiny_model

from tacq_export.calibration import collect_inputs as module
from tacq_export.calibration.collect_inputs import collect_inputs, group_by_input, second_moment
from tacq_export.inputs.link_tensors import LinkedTensor

TEXTS = [[1, 5, 9, 20, 33, 270, 4, 8, 15], [1, 300, 12, 5], list(range(1, 40))]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def tensors(model) -> list[LinkedTensor]:
    """In an order that is not the model's: as a GGUF has them."""
    found = [
        LinkedTensor(name, name, m, None)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "layers" in name
    ]
    return sorted(found, key=lambda t: t.name[::-1])


def some_weights(seed: int) -> torch.Tensor:
    """One for each token of all texts, over two decades."""
    return 10 ** (2 * torch.rand(sum(map(len, TEXTS)), generator=torch.Generator().manual_seed(seed)) - 1)


@pytest.fixture(scope="module")
def inputs(model, tensors) -> dict[str, np.ndarray]:
    """{module: what goes into it, float64 [tokens of all texts, columns]}."""
    caught: dict[str, list] = {t.name: [] for t in tensors}

    def hook(name):
        def add(module, args, output):
            caught[name].append(args[0].detach().double().numpy().reshape(-1, args[0].shape[-1]))

        return add

    handles = [t.module.register_forward_hook(hook(t.name)) for t in tensors]
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.tensor([text]))
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in caught.items()}


@pytest.fixture(scope="module")
def expected(inputs) -> dict[str, np.ndarray]:
    """{module: sum over tokens of x^T x}, float64."""
    return {name: weighted_sum(x, np.ones(len(x))) for name, x in inputs.items()}


def weighted_sum(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = np.zeros((x.shape[1], x.shape[1]))
    for token, weight in zip(x, weights, strict=True):
        total += weight * np.outer(token, token)
    return total


def short(group: list[LinkedTensor]) -> tuple[str, ...]:
    return tuple(sorted(t.name.split("layers.")[1] for t in group))


def test_groups_share_an_input_and_come_in_the_order_of_the_model(model, tensors):
    groups, _ = group_by_input(model, tensors, TEXTS[0])
    kinds = [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert [short(g) for g in groups] == [tuple(sorted(f"{i}.{k}" for k in kind)) for i in range(2) for kind in kinds]
    assert not any(t.module._forward_pre_hooks for t in tensors)


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    """float32 sums of 52 outer products: 1e-5 of the largest entry."""
    assert found.dtype == torch.float32 and np.abs(expected).max() > 0
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def hessians(model, groups, weights) -> list[torch.Tensor]:
    inputs = collect_inputs(model, [group[0] for group in groups], TEXTS)
    return [second_moment(x, w) for x, w in zip(inputs, weights, strict=True)]


@pytest.mark.parametrize("stripe", [1024, 64, 24, 1], ids="stripes of {}".format)
def test_hessians_are_sums_of_outer_products_of_the_inputs(model, tensors, expected, monkeypatch, stripe):
    """In one piece, in two or so, in pieces that do not divide the matrix, in rows."""
    monkeypatch.setattr(module, "STRIPE", stripe)
    groups, _ = group_by_input(model, tensors, TEXTS[0])
    for group, hessian in zip(groups, hessians(model, groups, [None] * len(groups)), strict=True):
        for tensor in group:
            close(hessian, expected[tensor.name])
    assert not any(t.module._forward_pre_hooks for t in tensors)


def test_every_token_counts_by_its_weight_in_each_group(model, tensors, inputs):
    """Texts of 9, 4 and 39 tokens: a weight that belongs to another token, or another group, gives another matrix."""
    groups, _ = group_by_input(model, tensors, TEXTS[0])
    weights = [None if i == 2 else some_weights(i) for i in range(len(groups))]
    for group, weight, hessian in zip(groups, weights, hessians(model, groups, weights), strict=True):
        x = inputs[group[0].name]
        close(hessian, weighted_sum(x, np.ones(len(x)) if weight is None else weight.double().numpy()))


def test_bfloat16_products_change_the_inputs_but_not_the_sums(model, tensors, inputs):
    """The first matrices get float32 inputs whatever the products are: their sum must be as exact as ever. Later inputs
    have 8 bits of precision: within 5 %, and not the same."""
    groups, _ = group_by_input(model, tensors, TEXTS[0])
    weights = [some_weights(i) for i in range(len(groups))]
    with torch.autocast("cpu", torch.bfloat16):
        found = hessians(model, groups, weights)
    exact = [weighted_sum(inputs[g[0].name], w.double().numpy()) for g, w in zip(groups, weights, strict=True)]
    assert all(h.dtype == torch.float32 for h in found)
    close(found[0], exact[0])
    for hessian, whole in zip(found[1:], exact[1:], strict=True):
        difference = np.linalg.norm(hessian.double().numpy() - whole) / np.linalg.norm(whole)
        assert 1e-5 < difference < 0.05


def test_inputs_are_each_text_s_own(model, tensors, inputs):
    found = collect_inputs(model, tensors, TEXTS)
    for tensor, of_texts in zip(tensors, found, strict=True):
        assert [len(x) for x in of_texts] == list(map(len, TEXTS)) and all(x.dtype == torch.float32 for x in of_texts)
        assert np.array_equal(torch.cat(of_texts).double().numpy(), inputs[tensor.name])


def test_a_pass_stops_after_the_last_module(model, tensors):
    """The second layer must not run when only the first is of interest."""
    groups = group_by_input(model, tensors, TEXTS[0])[0][:2]
    ran = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    collect_inputs(model, [group[0] for group in groups], TEXTS)
    handle.remove()
    assert ran == []


def test_hooks_are_removed_when_the_model_fails(model, tensors):
    with pytest.raises(IndexError):
        collect_inputs(model, tensors, [[1, 10**6]])
    assert not any(t.module._forward_pre_hooks for t in tensors)
