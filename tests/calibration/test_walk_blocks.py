"""The walk from block to block against whole models: the same inputs, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from tiny_hf import ARCHITECTURES, EXPERTS, TEXTS, Listener, own_copy
from transformers.modeling_outputs import BaseModelOutputWithPast

from tacq_export.calibration.calibrate import calibrate
from tacq_export.calibration.collect_inputs import collect_inputs
from tacq_export.calibration.walk_blocks import BlockWalk, block_name, blocks_of, walk_through, walkable
from tacq_export.config import ExportConfig
from tacq_export.format.tensor_types import TYPES_BY_NAME
from tacq_export.planning.select_weights import TensorSelection
from tacq_export.quantization.quantize_model import head_tensor, quantize_matrices
from tacq_export.quantization.quantize_sequential import QuantizedWalk
from tacq_export.quantization.trial_errors import TRIAL
from tacq_export.reporting import Reporter
from tacq_export.workdir import WorkDir


def walk_of(loaded, bf16: bool = False) -> BlockWalk:
    return BlockWalk(loaded, [block for block, _ in blocks_of(loaded)], TEXTS, bf16)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(x, y) for x, y in zip(found, expected, strict=False))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_matrices_get_what_they_get_in_the_whole_model(load_tiny, architecture, bf16):
    """Bit for bit, those of every block and, behind the last one, the head's."""
    loaded = load_tiny(architecture)
    head = head_tensor(loaded)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = dict(
            zip(
                [t.name for t in [*loaded.linear, head]],
                collect_inputs(loaded.model, [*loaded.linear, head], TEXTS),
                strict=True,
            )
        )
    walk, seen = walk_of(loaded, bf16), 0
    for _, tensors in blocks_of(loaded):
        walk.enter(tensors)
        for tensor in tensors:
            assert same(walk.inputs(tensor), expected[tensor.name]), tensor.name
            seen += 1
        walk.leave()
    assert seen == len(loaded.linear) == 14
    ran = []
    handle = loaded.linear[0].module.register_forward_pre_hook(lambda *_: ran.append(1))
    with walk.passed():
        of_head = collect_inputs(loaded.model, [head], TEXTS)
    handle.remove()
    assert same(of_head[0], expected[head.name]) and ran == []
    assert all("forward" not in module.__dict__ for module in loaded.model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_left_as_it_was_when_a_block_fails(load_tiny, architecture):
    loaded = load_tiny(architecture)
    walk, (_, tensors) = walk_of(loaded), blocks_of(loaded)[0]
    handle = tensors[-1].module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        walk.enter(tensors)
    handle.remove()
    with pytest.raises(KeyboardInterrupt), walk.passed():
        raise KeyboardInterrupt
    assert all(
        not m._forward_pre_hooks and not m._forward_hooks and "forward" not in m.__dict__
        for m in loaded.model.modules()
    )


def test_blocks_are_in_the_order_of_their_numbers(load_tiny):
    loaded = load_tiny("llama")
    assert [block for block, _ in blocks_of(loaded)] == list(loaded.model.get_decoder().layers)
    assert {block_name(t) for t in blocks_of(loaded)[1][1]} == {"model.layers.1"} and block_name(
        loaded.embedding
    ) is None


def between_blocks(loaded):
    """The model with something done between its blocks, which no block knows of."""
    decoder = loaded.model.model

    def forward(input_ids=None, **_):
        hidden = decoder.embed_tokens(input_ids)
        position = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for block in decoder.layers:
            hidden = block(1.5 * hidden, position_embeddings=position)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden))

    decoder.forward = forward
    return loaded


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERTS])
def test_blocks_of_these_models_can_be_run_one_by_one(load_tiny, architecture):
    assert walkable(load_tiny(architecture), TEXTS[0])


def test_a_model_that_does_something_between_blocks_is_run_whole(load_tiny):
    loaded = between_blocks(own_copy(load_tiny, "llama"))
    head = head_tensor(loaded)
    assert not walkable(loaded, TEXTS[0])
    expected = collect_inputs(loaded.model, [*loaded.linear, head], TEXTS)
    walk = walk_through(loaded, TEXTS, bf16=False)
    for _, tensors in blocks_of(loaded):
        walk.enter(tensors)
        for tensor in tensors:
            assert same(walk.inputs(tensor), expected[[t.name for t in loaded.linear].index(tensor.name)])
        walk.leave()
    with walk.passed():
        assert same(collect_inputs(loaded.model, [head], TEXTS)[0], expected[-1])


def test_such_a_model_is_quantized_with_the_float_model_s_inputs(load_tiny, tmp_path):
    loaded, listener = between_blocks(own_copy(load_tiny, "llama")), Listener()
    config = ExportConfig("m", "t", "o.gguf")
    calibration = calibrate(loaded, head_tensor(loaded), TEXTS, None, TRIAL, config, tmp_path / "c", Reporter())
    work = WorkDir(tmp_path / "w")
    (work.path / "tensors").mkdir(parents=True)
    nothing = torch.empty(0, dtype=torch.int64)
    selection = {t.name: TensorSelection(TYPES_BY_NAME["TACQ3"], nothing, 0) for t in loaded.linear}
    quantize_matrices(loaded, calibration, TEXTS, selection, config, work, listener)
    assert "The blocks of this model cannot be run one by one: --hessian-inputs float is taken." in listener.lines
    assert all(work.has_tensor(t.name) for t in loaded.linear)


def test_what_blocks_share_is_each_model_s_own(load_tiny):
    """The second block takes what the first has put into a mapping that both are called with: in the quantized model
    what the quantized first one has put there."""
    loaded = own_copy(load_tiny, "llama")
    first, second = loaded.model.model.layers

    class Sharing(torch.nn.Module):
        def __init__(self, block: torch.nn.Module, gives: bool):
            super().__init__()
            self.block, self.gives = block, gives

        def forward(self, hidden, shared=None, **kwargs):
            if not self.gives:
                hidden = hidden + shared["first"]
            out = self.block(hidden, **kwargs)
            if self.gives:
                shared["first"] = out[0] if isinstance(out, tuple) else out
            return out

    loaded.model.model.layers = torch.nn.ModuleList([Sharing(first, True), Sharing(second, False)])
    decoder = loaded.model.model

    def forward(input_ids=None, **_):
        hidden, shared = decoder.embed_tokens(input_ids), {}
        position = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for block in decoder.layers:
            hidden = block(hidden, shared=shared, position_embeddings=position)
        return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden))

    decoder.forward = forward
    last = loaded.linear[-1]
    assert last.name.startswith("blk.1.") and walkable(loaded, TEXTS[0])
    before = [x.clone() for x in collect_inputs(loaded.model, [last], TEXTS)[0]]
    walk = QuantizedWalk(loaded, list(decoder.layers), TEXTS, False)
    walk.enter([])
    changed = loaded.linear[0]
    changed.put(changed.weight + 0.2)
    walk.leave()
    walk.enter([last])
    assert same(walk.inputs(last), before)
    seen = walk.see([last], None)
    after = torch.cat(collect_inputs(loaded.model, [last], TEXTS)[0])
    assert torch.allclose(seen.hessian, after.t() @ after, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.cat(before), after, rtol=1e-2)
