"""Every score against its formula in DESIGN section 2, with plain autograd in float64, example by example."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_hf import TEXTS, VOCAB, tiny_model

from tacq_export.calibration.gradients import accumulate_gradients
from tacq_export.calibration.score_weights import NEEDS_REFERENCE, NEEDS_STATISTIC, score_weights
from tacq_export.config import SCORES
from tacq_export.errors import TacqError
from tacq_export.format.block_codec import dequantize_blocks
from tacq_export.inputs.link_tensors import LinkedTensor
from tacq_export.quantization.fit_groups import round_to_nearest
from tacq_export.quantization.quantize_model import rounding_error
from tacq_export.reporting import Reporter


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    return tiny_model(request.param).requires_grad_(False)


def matrices(model) -> list[LinkedTensor]:
    return [
        LinkedTensor(f"gguf.{name}", name, m, None)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "layers" in name
    ]


def reference_error(tensor: LinkedTensor) -> torch.Tensor:
    """W - Q(W) of a Q that anyone can write down: multiples of 1/8."""
    return tensor.weight - (tensor.weight * 8).round() / 8


@pytest.fixture(scope="module")
def gradients(model) -> dict[str, list[torch.Tensor]]:
    """{module name: dL/dW of each text}, float64, from a copy in which everything has gradients."""
    double = copy.deepcopy(model).double().requires_grad_(True)
    found: dict[str, list[torch.Tensor]] = {t.module_name: [] for t in matrices(model)}
    for text in TEXTS:
        double.zero_grad(set_to_none=True)
        logits = double(input_ids=torch.tensor([text])).logits[0]
        loss = sum(-torch.log_softmax(logits[i], -1)[text[i + 1]] for i in range(len(text) - 1)) / (len(text) - 1)
        loss.backward()
        for name, grads in found.items():
            grads.append(double.get_submodule(name).weight.grad.clone())
    return found


def sums(model, power: int):
    """name -> the gradient sum of a matrix, as a calibration has it."""
    return accumulate_gradients(model, matrices(model), [], None, TEXTS, power, Reporter()).__getitem__


@pytest.fixture(scope="module")
def sums_of(model) -> dict[str, object]:
    """{score: its `statistic` argument}"""
    one, two = sums(model, 1), sums(model, 2)
    return {score: two if score == "fisher" else one for score in SCORES} | {"obs": lambda name: curvature(model, name)}


def curvature(model, name: str) -> torch.Tensor:
    """Some a_r / [H^-1]_jj; those of a calibration are tested in test_calibrate.py."""
    weight = next(t.weight for t in matrices(model) if t.name == name)
    rows, columns = (torch.arange(n, dtype=torch.float32) % 5 + 1 for n in weight.shape)
    return rows[:, None] / columns


FORMULAS = {
    "tacq": lambda g, w, e: sum(x.abs() for x in g) * e.abs() * w.abs(),
    "tacq-no-magnitude": lambda g, w, e: sum(x.abs() for x in g) * e.abs(),
    "tacq-no-error": lambda g, w, e: sum(x.abs() for x in g) * w.abs(),
    "gradient": lambda g, w, e: sum(x.abs() for x in g),
    "fisher": lambda g, w, e: sum(x**2 for x in g) * e**2,
    "magnitude": lambda g, w, e: w.abs(),
    "obs": lambda g, w, e: (torch.arange(len(w)) % 5 + 1)[:, None] / (torch.arange(w.shape[1]) % 5 + 1) * w**2,
}


def test_every_score_has_a_formula_here():
    assert set(SCORES) == {*FORMULAS, "random"}


@pytest.mark.parametrize("score", FORMULAS)
def test_scores_are_their_formulas(model, gradients, sums_of, score):
    """float32 gradients of two layers agree with float64 to 1e-4 of the largest in a matrix (measured 1e-6 to 1e-5)."""
    scores = score_weights(score, matrices(model), sums_of[score], reference_error, 0, Reporter())
    assert set(scores) == {t.name for t in matrices(model)}
    for tensor in matrices(model):
        error = reference_error(tensor).double()
        expected = FORMULAS[score](gradients[tensor.module_name], tensor.weight.double(), error)
        found = scores[tensor.name]
        assert found.dtype == torch.float32 and found.shape == tensor.weight.shape and (found >= 0).all()
        np.testing.assert_allclose(
            found.double().numpy(), expected.numpy(), rtol=1e-3, atol=1e-4 * float(expected.max())
        )


def test_sums_are_over_examples_and_not_over_their_mean(model, gradients):
    """|g_1| + |g_2| is not |g_1 + g_2|: the difference must be visible in this test."""
    name = matrices(model)[0].module_name
    added = sum(gradients[name]).abs()
    assert (sum(g.abs() for g in gradients[name]) - added).abs().max() > 0.1 * added.max()


def refuse(*_):
    raise AssertionError("not needed")


@pytest.mark.parametrize("score", SCORES)
def test_only_what_a_formula_has_is_asked_for(model, sums_of, score):
    """A reference quantization takes long, and so does reading gradients."""
    asked = {"gradient": [], "error": []}
    gradient = lambda name: (asked["gradient"].append(name), sums_of[score](name))[1]  # noqa: E731
    error = lambda tensor: (asked["error"].append(tensor.name), reference_error(tensor))[1]  # noqa: E731
    score_weights(score, matrices(model), gradient, error, 0, Reporter())
    names = [t.name for t in matrices(model)]
    assert asked["gradient"] == (names if score not in ("random", "magnitude") else []) and (
        score in NEEDS_STATISTIC
    ) == bool(asked["gradient"])
    assert asked["error"] == (names if score in ("tacq", "tacq-no-magnitude", "fisher") else []) and (
        score in NEEDS_REFERENCE
    ) == bool(asked["error"])


def test_the_random_score_depends_on_seed_and_name_only(model):
    first = score_weights("random", matrices(model), refuse, refuse, 3, Reporter())
    reordered = score_weights("random", matrices(model)[::-1], refuse, refuse, 3, Reporter())
    other = score_weights("random", matrices(model), refuse, refuse, 4, Reporter())
    names = list(first)
    for name in names:
        assert torch.equal(first[name], reordered[name]) and not torch.equal(first[name], other[name])
        assert 0.4 < float(first[name].mean()) < 0.6 and float(first[name].min()) >= 0 and float(first[name].max()) < 1
    same_shape = [n for n in names if first[n].shape == first[names[0]].shape]
    assert not torch.equal(first[same_shape[0]], first[same_shape[1]])


def test_a_score_that_is_not_finite_is_refused_by_name(model, sums_of):
    tensors = matrices(model)
    with pytest.raises(TacqError, match=f"tensor '{tensors[0].name}': the score 'tacq' is not finite"):
        score_weights(
            "tacq", tensors, sums_of["tacq"], lambda t: torch.full_like(t.weight, float("inf")), 0, Reporter()
        )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_rounding_reference_is_the_weight_less_its_decoded_codes(model, bits):
    for tensor in matrices(model)[:2]:
        codes, scale_bytes = (x.numpy() for x in round_to_nearest(bits, tensor.weight))
        expected = tensor.weight.numpy() - dequantize_blocks(bits, codes, scale_bytes)
        assert np.array_equal(rounding_error(tensor, bits).numpy(), expected)


def test_tokens_are_within_the_vocabulary():
    assert max(map(max, TEXTS)) < VOCAB
