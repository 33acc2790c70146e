"""The walk from block to block against whole models: the same inputs, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from tiny_hf import ARCHITECTURES, TEXTS

from tacq_export.calibration.collect_inputs import collect_inputs
from tacq_export.calibration.walk_blocks import BlockWalk, block_name, blocks_of
from tacq_export.quantization.quantize_model import head_tensor


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
