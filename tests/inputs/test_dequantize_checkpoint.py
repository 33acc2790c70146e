"""FP8 and MXFP4 checkpoints become BF16 for both sides: the numbers are value times scale, in each layout of scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import tiny_model, write_model_folder
from transformers.integrations.mxfp4 import FP4_VALUES

from tacq_export.errors import TacqError
from tacq_export.inputs import dequantize_checkpoint as module
from tacq_export.inputs.check_folder import check_folder
from tacq_export.inputs.dequantize_checkpoint import dequantize_checkpoint, dequantize_fp8
from tacq_export.inputs.load_model import load_model
from tacq_export.reporting import Reporter

FP8 = torch.float8_e4m3fn


def by_hand(weight: torch.Tensor, scale_of) -> torch.Tensor:
    rows = [
        [float(weight[i, j].float()) * float(scale_of(i, j)) for j in range(weight.shape[1])]
        for i in range(weight.shape[0])
    ]
    return torch.tensor(rows).to(torch.bfloat16)


def test_each_layout_of_scales():
    """5 x 7 with blocks of 2 x 3: the last block of both is cut off, which transformers takes for another size."""
    torch.manual_seed(0)
    weight = torch.randn(5, 7).to(FP8)
    blocks, rows = torch.rand(3, 3) + 0.5, torch.rand(5) + 0.5
    assert torch.equal(
        dequantize_fp8(weight, blocks, (2, 3), "w"), by_hand(weight, lambda i, j: blocks[i // 2, j // 3])
    )
    assert torch.equal(dequantize_fp8(weight, rows, None, "w"), by_hand(weight, lambda i, j: rows[i]))
    assert torch.equal(dequantize_fp8(weight, rows[:, None], None, "w"), by_hand(weight, lambda i, j: rows[i]))
    for one in (torch.tensor(0.7), torch.tensor([0.7]), torch.tensor([[0.7]])):
        assert torch.equal(dequantize_fp8(weight, one, None, "w"), by_hand(weight, lambda i, j: torch.tensor(0.7)))


def test_experts_with_a_block_grid_each():
    torch.manual_seed(0)
    weight, blocks = torch.randn(2, 5, 7).to(FP8), torch.rand(2, 3, 3) + 0.5
    got = dequantize_fp8(weight, blocks, (2, 3), "w")
    for expert in range(2):
        assert torch.equal(got[expert], dequantize_fp8(weight[expert], blocks[expert], (2, 3), "w"))


@pytest.mark.parametrize("shape", [(2, 3), (3, 4), (7,), (3,), (1, 3, 3)])
def test_a_scale_that_does_not_fit_is_refused_by_name(shape):
    with pytest.raises(TacqError, match=r"tensor 'model.w': has a scale of shape .* for a weight of \[5, 7\]"):
        dequantize_fp8(torch.zeros(5, 7).to(FP8), torch.ones(shape), (2, 3), "model.w")


def quantize_folder(folder: Path, quantization: dict, scale_name: str, block: int | None) -> dict[str, torch.Tensor]:
    """Put FP8 in place of the blocks' matrices; the BF16 values that they stand for, by name."""
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name in [n for n, t in tensors.items() if ".layers." in n and t.dim() == 2]:
        weight = tensors.pop(name)
        rows, columns = weight.shape
        if block is None:
            scale = weight.abs().amax(1, keepdim=True) / 448
            full = scale
        else:
            grid = -(-rows // block), -(-columns // block)
            scale = torch.rand(grid) / 100 + 1e-3
            full = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        tensors[name] = (weight / full).to(FP8)
        tensors[name + scale_name] = scale
        expected[name] = (tensors[name].float() * full).to(torch.bfloat16)
        tensors[name.replace("weight", "input_scale")] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


KINDS = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, "_scale_inv", 48),
    "compressed": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}},
        },
        "_scale",
        None,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_fp8_folder_is_loaded_by_both_sides(tmp_path, monkeypatch, kind):
    """48 divides neither 64 nor 128: blocks at the end are cut off."""
    monkeypatch.setattr(module, "_SHARD_BYTES", 40_000)  # several shards
    folder = write_model_folder(tmp_path / "model", "llama")
    expected = quantize_folder(folder, *KINDS[kind])
    (tmp_path / "work").mkdir()
    loaded = load_model(str(folder), tmp_path / "work", "cpu", Reporter())  # links: both sides have these numbers
    assert len(loaded.linear) == len(expected) == 14
    for tensor in loaded.linear:
        assert torch.equal(tensor.weight, expected[tensor.module_name + ".weight"].float()), tensor.name
    untouched = dict(tiny_model("llama").named_parameters())["lm_head.weight"]
    assert loaded.head is not None and torch.equal(loaded.head.weight, untouched)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["reference-f16.gguf"], "the copy is left behind"


def test_fp8_without_a_scale_is_refused_by_name(tmp_path):
    folder = write_model_folder(tmp_path / "model", "llama")
    quantize_folder(folder, *KINDS["fp8"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TacqError, match="tensor 'model.layers.1.mlp.up_proj.weight': is FP8 and has no"):
        dequantize_checkpoint(check_folder(folder, Reporter()), tmp_path / "copy", Reporter())


def test_mxfp4_experts_become_bf16(tmp_path):
    """gpt-oss: [experts, rows, groups, 16 bytes], two values a byte, low nibble first; scales are powers of two."""
    folder = write_model_folder(tmp_path / "model", "llama")
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 132, (2, 6, 2), dtype=torch.uint8)
    tensors = load_file(folder / "model.safetensors")
    base = "model.layers.0.mlp.experts.gate_up_proj"
    tensors |= {f"{base}_blocks": blocks, f"{base}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = check_folder(folder, Reporter())
    assert checkpoint.quantized
    copy = dequantize_checkpoint(checkpoint, tmp_path / "copy", Reporter())
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {name for name in tensors if not name.startswith(base)} | {base}
    got = load_file(copy / index[base])[base]
    assert got.dtype == torch.bfloat16 and got.shape == (2, 64, 6)
    for expert, row, column in ((0, 0, 0), (0, 3, 1), (1, 5, 63), (1, 2, 33)):
        byte = int(blocks[expert, row, column // 32, column % 32 // 2])
        value = FP4_VALUES[byte >> 4 if column % 2 else byte & 15] * 2.0 ** (
            int(scales[expert, row, column // 32]) - 127
        )
        assert float(got[expert, column, row]) == value
