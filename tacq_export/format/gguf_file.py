"""GGUF files, read: tensors, metadata keys and values of any type, memory-mapped."""

from __future__ import annotations

import re
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
    """Reader of a GGUF, memory-mapped; of all parts as one if it is split, and `path` may be any of them.

    Raises TacqError if it is missing, damaged, or of another TACQ format version, or if a part is missing.
    """
    register_with_gguf()
    path = Path(path)
    reader = _open_part(path)
    version = field_value(reader, "tacq.format_version")
    if version is not None and version < FORMAT_VERSION:
        raise TacqError(
            f"{path} has tacq.format_version {version}, which this program does not read any more; export it again."
        )
    if version is not None and version > FORMAT_VERSION:
        raise TacqError(
            f"{path} has tacq.format_version {version} and this program reads version {FORMAT_VERSION}; upgrade "
            "tacq-export."
        )
    count = field_value(reader, "split.count")
    return reader if count is None or int(count) < 2 else _joined(path, reader, int(count))


def _open_part(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise TacqError(f"There is no file {path}; give the path of a GGUF.")
    try:
        return _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, UnicodeDecodeError) as error:
        raise TacqError(
            f"{path} is not a GGUF file, or is damaged or cut off ({error}); fetch or export it again."
        ) from None


def split_parts(path: Path, count: int) -> list[Path]:
    """Paths of the `count` parts of a split GGUF, of which `path` is one: NAME-00002-of-00003.gguf, as
    llama-gguf-split names them. Raises TacqError for another name, or if a part is missing."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not match or int(match[3]) != count:
        raise TacqError(
            f"{path} is one of {count} parts of a split GGUF, and its name does not say where the others are; "
            f"give all parts the names that they had, NAME-00001-of-{count:05}.gguf and so on, in one folder."
        )
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise TacqError(
            f"{path} is one of {count} parts of a split GGUF, and {', '.join(missing[:5])} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it; fetch the missing part."
        )
    return parts


def _joined(path: Path, reader: gguf.GGUFReader, count: int) -> gguf.GGUFReader:
    """The first part's reader, with the tensors of all parts and without the keys of the split.

    Only the first part has the model's metadata. Each part says which one it is and how many tensors there are, so
    parts of two models that were mixed up are found.
    """
    readers = []
    for number, part in enumerate(split_parts(path, count)):
        one = reader if part == path else _open_part(part)
        said = (field_value(one, "split.no"), field_value(one, "split.count"))
        if said != (number, count):
            raise TacqError(
                f"{part} says that it is part {said[0]} of {said[1]}, counted from 0, and its name that it is "
                f"{number} of {count}; fetch it again."
            )
        readers.append(one)
    first = readers[0]
    tensors = [tensor for one in readers for tensor in one.tensors]
    expected = field_value(first, "split.tensors.count")
    names = {tensor.name for tensor in tensors}
    if len(names) != len(tensors) or (expected is not None and int(expected) != len(tensors)):
        raise TacqError(
            f"The {count} parts of {path} hold {len(tensors)} tensors, {len(names)} of them of different names, and "
            f"the first says {expected}; they are of different models, fetch them again."
        )
    first.tensors = tensors
    for key in [key for key in first.fields if key.startswith("split.")]:
        del first.fields[key]
    return first


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
