"""The weight files of a Hugging Face folder, by their headers: which tensors there are, of which types, in which file.

A safetensors file begins with 8 bytes (the length of its header, little-endian) and a JSON header {name: {"dtype",
"shape", "data_offsets"}}, so names, types and a file that was cut off are known without reading a weight.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import TacqError

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_MAX_HEADER = 100_000_000  # the limit that safetensors itself has


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. dtype: as the format names it, such as BF16, F8_E4M3 or U8."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, safetensors before PyTorch's own: what transformers and llama.cpp's
    converter read.

    Raises TacqError if there are none, or if a shard is missing that the index or the other names speak of.
    """
    for index_name, pattern in (
        ("model.safetensors.index.json", "model*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        files, index = sorted(folder.glob(pattern)), folder / index_name
        if index.is_file():
            wanted = _indexed_files(index)
        elif files and (match := _SHARD.fullmatch(files[0].name)):
            wanted = [f"{match[1]}-{i:05}-of-{match[3]}.{match[4]}" for i in range(1, int(match[3]) + 1)]
        elif files:
            wanted = [file.name for file in files]
        else:
            continue
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise TacqError(
                f"{folder} lacks {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''} of its "
                f"{len(wanted)} weight files; fetch what is missing."
            )
        return [folder / name for name in wanted]
    ggufs = sorted(file.name for file in folder.glob("*.gguf"))
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    hint = (
        f"give its GGUF instead: {folder / ggufs[0]}"
        if ggufs
        else f"{others[0]} is none that transformers and llama.cpp read, which are model.safetensors and "
        "pytorch_model.bin, with or without shards and an index"
        if others
        else "fetch the weights too, model.safetensors or its shards"
    )
    raise TacqError(f"{folder} holds no model weights; {hint}.")


def _indexed_files(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise TacqError(f"{index} is no index of weight files ({error}); fetch it again.") from None
    if not names or not all(isinstance(name, str) and "/" not in name for name in names):
        raise TacqError(f"{index} names no weight files beside it; fetch it again.")
    return sorted(names)


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """{name: where it is stored} of safetensors files; {} for PyTorch's own files, which have no header.

    Raises TacqError for a file that is no safetensors file, is cut off, or is a Git LFS pointer in place of one.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found |= _header(file)
    return found


def _header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        begin = stream.read(8)
        if begin == b"version ":
            raise TacqError(f"{file} is a Git LFS pointer and not the file itself; fetch it with 'git lfs pull'.")
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or length > min(_MAX_HEADER, size - 8):
            raise TacqError(f"{file} is no safetensors file, or is cut off ({size} bytes); fetch it again.")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: StoredTensor(file, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
                for name, entry in header.items()
            }
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TacqError(f"{file} has a damaged header ({error}); fetch it again.") from None
    if size < 8 + length + end:
        raise TacqError(f"{file} is cut off: it has {size} bytes of {8 + length + end}; fetch it again.")
    return tensors
