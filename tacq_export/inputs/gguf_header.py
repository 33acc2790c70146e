"""Keys and tensors of a GGUF by the names that its architecture gives them."""

from __future__ import annotations

from typing import Any

import gguf

from ..format.gguf_file import field_value, tensor_values


class Header:
    """Keys and tensors of a GGUF by their short names."""

    def __init__(self, reference: gguf.GGUFReader):
        self.reference = reference
        self.architecture = str(field_value(reference, "general.architecture"))
        self.tensors = {tensor.name: tensor for tensor in reference.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """Value of `key` of the architecture; of a list of equal values, one of them."""
        value = field_value(self.reference, f"{self.architecture}.{key}")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        return default if value is None else value

    def has(self, *suffixes: str) -> bool:
        """True if a block has a tensor of one of these names."""
        return any(name.startswith("blk.") and name.endswith(suffixes) for name in self.tensors)

    def values(self, name: str) -> list[float]:
        return tensor_values(self.tensors[name]).reshape(-1).tolist()

    @property
    def head_dim(self) -> int:
        return int(self.get("attention.key_length") or self.get("embedding_length") // self.get("attention.head_count"))
