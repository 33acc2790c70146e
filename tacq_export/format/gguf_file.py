"""GGUF files, read: tensors, metadata keys and values of any type, memory-mapped."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from ..errors import TacqError
from .pack_tensor import dequantize_tensor
from .tensor_types import FORMAT_VERSION, TYPES_BY_ID, TYPES_BY_NAME, register_with_gguf


class _Reader(gguf.GGUFReader):
    """gguf-py reads nothing past the end of a file, without a word, and so may loop over a length of 2^60 that a file
    claims. And it takes a slice of a numpy.memmap for every token and merge of a vocabulary, which costs six times as
    much as one of an array over the same memory."""

    _bytes: np.ndarray | None = None  # uint8 [bytes of the file], over the memory map

    def _get(self, offset, dtype, count=1, override_order=None):
        if self._bytes is None:
            self._bytes = np.asarray(self.data)
        kind, begin = np.dtype(dtype), int(offset)
        end = begin + int(count) * kind.itemsize
        if end > len(self._bytes):
            raise ValueError(f"it ends at byte {len(self._bytes)}, in the middle of something")
        order = self.byte_order if override_order is None else override_order
        values = self._bytes[begin:end].view(kind)
        return values if order == "I" else values.view(kind.newbyteorder(order))


def open_gguf(path: Path | str) -> gguf.GGUFReader:
    """Reader of a GGUF, memory-mapped. Raises TacqError if it is missing, damaged, or of a newer TACQ format."""
    register_with_gguf()
    path = Path(path)
    if not path.is_file():
        raise TacqError(f"There is no file {path}; give the path of a GGUF.")
    try:
        reader = _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, UnicodeDecodeError) as error:
        raise TacqError(
            f"{path} is not a GGUF file, or is damaged or cut off ({error}); fetch or export it again."
        ) from None
    version = field_value(reader, "tacq.format_version")
    if version is not None and version > FORMAT_VERSION:
        raise TacqError(
            f"{path} has TACQ format version {version}, newer than this program's {FORMAT_VERSION}; upgrade "
            "tacq-export."
        )
    return reader


def field_value(reader: gguf.GGUFReader, key: str):
    """Value of a metadata key, None if the file has no such key."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def numpy_shape(tensor: gguf.gguf_reader.ReaderTensor) -> tuple[int, ...]:
    """(rows, columns) and so on: the reverse of GGUF's order."""
    return tuple(int(n) for n in reversed(tensor.shape))


def raw_bytes(tensor: gguf.gguf_reader.ReaderTensor) -> np.ndarray:
    """uint8 [n_bytes] of a tensor, memory-mapped."""
    return tensor.data.reshape(-1).view(np.uint8)


def tensor_values(tensor: gguf.gguf_reader.ReaderTensor) -> np.ndarray:
    """float32 values of a tensor of any type, in numpy order. Raises TacqError for a damaged tensor of ours."""
    ours = TYPES_BY_ID.get(int(tensor.tensor_type))
    shape = numpy_shape(tensor)
    if ours is not None:
        rows = int(np.prod(shape[:-1]))
        return dequantize_tensor(ours, raw_bytes(tensor), rows, shape[-1], tensor.name).reshape(shape)
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
    except NotImplementedError:
        raise TacqError(
            f"tensor '{tensor.name}': gguf-py cannot decode {tensor.tensor_type.name}; use a GGUF of another type."
        ) from None


def shape_bytes(shape: tuple[int, ...], qtype: gguf.GGMLQuantizationType) -> int:
    """Bytes of a tensor of that shape and type."""
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    return int(np.prod(shape)) // block * size


def padded(n_bytes: int, alignment: int) -> int:
    """What a tensor of that many bytes takes in a file."""
    return -(-n_bytes // alignment) * alignment


def type_bytes(shape: tuple[int, ...], name: str) -> int:
    """Bytes of a tensor of that shape in one of our types or a stock one."""
    return shape_bytes(shape, type_named(name))


def type_named(name: str) -> gguf.GGMLQuantizationType:
    """gguf-py's enum member of one of our types or a stock one."""
    register_with_gguf()
    ours = TYPES_BY_NAME.get(name.upper())
    return gguf.GGMLQuantizationType(ours.id) if ours else gguf.GGMLQuantizationType[name.upper()]
