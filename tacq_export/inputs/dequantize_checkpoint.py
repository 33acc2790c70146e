"""A checkpoint with FP8 or MXFP4 weights, written again in bfloat16.

Both sides of an export, transformers and llama.cpp's converter, can read such checkpoints, but not to the same numbers
(one rounds to bfloat16, the other to half precision; transformers takes blocks that do not divide a matrix for smaller
ones). One copy in bfloat16 is read by both. Formats: DeepSeek-V3's block-wise FP8 (`weight_scale_inv`, which is
multiplied all the same), FP8 with one scale a tensor or a row (`weight_scale`: compressed-tensors, FBGEMM, ModelOpt),
and the MXFP4 of gpt-oss (`_blocks` and `_scales`; OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import TacqError
from ..files import need_space
from ..reporting import Reporter
from .check_folder import Checkpoint, quantization_config
from .checkpoint import StoredTensor

_SHARD_BYTES = 2_000_000_000  # of the copy: bounds the memory that it takes
_SCALES = ("_scale_inv", "_scale")  # behind the name of the weight that they belong to
# Scales of activations and caches, for kernels that compute in FP8. Torch in float32 has no use for them.
_UNUSED = (
    ".input_scale", ".k_scale", ".v_scale", ".q_scale", ".output_scale", ".activation_scale", "_activation_scale",
    ".input_scale_ub", ".kv_scale", ".prob_output_scale",
)  # fmt: skip


def dequantize_checkpoint(checkpoint: Checkpoint, copy: Path, reporter: Reporter) -> Path:
    """Write `checkpoint` to the folder `copy` in bfloat16, without quantization_config; returns `copy`.

    Raises TacqError for a scale that does not fit its weight, an FP8 weight without one, or a full disk.
    """
    quantization, tensors = quantization_config(checkpoint.config), checkpoint.tensors
    block = _block_size(quantization)
    names = [name for name in tensors if not _is_part(name, tensors)]
    gigabytes = 2.1e-9 * sum(_count(tensors[name]) * (2 if name.endswith("_blocks") else 1) for name in names)
    need_space(copy.parent, gigabytes, "the model at BF16", "give --workdir on a larger disk")
    reporter.say(f"Dequantizing {checkpoint.folder.name} ({quantization.get('quant_method', 'FP8')}) to BF16 ...")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    try:
        _copy_small_files(checkpoint.folder, copy)
        (copy / "config.json").write_text(json.dumps(_without_quantization(checkpoint.config), indent=1))
        with _Reader(checkpoint) as reader:
            _write_shards(_dequantized(names, reader, block, bool(quantization)), len(names), copy, reporter)
    except OSError as error:
        raise TacqError(
            f"{copy} cannot be written ({error.strerror or error}); give --workdir on a larger disk."
        ) from None
    return copy


class _Reader:
    """Tensors of all files of a checkpoint, each read when asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self.tensors = checkpoint.tensors
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)

    def __call__(self, name: str) -> torch.Tensor:
        path = self.tensors[name].file
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path].get_tensor(name)


def _count(tensor: StoredTensor) -> int:
    count = 1
    for n in tensor.shape:
        count *= n
    return count


def _is_part(name: str, tensors: dict[str, StoredTensor]) -> bool:
    """Whether a tensor only belongs to another: a scale, or MXFP4's scales."""
    for ending in _SCALES:
        if name.endswith(ending) and name.removesuffix(ending) in tensors:
            return True
    return (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors) or name.endswith(_UNUSED)


def _block_size(quantization: dict[str, Any]) -> tuple[int, ...] | None:
    """Rows and columns of the blocks that have a scale each, None if the config speaks of none."""
    groups = quantization.get("config_groups") or {}
    of_groups = [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
    found = quantization.get("weight_block_size") or next((block for block in of_groups if block), None)
    return tuple(int(n) for n in found) if found else None


def _dequantized(
    names: list[str], read: _Reader, block: tuple[int, ...] | None, scaled: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for name in names:
        value = read(name)
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            yield base, convert_moe_packed_tensors(value, read(f"{base}_scales"), dtype=torch.bfloat16).contiguous()
        elif value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scale = next((name + ending for ending in _SCALES if name + ending in read.tensors), None)
            if scale is None and scaled:
                raise TacqError(f"tensor '{name}': is FP8 and has no {name}_scale; the checkpoint is incomplete.")
            yield name, dequantize_fp8(value, read(scale) if scale else torch.ones(()), block, name)
        else:
            yield name, value


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...] | None, name: str) -> torch.Tensor:
    """bfloat16 [rows, columns] (or more dimensions) of an FP8 weight and its scale.

    scale: one number; one a row; or one for each block of `block` (rows, columns), the last of which may be cut off by
    the matrix's end. Raises TacqError, naming the tensor, for a scale of another shape.
    """
    factor = scale.float()
    if factor.numel() == 1:
        factor = factor.reshape(())
    elif factor.dim() == weight.dim() - 1 and factor.shape == weight.shape[:-1]:
        factor = factor.unsqueeze(-1)
    if factor.dim() not in (0, weight.dim()):
        raise _misfit(name, weight, scale, block)
    if factor.dim():
        sizes = (1,) * (weight.dim() - len(block)) + block if block else (1,) * weight.dim()
        for dim, (have, want, size) in enumerate(zip(factor.shape, weight.shape, sizes, strict=True)):
            if have not in (1, want) and have != -(-want // size):
                raise _misfit(name, weight, scale, block)
            if have == -(-want // size) and size > 1:
                factor = factor.repeat_interleave(size, dim).narrow(dim, 0, want)
    return (weight.float() * factor).to(torch.bfloat16)


def _misfit(name: str, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...] | None) -> TacqError:
    return TacqError(
        f"tensor '{name}': has a scale of shape {list(scale.shape)} for a weight of {list(weight.shape)}, expected one "
        f"number, one a row, or one a block{' of ' + ' x '.join(map(str, block)) if block else ''}; the checkpoint is "
        "damaged or of a format that is not known here."
    )


def _write_shards(tensors: Iterator[tuple[str, torch.Tensor]], total: int, copy: Path, reporter: Reporter) -> None:
    """Files of at most _SHARD_BYTES (but for a tensor that is larger), and their index."""
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    size = n_files = 0

    def flush() -> None:
        nonlocal size, n_files
        n_files += 1
        file = f"model-bf16-{n_files:05}.safetensors"
        save_file(shard, copy / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
        size = 0

    for done, (name, value) in enumerate(tensors, 1):
        if shard and size + value.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = value.contiguous()
        size += value.nbytes
        reporter.progress(done, total, "dequantizing")
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }


def _copy_small_files(folder: Path, copy: Path) -> None:
    """Tokenizer, templates and configs; no weights and no index of them."""
    for path in sorted(folder.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf") or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != "config.json":
            shutil.copyfile(path, copy / path.name)
