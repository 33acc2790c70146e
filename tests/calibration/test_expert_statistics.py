"""Experts against a mixture written out here: each expert's inputs, gradients and Hessians, by autograd in float64 on a
matrix of its own; and experts that no token reaches."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_hf import TEXTS, Listener, own_copy

from tacq_export.calibration.calibrate import calibrate
from tacq_export.calibration.expert_statistics import SAMPLE_EXPERTS, expert_weights, is_reached
from tacq_export.calibration.gradients import accumulate_gradients
from tacq_export.calibration.hessian import damped_hessian, token_weights
from tacq_export.calibration.predict_loss import predict_losses
from tacq_export.calibration.walk_blocks import BlockWalk, blocks_of
from tacq_export.config import ExportConfig
from tacq_export.inputs.link_tensors import of_experts
from tacq_export.quantization.quantize_experts import mean_hessian
from tacq_export.quantization.quantize_model import head_tensor
from tacq_export.quantization.trial_errors import TRIAL
from tacq_export.reporting import Reporter

N = 8
PARTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


class WrittenOut(torch.nn.Module):
    """The experts of a block, each with three matrices of its own; notes what goes into them, and what comes out."""

    def __init__(self, experts: torch.nn.Module):
        super().__init__()
        gate_up, down = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()
        half = gate_up.shape[1] // 2
        matrices = {"ffn_gate_exps": gate_up[:, :half], "ffn_up_exps": gate_up[:, half:], "ffn_down_exps": down}
        self.matrices = {
            (part, e): values[e].clone().requires_grad_(True) for part, values in matrices.items() for e in range(N)
        }
        self.seen: list[tuple[str, int, torch.Tensor, torch.Tensor]] = []

    def product(self, part: str, e: int, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.matrices[part, e].t()
        y.retain_grad()
        self.seen.append((part, e, x.detach(), y))
        return y

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for e in range(N):
            for slot in range(chosen.shape[1]):  # in the order in which transformers has an expert's tokens
                tokens = (chosen[:, slot] == e).nonzero()[:, 0]
                if len(tokens):
                    x = hidden[tokens]
                    inner = torch.nn.functional.silu(self.product("ffn_gate_exps", e, x))
                    y = self.product("ffn_down_exps", e, inner * self.product("ffn_up_exps", e, x))
                    out = out.index_add(0, tokens, y * share[tokens, slot, None])
        return out


@pytest.fixture(scope="module")
def loaded(load_tiny):
    return load_tiny("mixtral")


@pytest.fixture(scope="module")
def expected(loaded) -> dict[str, dict[str, list[torch.Tensor]]]:
    """{tensor[expert]: inputs, gradients at the outputs and of the weights, of each text}, float64."""
    double = copy.deepcopy(loaded.model).double()
    found: dict[str, dict[str, list[torch.Tensor]]] = {}
    for i, layer in enumerate(double.model.layers):
        layer.mlp.experts = WrittenOut(layer.mlp.experts)
        for part, e in layer.mlp.experts.matrices:
            found[f"blk.{i}.{part}.weight[{e}]"] = {"x": [], "g": [], "w": []}
    for text in TEXTS:
        embedded = double.model.embed_tokens(torch.tensor([text])).detach().requires_grad_(True)
        logits = double(inputs_embeds=embedded).logits[0]
        n = len(text) - 1
        (-torch.log_softmax(logits[:-1], -1)[torch.arange(n), torch.tensor(text[1:])].sum()).backward()
        for i, layer in enumerate(double.model.layers):
            experts = layer.mlp.experts
            for part, e, x, y in experts.seen:
                of_expert = found[f"blk.{i}.{part}.weight[{e}]"]
                of_expert["x"].append(x)
                of_expert["g"].append(y.grad)
            for (part, e), matrix in experts.matrices.items():
                if matrix.grad is not None:
                    found[f"blk.{i}.{part}.weight[{e}]"]["w"].append(matrix.grad / n)
                matrix.grad = None
            experts.seen.clear()
    return found


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    """An expert that only the last token of a text reaches has no gradients at all: zeros are equal to zeros."""
    assert found.dtype == torch.float32 and found.shape == exact.shape
    np.testing.assert_allclose(found.double().numpy(), exact.numpy(), rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_all_tensors_of_three_dimensions_are_linked(loaded):
    tensors = {t.name: t for t in of_experts(loaded.linear)}
    assert sorted(tensors) == sorted(f"blk.{i}.{part}.weight" for i in range(2) for part in PARTS)
    for i, layer in enumerate(loaded.model.model.layers):
        gate, up, down = (tensors[f"blk.{i}.{part}.weight"] for part in PARTS)
        assert gate.shape == up.shape == (N * 128, 64) and down.shape == (N * 64, 128)
        assert torch.equal(gate.matrices[3].weight, layer.mlp.experts.gate_up_proj[3, :128])
        assert torch.equal(up.matrices[3].weight, layer.mlp.experts.gate_up_proj[3, 128:])
        assert torch.equal(down.weight, layer.mlp.experts.down_proj.reshape(-1, 128))
    assert all("ffn_gate_inp" not in t.name for t in loaded.linear), "routers stay as they are"


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_of_each_expert_are_those_of_autograd(loaded, expected, power):
    matrices = [m for t in of_experts(loaded.linear) for m in t.matrices]
    found = accumulate_gradients(loaded.model, matrices, matrices, None, TEXTS, power, Reporter())
    reached = 0
    for m in matrices:
        exact = expected[m.name]
        if not exact["g"]:
            assert len(found[f"{m.name}/tokens"]) == 0 and not found[f"{m.name}/rows"].any() and not found[m.name].any()
            continue
        reached += bool(found[m.name].any())
        close(found[m.name], sum(w.abs() ** power for w in exact["w"]))
        close(found[f"{m.name}/tokens"], torch.cat([g.square().sum(1) for g in exact["g"]]))
        close(found[f"{m.name}/rows"], sum(g.square().sum(0) for g in exact["g"]))
    assert reached > N and not any(p.requires_grad for p in loaded.model.parameters())


def calibrated(loaded, folder, reporter=None, **options):
    config = ExportConfig("m", "t", "o.gguf", **options)
    return calibrate(loaded, head_tensor(loaded), TEXTS, None, TRIAL, config, folder, reporter or Reporter())


def entered(loaded, calibration, block: int, group: int) -> BlockWalk:
    walk = BlockWalk(loaded, [b for b, _ in blocks_of(loaded)], TEXTS, False)
    for i in range(block + 1):
        walk.enter(calibration.expert_groups[group][0].matrices if i == block else [])
        if i < block:
            walk.leave()
    return walk


@pytest.mark.parametrize("how", ["gradient", "plain"])
def test_hessians_and_losses_of_each_expert_are_those_of_the_formulas(loaded, expected, tmp_path, how):
    """The experts' inputs in the walk, w_t of their own tokens, diag(H^-1) on disk, and the loss of a tensor as the sum
    over its experts, all of which are sampled here."""
    calibration = calibrated(loaded, tmp_path, hessian=how)
    assert [[t.name for t in g] for g in calibration.expert_groups] == [
        [f"blk.{i}.{part}.weight" for part in parts] for i in range(2) for parts in (PARTS[:2], PARTS[2:])
    ]
    assert SAMPLE_EXPERTS >= N
    losses = calibration.losses()
    for k, group in enumerate(calibration.expert_groups):
        walk = entered(loaded, calibration, k // 2, k)
        total = {t.name: dict.fromkeys((2, 3, 4), 0.0) for t in group}
        for e, matrix in enumerate(group[0].matrices):
            exact = [expected[t.matrices[e].name] for t in group]
            weights = expert_weights(calibration, group, e, how)
            if not exact[0]["x"]:
                assert not is_reached(weights) and not calibration.curvature(matrix.name).any()
                continue
            x = torch.cat(exact[0]["x"])
            squared = [torch.cat([g.square().sum(1) for g in each["g"]]) for each in exact]
            w = token_weights([s.sqrt() for s in squared]) if how == "gradient" else torch.ones(len(x)).double()
            close(torch.cat(walk.inputs(matrix)), x)
            close(weights, w)
            if not is_reached(weights):
                continue
            hessian = torch.einsum("t,ti,tj->ij", w, x, x)
            inverse = torch.linalg.inv(damped_hessian(hessian, 0.01)).diagonal()
            for t, each in zip(group, exact, strict=True):
                rows = sum(g.square().sum(0) for g in each["g"])
                close(calibration.curvature(t.matrices[e].name), rows[:, None] / inverse)
                again = predict_losses(
                    TRIAL,
                    t.matrices[e],
                    damped_hessian(hessian, 0.01).float(),
                    [x.float()],
                    calibration.token_energy(t.matrices[e].name),
                    calibration.row_energy(t.matrices[e].name),
                    calibration.n_tokens,
                )
                for bits, loss in again.items():
                    total[t.name][bits] += loss
        for t in group:
            assert losses[t.name] == pytest.approx(total[t.name], rel=0.02), t.name
            assert losses[t.name][2] > losses[t.name][3] > losses[t.name][4] > 0


def test_an_expert_that_no_token_reaches_takes_the_mean_of_its_block_s(load_tiny, tmp_path):
    """Its router's logit is far below the others'. A line says how many there are."""
    loaded = own_copy(load_tiny, "mixtral")
    for layer in loaded.model.model.layers:
        layer.mlp.gate.weight[5] = -8 * layer.mlp.gate.weight.sum(0)
    listener = Listener()
    calibration = calibrated(loaded, tmp_path, listener)
    lonely = [
        e for e in range(N) if not is_reached(expert_weights(calibration, calibration.expert_groups[0], e, "plain"))
    ]
    said = [line for line in listener.lines if "reached by no token" in line]
    counts = [
        sum(not is_reached(expert_weights(calibration, calibration.expert_groups[k], e, "gradient")) for e in range(N))
        for k in (0, 2)
    ]
    assert lonely and said == [
        f"{sum(counts)} of 16 experts are reached by no token of the task; each is quantized for the mean of its "
        "block's tokens. More examples reach more of them."
    ]
    group = calibration.expert_groups[0]
    walk = entered(loaded, calibration, 0, 0)
    weights = [expert_weights(calibration, group, e, "plain") for e in range(N)]
    mean, tokens = mean_hessian(group[0], weights, walk)
    x = [torch.cat(walk.inputs(m)).double() for m in group[0].matrices]
    reached = [each for each in x if len(each)]
    close(mean, sum(each.t() @ each for each in reached) / len(reached))
    assert tokens == pytest.approx(2 * sum(map(len, TEXTS)))
    assert replace(group[0], matrices=group[0].matrices[:1]).shape == (128, 64)
