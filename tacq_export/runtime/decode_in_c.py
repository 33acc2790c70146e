"""Decode the tensors of a GGUF with the C code of our llama.cpp, to compare with Python's."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import TacqError
from ..format.block_codec import dequantize_blocks
from ..format.gguf_file import numpy_shape, open_gguf, raw_bytes
from ..format.pack_tensor import unpack_tensor
from ..format.tensor_types import TYPES_BY_ID, TensorType
from ..reporting import Reporter
from .build import runtime_path


@cache
def _ggml_base(backend: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(runtime_path(backend) / "libggml-base.so"))


def dequantize_base_in_c(tensor_type: TensorType, data: np.ndarray, n_weights: int, backend: str = "cpu") -> np.ndarray:
    """float32 [n_weights] of the base section of `data` (uint8), by `dequantize_row_tacq<bits>`."""
    out = np.empty(n_weights, dtype=np.float32)
    data = np.ascontiguousarray(data[: n_weights // 64 * tensor_type.base_bytes])
    decode = getattr(_ggml_base(backend), f"dequantize_row_tacq{tensor_type.bits}")
    decode.argtypes, decode.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    decode(data.ctypes.data, out.ctypes.data, n_weights)
    return out


def check_decoding(path: Path | str, reporter: Reporter, backend: str = "cpu") -> int:
    """Decode every TACQ tensor of a file in Python and in C; returns how many there are.

    The sparse sections are checked as they are unpacked. Raises TacqError for a damaged tensor or a bit that differs.
    """
    ours = [t for t in open_gguf(path).tensors if int(t.tensor_type) in TYPES_BY_ID]
    for tensor in reporter.track(ours, "decoding"):
        tensor_type, shape = TYPES_BY_ID[int(tensor.tensor_type)], numpy_shape(tensor)
        rows = int(np.prod(shape[:-1]))
        unpacked = unpack_tensor(tensor_type, raw_bytes(tensor), rows, shape[-1], tensor.name)
        in_python = dequantize_blocks(tensor_type.bits, unpacked.codes, unpacked.scale_bytes).reshape(-1)
        in_c = dequantize_base_in_c(tensor_type, raw_bytes(tensor), rows * shape[-1], backend)
        if not np.array_equal(in_python.view(np.uint32), in_c.view(np.uint32)):
            at = int(np.argmax(in_python.view(np.uint32) != in_c.view(np.uint32)))
            raise TacqError(
                f"tensor '{tensor.name}': weight {at} is {in_python[at]} in Python and {in_c[at]} in C; build the "
                "runtime again."
            )
    return len(ours)
