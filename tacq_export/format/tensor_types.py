"""The ggml tensor types of this project: names, ids and sizes (cpp_ext/FORMAT.md has the bytes).

Base types TACQ2, TACQ3 and TACQ4 follow ggml's block contract, 64 weights a block. Mixed types TACQ<b>_S<p> hold a
whole tensor as a base section followed by a sparse section of `p` bytes per 64 weights (0.125 bits per weight for each
p).
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from ..errors import TacqError

BLOCK_SIZE = 64
GROUP_SIZE = 32
FORMAT_VERSION = 2
SPARSE_DENSITIES = (1, 2, 3, 4, 6, 8, 12, 16)
_BASE_BYTES = {2: 18, 3: 26, 4: 34}


@dataclass(frozen=True)
class TensorType:
    """One tensor type. `bits`: 2, 3 or 4; `p`: bytes of sparse section per 64 weights, 0 for a base type."""

    name: str
    id: int
    bits: int
    p: int

    @property
    def base_bytes(self) -> int:
        """Bytes of the base section per 64 weights."""
        return _BASE_BYTES[self.bits]

    @property
    def type_size(self) -> int:
        """Bytes per 64 weights, sparse section included (ggml's `type_size`)."""
        return self.base_bytes + self.p

    @property
    def bits_per_weight(self) -> float:
        return self.type_size * 8 / BLOCK_SIZE

    @property
    def base(self) -> TensorType:
        return TYPES_BY_NAME[f"TACQ{self.bits}"]

    def with_density(self, p: int) -> TensorType:
        """The type of the same base with `p` bytes of sparse section per 64 weights (0: the base type)."""
        return TYPES_BY_NAME[f"TACQ{self.bits}_S{p}" if p else f"TACQ{self.bits}"]

    def nbytes(self, n_weights: int) -> int:
        return n_weights // BLOCK_SIZE * self.type_size


def _all_types() -> list[TensorType]:
    types = [TensorType(f"TACQ{bits}", 510 + bits, bits, 0) for bits in (2, 3, 4)]
    for bits in (2, 3, 4):
        types += [
            TensorType(f"TACQ{bits}_S{p}", 520 + (bits - 2) * 8 + i, bits, p) for i, p in enumerate(SPARSE_DENSITIES)
        ]
    return types


TYPES = tuple(_all_types())
TYPES_BY_NAME = {t.name: t for t in TYPES}
TYPES_BY_ID = {t.id: t for t in TYPES}


def tensor_type(name: str) -> TensorType:
    """The type called `name` (any case).

    Raises TacqError for a name that is none of ours.
    """
    found = TYPES_BY_NAME.get(name.upper())
    if found is None:
        raise TacqError(f"unknown tensor type '{name}': use one of {', '.join(t.name.lower() for t in TYPES)}")
    return found


def register_with_gguf() -> None:
    """Let gguf-py's reader and writer accept our type ids.

    gguf-py looks ids up in a closed enum; there is no public way to add a member, so the members are made the way
    `enum` itself makes them. Safe to call more than once.
    """
    enum = gguf.GGMLQuantizationType
    for t in TYPES:
        if t.id not in enum._value2member_map_:
            member = int.__new__(enum, t.id)
            member._name_, member._value_ = t.name, t.id
            enum._member_map_[t.name] = member
            enum._value2member_map_[t.id] = member
        gguf.GGML_QUANT_SIZES[enum(t.id)] = (BLOCK_SIZE, t.type_size)
