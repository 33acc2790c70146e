"""Gradients and their statistics against plain autograd in float64, and a calibration on disk that is never made
twice."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import torch
from tiny_hf import TEXTS, linked_modules, tiny_model

from tacq_export.calibration import calibrate as module
from tacq_export.calibration.calibrate import Calibration, calibrate, disk_bytes
from tacq_export.calibration.gradients import EMBEDDING_OUTPUT, accumulate_gradients
from tacq_export.calibration.hessian import damped_hessian, effective_number, token_weights
from tacq_export.calibration.predict_loss import predict_losses
from tacq_export.config import ExportConfig
from tacq_export.errors import TacqError
from tacq_export.inputs.link_tensors import LinkedTensor
from tacq_export.quantization.quantize_model import head_tensor
from tacq_export.quantization.trial_errors import TRIAL
from tacq_export.reporting import Reporter

HEAD = "head"


@pytest.fixture(
    scope="module", params=["llama", "qwen2", "gemma3"]
)  # a head of its own, and two that are the embedding
def model(request):
    return tiny_model(request.param).requires_grad_(False)


def matrices(model) -> dict[str, torch.nn.Module]:
    return {
        f"gguf.{name}": m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name
    }


def everywhere(model) -> dict[str, torch.nn.Module]:
    return matrices(model) | {HEAD: model.get_output_embeddings(), EMBEDDING_OUTPUT: model.get_input_embeddings()}


def accumulated(model, of_weights: dict, of_outputs: dict, *args, **options) -> dict[str, torch.Tensor]:
    """`accumulate_gradients` of modules by name."""
    outputs = {name: module for name, module in of_outputs.items() if name != EMBEDDING_OUTPUT}
    embedding = of_outputs.get(EMBEDDING_OUTPUT)
    return accumulate_gradients(model, linked_modules(of_weights), linked_modules(outputs), embedding, *args, **options)


def autograd(model, begins: list[int]) -> dict[str, dict[str, list[torch.Tensor]]]:
    """{"weights": {name: dL/dW of each text}, "outputs": {name: dL/dy [tokens, rows] of each text}}, float64, from a
    copy in which everything has gradients. L has the tokens from `begins` on: their mean loss for the weights, and the
    sum of their losses for the outputs."""
    double = copy.deepcopy(model).double().requires_grad_(True)
    names = everywhere(double)
    found = {"weights": {name: [] for name in matrices(double)}, "outputs": {name: [] for name in names}}
    for text, begin in zip(TEXTS, begins, strict=True):
        double.zero_grad(set_to_none=True)
        caught = {}
        handles = [
            m.register_forward_hook(
                lambda m, a, output, name=name, caught=caught: (output.retain_grad(), caught.update({name: output}))[0]
            )
            for name, m in names.items()
        ]
        logits = double(input_ids=torch.tensor([text])).logits[0]
        losses = [-torch.log_softmax(logits[i - 1], -1)[text[i]] for i in range(begin, len(text))]
        sum(losses).backward()
        for handle in handles:
            handle.remove()
        for name, gradients in found["weights"].items():
            gradients.append(names[name].weight.grad.clone() / len(losses))
        for name, gradients in found["outputs"].items():
            gradients.append(caught[name].grad[0].clone())
    return found


@pytest.fixture(scope="module")
def by_autograd(model) -> dict[str, dict[str, list[torch.Tensor]]]:
    """Of whole texts."""
    return autograd(model, [1, 1, 1])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """float32 through two layers: 1e-4 of the largest in a tensor (measured 1e-6 to 1e-5)."""
    assert found.dtype == torch.float32 and found.shape == expected.shape and float(expected.abs().max()) > 0
    np.testing.assert_allclose(
        found.double().numpy(), expected.numpy(), rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_and_statistics_are_those_of_autograd(model, by_autograd, power):
    found = accumulated(model, matrices(model), everywhere(model), TEXTS, power, Reporter())
    outputs = by_autograd["outputs"]
    assert set(found) == {*matrices(model), *(f"{name}/{kind}" for name in outputs for kind in ("tokens", "rows"))}
    for name, gradients in by_autograd["weights"].items():
        close(found[name], sum(g.abs() ** power for g in gradients))
    for name, gradients in outputs.items():
        close(found[f"{name}/tokens"], torch.cat([g.square().sum(1) for g in gradients]))
        close(found[f"{name}/rows"], sum(g.square().sum(0) for g in gradients))
    assert len(found[f"{HEAD}/tokens"]) == sum(map(len, TEXTS)), "one for each token, the last of a text among them"


def test_only_tokens_from_where_an_answer_begins_count(model):
    """From 1 on is the whole text."""
    begins = [4, 1, 1]
    found, expected = (
        accumulated(model, matrices(model), everywhere(model), TEXTS, 2, Reporter(), begins=begins),
        autograd(model, begins),
    )
    for name, gradients in expected["weights"].items():
        close(found[name], sum(g.square() for g in gradients))
    for name, gradients in expected["outputs"].items():
        close(found[f"{name}/rows"], sum(g.square().sum(0) for g in gradients))
    head = found[f"{HEAD}/tokens"]
    assert torch.equal(
        head == 0, torch.tensor([True] * 3 + [False] * 3 + [True] + [False] * 5 + [True] + [False, True])
    ), "no logits of question tokens count, nor a text's last"
    whole = accumulated(model, matrices(model), everywhere(model), TEXTS, 2, Reporter())
    ones = accumulated(model, matrices(model), everywhere(model), TEXTS, 2, Reporter(), begins=[1, 1, 1])
    assert all(torch.equal(whole[name], ones[name]) for name in whole)


def test_statistics_of_outputs_need_no_gradients_of_weights(model):
    """The very same bits, and not one weight is differentiated."""
    both, alone = (
        accumulated(model, of_weights, everywhere(model), TEXTS, 1, Reporter()) for of_weights in (matrices(model), {})
    )
    assert set(alone) == set(both) - set(matrices(model)) and all(
        torch.equal(alone[name], both[name]) for name in alone
    )


def test_the_sum_over_examples_is_not_that_of_their_mean(model, by_autograd):
    """|g_1| + |g_2| is not |g_1 + g_2|, and a sum of losses is not a mean: the differences must be visible in these
    tests."""
    gradients = next(iter(by_autograd["weights"].values()))
    added = sum(gradients).abs()
    assert (sum(g.abs() for g in gradients) - added).abs().max() > 0.1 * added.max()
    assert len({len(text) for text in TEXTS}) == 3


def assert_restored(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad, name
        assert not parameter._post_accumulate_grad_hooks, name
    for name, m in model.named_modules():
        assert not m._forward_hooks and not m._forward_pre_hooks, name


def test_the_model_is_left_as_it_was_and_a_second_run_gives_the_same_bits(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = (accumulated(model, matrices(model), everywhere(model), TEXTS, 1, Reporter()) for _ in range(2))
    assert_restored(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_memory_is_one_matrix(model, monkeypatch):
    """Whenever the hook of one matrix has run, no other has a gradient."""
    held, original = [], torch.Tensor.register_post_accumulate_grad_hook

    def register(parameter, hook):
        def watched(p):
            hook(p)
            held.append(sum(m.weight.grad is not None for m in matrices(model).values()))

        return original(parameter, watched)

    monkeypatch.setattr(torch.nn.Parameter, "register_post_accumulate_grad_hook", register)
    accumulated(model, matrices(model), {}, TEXTS[:1], 1, Reporter())
    assert held == [0] * len(matrices(model))


def test_a_loss_that_is_no_number_is_refused_and_the_model_restored(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[:] = float("inf")
    with pytest.raises(TacqError, match="The loss of example 1 is nan; the model or that example is damaged."):
        accumulated(broken, matrices(broken), everywhere(broken), TEXTS, 1, Reporter())
    assert_restored(broken)


def test_bfloat16_products_give_nearly_the_same(model, by_autograd):
    """8 bits of precision: within 10 % of the whole, and not equal. What is summed is float32."""
    found = accumulated(model, matrices(model), everywhere(model), TEXTS, 1, Reporter(), bf16=True)
    for name, gradients in by_autograd["weights"].items():
        expected = sum(g.abs() for g in gradients)
        assert found[name].dtype == torch.float32
        assert 1e-4 < float((found[name] - expected).norm() / expected.norm()) < 0.1
    for name, gradients in by_autograd["outputs"].items():
        expected = sum(g.square().sum(0) for g in gradients)
        assert (
            found[f"{name}/rows"].dtype == torch.float32
            and float((found[f"{name}/rows"] - expected).norm() / expected.norm()) < 0.1
        )


def test_token_weights_are_the_mean_of_shares_of_the_mean():
    first, second = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([800.0, 0.0, 0.0, 0.0])
    found = token_weights([first, second])
    np.testing.assert_allclose(found.numpy(), [(1 / 3 + 4) / 2, 1 / 3, 0.5, 1.0], rtol=1e-6)
    assert float(found.mean()) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(token_weights([1e-4 * first]).numpy(), token_weights([first]).numpy(), rtol=1e-6)
    assert torch.equal(token_weights([torch.zeros(3)]), torch.zeros(3)), "no division by 0"


def test_the_effective_number_of_weights_is_that_of_equal_ones():
    assert effective_number(torch.full((7,), 0.3)) == pytest.approx(7)
    assert effective_number(torch.tensor([5.0, 0, 0, 5, 0])) == pytest.approx(2)
    assert effective_number(torch.tensor([1.0, 2, 3])) == pytest.approx(36 / 14)
    assert effective_number(torch.zeros(4)) == 4, "nothing depends on these tokens: no division by 0"


def linked(load_tiny, architecture):
    loaded = load_tiny(architecture)
    return loaded, head_tensor(loaded)


def run(loaded, head, folder, **options) -> Calibration:
    return calibrate(loaded, head, TEXTS, None, TRIAL, ExportConfig("m", "t", "o.gguf", **options), folder, Reporter())


def inputs_of(model, tensor: LinkedTensor) -> np.ndarray:
    """float64 [tokens of all texts, columns]"""
    caught = []
    handle = tensor.module.register_forward_hook(lambda m, args, output: caught.append(args[0][0].double().numpy()))
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.tensor([text]))
    handle.remove()
    return np.concatenate(caught)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("weighted", [True, False])
def test_what_lies_on_disk_is_what_the_formulas_say(load_tiny, tmp_path, architecture, weighted):
    """H = sum_t w_t x_t x_t^T, w_t the mean over the group's matrices of |dL/dy_t| as a share of its mean, or 1; the
    losses are those of predict_loss.py with F, where |dL/dy_t|^2 counts."""
    loaded, head = linked(load_tiny, architecture)
    found = run(loaded, head, tmp_path, hessian="gradient" if weighted else "plain")
    outputs = {t.name: t.module for t in [*loaded.linear, head]} | {EMBEDDING_OUTPUT: loaded.embedding.module}
    statistics = accumulated(loaded.model, {}, outputs, TEXTS, 1, Reporter())
    assert found.n_tokens == sum(map(len, TEXTS))
    assert sorted(t.name for g in found.groups for t in g) == sorted(t.name for t in [*loaded.linear, head])
    losses = found.losses()
    assert set(losses) == {t.name for t in [*loaded.linear, head]}
    for tensor in loaded.linear:
        assert torch.equal(found.row_energy(tensor.name), statistics[f"{tensor.name}/rows"])
    assert torch.equal(found.row_energy(EMBEDDING_OUTPUT), statistics[f"{EMBEDDING_OUTPUT}/rows"])
    for k, group in enumerate(found.groups):
        x = inputs_of(loaded.model, group[0])
        squared = [statistics[f"{t.name}/tokens"].double().numpy() for t in group]
        weights = np.mean([s**0.5 / np.mean(s**0.5) for s in squared], axis=0) if weighted else np.ones(len(x))
        expected = np.einsum("t,ti,tj->ij", weights, x, x)
        hessian = found.hessian(k)
        np.testing.assert_allclose(hessian.double().numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        inverse = np.linalg.inv(
            hessian.double().numpy() + 0.01 * np.eye(len(hessian)) * hessian.double().diagonal().mean().item()
        )
        for tensor, of_tokens in zip(group, squared, strict=True):
            curvature = statistics[f"{tensor.name}/rows"].double().numpy()[:, None] / inverse.diagonal()
            np.testing.assert_allclose(
                found.curvature(tensor.name).double().numpy(), curvature, rtol=1e-3
            )  # float32; 15 tokens in 64 columns, so nearly all eigenvalues are the damping's (measured 2e-4)
            again = predict_losses(
                TRIAL,
                tensor,
                damped_hessian(hessian, 0.01),
                [torch.from_numpy(x).float()],
                torch.from_numpy(of_tokens).float(),
                found.row_energy(tensor.name),
            )
            assert losses[tensor.name] == pytest.approx(again, rel=1e-3)


def files(folder) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse(*_, **__):
    raise AssertionError("this was computed already")


def test_a_second_calibration_computes_nothing(load_tiny, tmp_path, monkeypatch):
    loaded, head = linked(load_tiny, "llama")
    first = run(loaded, head, tmp_path)
    before = files(tmp_path)
    assert not [name for name in before if name.name.startswith(".") or "partial" in name.name]
    for name in ("accumulate_gradients", "second_moment", "predict_losses"):
        monkeypatch.setattr(module, name, refuse)
    second = run(loaded, head, tmp_path)
    assert files(tmp_path) == before
    assert [[t.name for t in g] for g in second.groups] == [
        [t.name for t in g] for g in first.groups
    ] and second.losses() == first.losses()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_an_interrupted_calibration_makes_only_what_is_missing(load_tiny, tmp_path, monkeypatch, architecture):
    """The third Hessian fails, then the sixth matrix's losses (a group of the second block), then the head's."""
    loaded, head = linked(load_tiny, architecture)
    groups = run(loaded, head, tmp_path / "whole").groups
    expected = files(tmp_path / "whole")
    folder, made = tmp_path / "parts", []
    moment, predict = module.second_moment, module.predict_losses

    def failing_moment(inputs, weights):
        made.append(inputs[0].shape[1])
        if len(made) == 3:
            raise KeyboardInterrupt
        return moment(inputs, weights)

    def failing_at(wanted):
        def prediction(trial, tensor, *rest):
            if tensor.name == wanted:
                raise KeyboardInterrupt
            return predict(trial, tensor, *rest)

        return prediction

    with monkeypatch.context() as patch:
        patch.setattr(module, "second_moment", failing_moment)
        with pytest.raises(KeyboardInterrupt):
            run(loaded, head, folder)
    assert {p.name for p in (folder / "hessians").iterdir()} == {"0.safetensors", "0.json", "1.safetensors", "1.json"}
    assert_restored(loaded.model)
    monkeypatch.setattr(module, "accumulate_gradients", refuse)
    for k, name in ((5, groups[5][-1].name), (8, head.name)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "predict_losses", failing_at(name))
            with pytest.raises(KeyboardInterrupt):
                run(loaded, head, folder)
        assert sorted(int(p.stem) for p in (folder / "hessians").glob("*.json")) == list(range(k))
        assert (folder / "hessians" / f"{k}.safetensors").is_file(), "a Hessian without its losses is not finished"
    made.clear()
    monkeypatch.setattr(module, "second_moment", lambda *args: (made.append(1), moment(*args))[1])
    run(loaded, head, folder)
    again = files(folder)
    assert len(made) == 1 and set(again) == set(expected)
    for name, data in expected.items():
        assert again[name] == data, name


def test_gradients_that_are_half_written_are_made_again(load_tiny, tmp_path, monkeypatch):
    loaded, head = linked(load_tiny, "llama")

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for options, name in (({}, "outputs"), ({"score": "tacq"}, "gradients-1")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_file", fail)
            with pytest.raises(TacqError, match=rf"Could not write .*{name}.safetensors \(No space left on device\)"):
                run(loaded, head, tmp_path, **options)
        assert not (tmp_path / f"{name}.safetensors").exists()
        run(loaded, head, tmp_path, **options)
        assert (tmp_path / f"{name}.safetensors").is_file()


def test_gradient_sums_are_made_for_the_scores_that_need_them(load_tiny, tmp_path, monkeypatch):
    """Each power once, and nothing else again."""
    loaded, head = linked(load_tiny, "llama")
    expected = {
        power: accumulated(loaded.model, {t.name: t.module for t in loaded.linear}, {}, TEXTS, power, Reporter())
        for power in (1, 2)
    }
    run(loaded, head, tmp_path, score="magnitude")
    made, first = [], files(tmp_path)
    assert not list(tmp_path.glob("gradients*"))
    original = accumulate_gradients
    monkeypatch.setattr(module, "accumulate_gradients", lambda *args: (made.append(args[5]), original(*args))[1])
    monkeypatch.setattr(module, "second_moment", refuse)
    for score, powers in (("obs", []), ("tacq", [1]), ("fisher", [1, 2]), ("gradient", [1, 2]), ("random", [1, 2])):
        found = run(loaded, head, tmp_path, score=score)
        assert made == powers
        if score in ("tacq", "fisher", "gradient"):
            name, power = loaded.linear[0].name, 2 if score == "fisher" else 1
            assert torch.equal(found.statistic(score)(name), expected[power][name]) and torch.equal(
                found.gradient(name, power), expected[power][name]
            )
    after = files(tmp_path)
    assert {str(name) for name in after.keys() - first.keys()} == {"gradients-1.safetensors", "gradients-2.safetensors"}
    assert all(after[name] == first[name] for name in first)
    with safetensors.safe_open(tmp_path / "gradients-1.safetensors", "pt") as file:
        assert set(file.keys()) == {t.name for t in loaded.linear}


def test_precision_and_weights_of_tokens_give_other_files(load_tiny, tmp_path):
    loaded, head = linked(load_tiny, "llama")
    found = {
        name: run(loaded, head, tmp_path / name, score="tacq", **options)
        for name, options in (("plain", {"hessian": "plain"}), ("one", {}), ("bf16", {"precision": "bf16"}))
    }
    name = loaded.linear[0].name
    assert not torch.equal(found["one"].gradient(name, 1), found["bf16"].gradient(name, 1)) and torch.equal(
        found["one"].gradient(name, 1), found["plain"].gradient(name, 1)
    )
    assert not torch.equal(found["one"].hessian(0), found["plain"].hessian(0))


def test_the_space_that_is_asked_for_is_enough(load_tiny, tmp_path):
    """Statistics and headers are not counted; matrices with the same input share a Hessian, so in the whole it is too
    much."""
    more = 4 * 16 * (sum(map(len, TEXTS)) + 320) + 20000
    for architecture in ("llama", "qwen2"):
        loaded, head = linked(load_tiny, architecture)
        folder, written = tmp_path / architecture, 0
        for score in ("obs", "tacq", "fisher"):
            asked = disk_bytes(loaded, head, score, folder)
            run(loaded, head, folder, score=score)
            now = sum(map(len, files(folder).values()))
            assert (now - written) / 2 < asked and now - written <= asked + more
            written = now
        assert disk_bytes(loaded, head, "obs", folder) == disk_bytes(loaded, head, "fisher", folder) < asked, (
            "all is there, but for what is shared"
        )


def test_losses_are_numbers_that_json_keeps(load_tiny, tmp_path):
    loaded, head = linked(load_tiny, "llama")
    found = run(loaded, head, tmp_path)
    written = json.loads(found.losses_file(0).read_text())
    assert {int(bits): loss for bits, loss in next(iter(written.values())).items()} == found.losses()[
        next(iter(written))
    ]
    for loss in found.losses().values():
        assert list(loss) == [2, 3, 4] and loss[2] > loss[3] > loss[4] > 0
    assert replace(found, n_tokens=1).losses() == found.losses()


def test_what_keeping_saves_is_measured_once_for_a_score_and_a_seed(load_tiny, tmp_path, monkeypatch):
    """Another seed of the random score keeps other weights: its export must not depend on what was asked before."""
    loaded, head = linked(load_tiny, "llama")
    found = run(loaded, head, tmp_path)
    first, other = (found.kept_shares(0, "random", seed) for seed in (0, 1))
    assert set(first) == {t.name for t in found.groups[0]} and first != other
    before = files(tmp_path)
    monkeypatch.setattr(module, "kept_shares", refuse)
    assert found.kept_shares(0, "random", 0) == first and found.kept_shares(0, "random", 1) == other
    assert files(tmp_path) == before
