"""A quantized tensor and its bytes: codes, scale bytes and kept weights in, the tensor's data out, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import TacqError
from .block_codec import dequantize_blocks, pack_blocks, unpack_blocks
from .sparse_section import KeptWeights, pack_sparse, unpack_sparse
from .tensor_types import BLOCK_SIZE, TensorType


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix in one of our types, rows in GGUF order.

    codes: uint8 [rows, columns]; scale_bytes: uint8 [rows, columns / 32]; kept: None exactly when the type is a base
    type.
    """

    type: TensorType
    codes: np.ndarray
    scale_bytes: np.ndarray
    kept: KeptWeights | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape


def pack_tensor(tensor: QuantizedTensor) -> np.ndarray:
    """uint8 [type.nbytes(n)]: the base section, then the sparse section of a mixed type."""
    if (tensor.kept is None) != (tensor.type.p == 0):
        raise ValueError(f"type {tensor.type.name} and kept weights do not go together")
    base = pack_blocks(tensor.type.bits, tensor.codes, tensor.scale_bytes).reshape(-1)
    if tensor.kept is None:
        return base
    return np.concatenate([base, pack_sparse(tensor.kept, tensor.codes.size, tensor.type.p)])


def unpack_tensor(tensor_type: TensorType, data: np.ndarray, n_rows: int, n_columns: int, name: str) -> QuantizedTensor:
    """The inverse of `pack_tensor` for uint8 `data`. Raises TacqError for data that is too short or malformed."""
    n = n_rows * n_columns
    if n_columns % BLOCK_SIZE or len(data) != tensor_type.nbytes(n):
        raise TacqError(
            f"tensor '{name}': {len(data)} bytes of {tensor_type.name} do not hold {n_rows} x {n_columns} weights "
            f"({tensor_type.nbytes(n)} bytes expected); the file is truncated or damaged"
        )
    base_bytes = n // BLOCK_SIZE * tensor_type.base_bytes
    codes, scale_bytes = unpack_blocks(tensor_type.bits, data[:base_bytes].reshape(n_rows, -1))
    kept = unpack_sparse(data[base_bytes:], n_rows, n_columns, name) if tensor_type.p else None
    return QuantizedTensor(tensor_type, codes, scale_bytes, kept)


def dequantize(tensor: QuantizedTensor) -> np.ndarray:
    """float32 [rows, columns]: base values plus the kept differences, as the kernels compute them."""
    weights = dequantize_blocks(tensor.type.bits, tensor.codes, tensor.scale_bytes)
    if tensor.kept is not None:
        weights[tensor.kept.rows, tensor.kept.columns] += tensor.kept.values.astype(np.float32)
    return weights


def dequantize_tensor(tensor_type: TensorType, data: np.ndarray, n_rows: int, n_columns: int, name: str) -> np.ndarray:
    """float32 [rows, columns] straight from a tensor's bytes."""
    return dequantize(unpack_tensor(tensor_type, data, n_rows, n_columns, name))
