"""What is in a GGUF: tensors, types, true bits per weight, and where the kept weights sit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import TacqError
from .gguf_file import field_value, numpy_shape, open_gguf, raw_bytes
from .pack_tensor import unpack_tensor
from .tensor_types import TYPES_BY_ID

_SHADES = " .:-=+*#%@"
_KEYS = (
    "general.name",
    "general.architecture",
    "tacq.format_version",
    "tacq.base_model",
    "tacq.task",
    "tacq.score",
    "tacq.ratio",
    "tacq.n_samples",
    "tacq.seq_len",
)


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """A matrix of a block: neither embedding nor head nor norm."""
    return len(shape) > 1 and name.startswith("blk.")


@dataclass(frozen=True)
class TensorFacts:
    """nbytes: size in the file; kept: weights at 16 bits, 0 for types that keep none."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    kept: int

    @property
    def n_weights(self) -> int:
        return int(np.prod(self.shape))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights

    @property
    def is_linear(self) -> bool:
        return is_linear(self.name, self.shape)


@dataclass(frozen=True)
class FileFacts:
    path: Path
    file_bytes: int
    metadata: dict[str, object]
    tensors: list[TensorFacts]

    @property
    def bpw_file(self) -> float:
        return 8 * self.file_bytes / sum(t.n_weights for t in self.tensors)

    @property
    def bpw_linear(self) -> float:
        """True bits per weight of the blocks' matrices, scales and indices counted; NaN if there are none."""
        linear = [t for t in self.tensors if t.is_linear]
        return 8 * sum(t.nbytes for t in linear) / sum(t.n_weights for t in linear) if linear else float("nan")

    def types(self) -> dict[str, int]:
        """How many matrices of the blocks have each type, most frequent first."""
        names = [t.type for t in self.tensors if t.is_linear]
        return dict(sorted(((n, names.count(n)) for n in set(names)), key=lambda item: (-item[1], item[0])))


def inspect_gguf(path: Path | str) -> FileFacts:
    """Facts of any GGUF. Our tensors are unpacked and checked: raises TacqError for a damaged one."""
    reader = open_gguf(path)
    if not reader.tensors:
        raise TacqError(f"{path} holds no tensors; give a GGUF of a model.")
    tensors = []
    for tensor in reader.tensors:
        ours = TYPES_BY_ID.get(int(tensor.tensor_type))
        shape = numpy_shape(tensor)
        kept = 0
        if ours is not None:
            unpacked = unpack_tensor(ours, raw_bytes(tensor), int(np.prod(shape[:-1])), shape[-1], tensor.name)
            kept = unpacked.kept.nnz if unpacked.kept else 0
        tensors.append(TensorFacts(tensor.name, shape, tensor.tensor_type.name, int(tensor.n_bytes), kept))
    metadata = {key: field_value(reader, key) for key in _KEYS}
    return FileFacts(
        Path(path), Path(path).stat().st_size, {k: v for k, v in metadata.items() if v is not None}, tensors
    )


def density_picture(facts: FileFacts) -> list[str]:
    """Text lines: one row a kind of matrix, one column a block, darker where a larger share of the weights is kept."""
    cells: dict[str, dict[int, float]] = {}
    for tensor in facts.tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", tensor.name)
        if match and tensor.is_linear:
            cells.setdefault(match[2], {})[int(match[1])] = tensor.kept / tensor.n_weights
    most = max((density for row in cells.values() for density in row.values()), default=0.0)
    if most == 0:
        return []
    blocks = 1 + max(max(row) for row in cells.values())
    lines = [f"share of weights kept, blocks 0 to {blocks - 1} from left to right ('@' = {100 * most:.2f} %):"]
    for kind in sorted(cells):
        row = "".join(_SHADES[round(cells[kind].get(i, 0.0) / most * (len(_SHADES) - 1))] for i in range(blocks))
        lines.append(f"{kind:>14} |{row}| {100 * float(np.mean(list(cells[kind].values()))):.2f} % on average")
    return lines
