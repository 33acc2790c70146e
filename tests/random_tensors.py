"""Random tensors of our types, in the numbers that the format can hold rather than those that a quantizer would
choose."""

from __future__ import annotations

import numpy as np

from tacq_export.format.block_codec import CODECS, RING
from tacq_export.format.pack_tensor import QuantizedTensor
from tacq_export.format.sparse_section import KeptWeights, capacity
from tacq_export.format.tensor_types import TensorType


def random_kept(rng: np.random.Generator, rows: int, columns: int, p: int) -> KeptWeights:
    """As many kept weights as fit; some rows hold none, and the first and the last column are among them."""
    nnz = min(capacity(rows, rows * columns, p), rows * columns // 2)
    usable = rng.permutation(rows)[: max(rows // 2, -(-nnz // columns), 1)]
    places = np.array([(r, c) for r in usable for c in range(columns)], dtype=np.int64)
    chosen = places[rng.choice(len(places), size=nnz, replace=False)]
    if nnz > 1:
        chosen[:2] = [(usable[0], 0), (usable[0], columns - 1)]
        chosen = np.unique(chosen, axis=0)
    chosen = chosen[np.lexsort((chosen[:, 1], chosen[:, 0]))]
    row_ptr = np.concatenate([[0], np.cumsum(np.bincount(chosen[:, 0], minlength=rows))]).astype(np.uint32)
    values = rng.normal(0, 0.5, len(chosen)).astype(np.float16)
    return KeptWeights(row_ptr, chosen[:, 1].astype(np.uint16), values)


def alternating_codes(bits: int, shape: tuple[int, ...], first: int, second: int) -> np.ndarray:
    """uint8 codes in which every ring is first, second, first, ...: all weights have one of two levels, and four
    neighbours have the same."""
    codes = np.empty((*shape[:-1], shape[-1] // len(RING), len(RING)), np.uint8)
    codes[..., RING] = np.resize(np.array([first, second], np.uint8), len(RING))
    return codes.reshape(shape)


def random_tensor(rng: np.random.Generator, tensor_type: TensorType, rows: int, columns: int) -> QuantizedTensor:
    """Any codes, and scale bytes over their whole range of sign and scale."""
    codes = rng.integers(0, 1 << CODECS[tensor_type.bits].bits, (rows, columns), dtype=np.uint8)
    scale_bytes = rng.integers(0, 256, (rows, columns // 32), dtype=np.uint8)
    kept = random_kept(rng, rows, columns, tensor_type.p) if tensor_type.p else None
    return QuantizedTensor(tensor_type, codes, scale_bytes, kept)
