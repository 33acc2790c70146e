"""GGUF files, written: a copy of one with some tensors and keys replaced, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from ..errors import TacqError
from ..files import written_atomically
from ..reporting import Reporter
from .gguf_file import field_value, numpy_shape, open_gguf, shape_bytes, tensor_values


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file to be written. shape: numpy order (rows, columns); data() gives its bytes when its turn
    comes."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return shape_bytes(self.shape, self.type)


def _value_for_writer(field: gguf.gguf_reader.ReaderField):
    """A field's value; strings as bytes, so that those that are no UTF-8 are kept as they are."""
    if field.types[-1] != gguf.GGUFValueType.STRING:
        return field.contents()
    strings = [bytes(field.parts[i]) for i in field.data]
    return strings if field.types[0] == gguf.GGUFValueType.ARRAY else strings[0]


def encode_as(values: np.ndarray, type_name: str, name: str) -> np.ndarray:
    """Bytes of float32 `values` in a float type or a stock type. Raises TacqError where the type does not fit."""
    qtype = gguf.GGMLQuantizationType[type_name.upper()]
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[qtype][0]:
        raise TacqError(
            f"tensor '{name}': {values.shape[-1]} columns are not a multiple of {type_name}'s block; use f16 for it."
        )
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
    return PlannedTensor(
        tensor.name, numpy_shape(tensor), qtype, lambda: encode_as(tensor_values(tensor), type_name, tensor.name)
    )


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
        if field.name.startswith(("GGUF.", *dropped_prefixes)) or field.name in (
            "general.architecture",
            *replaced_keys,
        ):
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        if is_array and not field.data:
            continue  # gguf-py writes no empty array, and none is missed
        writer.add_key_value(
            field.name, _value_for_writer(field), field.types[0], sub_type=field.types[-1] if is_array else None
        )
    for key, value in replaced_keys.items():
        kind = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}[
            type(value)
        ]
        writer.add_key_value(key, value, kind)
    for planned in tensors:
        # np.float32 stands for "the shape counts weights, not bytes".
        writer.add_tensor_info(
            planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, raw_dtype=planned.type
        )
    with written_atomically(outfile) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for planned in reporter.track(tensors, "writing"):
                _write_tensor(writer, planned)
        finally:
            writer.close()


def _write_tensor(writer: gguf.GGUFWriter, planned: PlannedTensor) -> None:
    """The bytes of the next tensor. gguf-py's own way, numpy's `tofile`, does not see that the last write failed."""
    data = np.ascontiguousarray(planned.data()).reshape(-1).view(np.uint8)
    if data.nbytes != planned.nbytes:
        raise TacqError(
            f"tensor '{planned.name}': {data.nbytes} bytes were made, expected {planned.nbytes} for "
            f"{planned.type.name}; please report it."
        )
    assert writer.fout is not None  # its header was written
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    out.write(data.data)
    writer.write_padding(out, data.nbytes)


def dequantize_gguf(source: Path | str, outfile: Path, type_name: str, reporter: Reporter) -> None:
    """Write a copy of a GGUF that stock llama.cpp reads: every matrix as `type_name` (f16, f32, bf16, q8_0, ...), the
    rest F32.

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
    file_type = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}.get(
        qtype.name, 0
    )
    write_gguf(outfile, reader, planned, {"general.file_type": file_type}, reporter, dropped_prefixes=("tacq.",))
