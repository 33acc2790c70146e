"""GGUF files: read any, write a copy with some tensors and keys replaced, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from .errors import TacqError
from .pack_tensor import dequantize_tensor
from .reporting import Reporter
from .tensor_types import FORMAT_VERSION, TYPES_BY_ID, TYPES_BY_NAME, register_with_gguf


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file to be written. shape: numpy order (rows, columns); data() gives its bytes when its turn comes."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return _bytes(self.shape, self.type)


def _bytes(shape: tuple[int, ...], qtype: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    return int(np.prod(shape)) // block * size


def padded(n_bytes: int, alignment: int) -> int:
    """What a tensor of that many bytes takes in a file."""
    return -(-n_bytes // alignment) * alignment


class _Reader(gguf.GGUFReader):
    """gguf-py reads nothing past the end of a file, without a word, and so may loop over a length of 2^60 that a file claims."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, in the middle of something")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path | str) -> gguf.GGUFReader:
    """Reader of a GGUF, memory-mapped. Raises TacqError if it is missing, damaged, or of a newer TACQ format."""
    register_with_gguf()
    path = Path(path)
    if not path.is_file():
        raise TacqError(f"There is no file {path}; give the path of a GGUF.")
    try:
        reader = _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, UnicodeDecodeError) as error:
        raise TacqError(f"{path} is not a GGUF file, or is damaged or cut off ({error}); fetch or export it again.") from None
    version = field_value(reader, "tacq.format_version")
    if version is not None and version > FORMAT_VERSION:
        raise TacqError(f"{path} has TACQ format version {version}, newer than this program's {FORMAT_VERSION}; upgrade tacq-export.")
    return reader


def field_value(reader: gguf.GGUFReader, key: str):
    """Value of a metadata key, None if the file has no such key."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _value_for_writer(field: gguf.gguf_reader.ReaderField):
    """A field's value; strings as bytes, so that those that are no UTF-8 are kept as they are."""
    if field.types[-1] != gguf.GGUFValueType.STRING:
        return field.contents()
    strings = [bytes(field.parts[i]) for i in field.data]
    return strings if field.types[0] == gguf.GGUFValueType.ARRAY else strings[0]


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
        raise TacqError(f"tensor '{tensor.name}': gguf-py cannot decode {tensor.tensor_type.name}; use a GGUF of another type.") from None


def encode_as(values: np.ndarray, type_name: str, name: str) -> np.ndarray:
    """Bytes of float32 `values` in a float type or a stock type. Raises TacqError where the type does not fit."""
    qtype = gguf.GGMLQuantizationType[type_name.upper()]
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[qtype][0]:
        raise TacqError(f"tensor '{name}': {values.shape[-1]} columns are not a multiple of {type_name}'s block; use f16 for it.")
    with np.errstate(over="ignore"):
        encoded = gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), qtype)
    if qtype == gguf.GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise TacqError(f"tensor '{name}': has NaN, Inf, or values beyond the range of F16; use another model file.")
    return encoded


def copied(tensor: gguf.gguf_reader.ReaderTensor) -> PlannedTensor:
    """`tensor` as it is."""
    return PlannedTensor(tensor.name, numpy_shape(tensor), tensor.tensor_type, lambda: tensor.data)


def encoded(tensor: gguf.gguf_reader.ReaderTensor, type_name: str) -> PlannedTensor:
    """`tensor` in a float or stock type."""
    qtype = gguf.GGMLQuantizationType[type_name.upper()]
    return PlannedTensor(tensor.name, numpy_shape(tensor), qtype, lambda: encode_as(tensor_values(tensor), type_name, tensor.name))


@contextlib.contextmanager
def written_atomically(outfile: Path) -> Iterator[Path]:
    """A temporary path beside `outfile`, renamed to it at the end; nothing is left when anything fails."""
    partial = outfile.with_name(f".{outfile.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, outfile)
    except OSError as error:
        raise TacqError(f"Could not write {outfile} ({error.strerror or error}); free some space or give another --outfile.") from error
    finally:
        partial.unlink(missing_ok=True)


def write_gguf(
    outfile: Path,
    source: gguf.GGUFReader,
    tensors: list[PlannedTensor],
    replaced_keys: dict[str, int | float | str],
    reporter: Reporter,
    dropped_prefixes: tuple[str, ...] = (),
) -> None:
    """Write `tensors` in their order under the metadata of `source`, with `replaced_keys` replaced or added.

    int values are written as uint32, float as float32. Keys that begin with one of `dropped_prefixes` are left out.
    Raises TacqError when the disk is full or the file cannot be written; then there is no file at all.
    """
    writer = gguf.GGUFWriter(None, field_value(source, "general.architecture"), use_temp_file=False)
    writer.data_alignment = int(source.alignment)
    for field in source.fields.values():
        if field.name.startswith(("GGUF.", *dropped_prefixes)) or field.name in ("general.architecture", *replaced_keys):
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        if is_array and not field.data:
            continue  # gguf-py writes no empty array, and none is missed
        writer.add_key_value(field.name, _value_for_writer(field), field.types[0], sub_type=field.types[-1] if is_array else None)
    for key, value in replaced_keys.items():
        kind = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}[type(value)]
        writer.add_key_value(key, value, kind)
    for planned in tensors:
        # np.float32 stands for "the shape counts weights, not bytes".
        writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, raw_dtype=planned.type)
    with written_atomically(outfile) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for planned in reporter.track(tensors, "writing"):
                writer.write_tensor_data(np.ascontiguousarray(planned.data()))
        finally:
            writer.close()


def dequantize_gguf(source: Path | str, outfile: Path, type_name: str, reporter: Reporter) -> None:
    """Write a copy of a GGUF that stock llama.cpp reads: every matrix as `type_name` (f16, f32, bf16, q8_0, ...), the rest F32.

    Raises TacqError for a type that does not fit a tensor, a damaged source, or an output that cannot be written.
    """
    reader = open_gguf(source)
    qtype = gguf.GGMLQuantizationType[type_name.upper()]
    block = gguf.GGML_QUANT_SIZES[qtype][0]
    planned = []
    for tensor in reader.tensors:
        shape = numpy_shape(tensor)
        if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.I32) or len(shape) < 2:
            planned.append(copied(tensor) if tensor.tensor_type.name[0] in "FI" else encoded(tensor, "f32"))
        else:
            # llama.cpp's own way out for widths that a block does not divide.
            planned.append(encoded(tensor, type_name if shape[-1] % block == 0 else "f16"))
    file_type = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}.get(qtype.name, 0)
    write_gguf(outfile, reader, planned, {"general.file_type": file_type}, reporter, dropped_prefixes=("tacq.",))


def type_bytes(shape: tuple[int, ...], name: str) -> int:
    """Bytes of a tensor of that shape in one of our types or a stock one."""
    return _bytes(shape, type_named(name))


def type_named(name: str) -> gguf.GGMLQuantizationType:
    """gguf-py's enum member of one of our types or a stock one."""
    register_with_gguf()
    ours = TYPES_BY_NAME.get(name.upper())
    return gguf.GGMLQuantizationType(ours.id) if ours else gguf.GGMLQuantizationType[name.upper()]
