"""A stock type as if it could hold every width: what its quality would be at its nominal bits per weight.

Types of 256-weight blocks cannot hold rows of 576 or 896 weights in a real file; llama-quantize falls back to 4 bits
and more. Here the rows are laid end to end, so that blocks run on across them and nothing is wasted, and ggml's own
quantizer rounds them with the importance of the task's imatrix. A name such as Q2_K stands for that type in all
matrices; a mix such as Q3_K_M gives each the type that llama-quantize wanted for it before it fell back. The values go
into an F16 file, which llama.cpp runs. That favours the stock type twice: where it does not fit no such file exists,
and its activations are not rounded to 8 bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import gguf
import numpy as np

from ..errors import TacqError
from ..files import need_space
from ..format.gguf_file import numpy_shape, open_gguf, tensor_values
from ..format.inspect_gguf import is_linear
from ..format.tensor_types import register_with_gguf
from ..format.write_gguf import PlannedTensor, copied, encode_as, write_gguf
from ..reporting import Reporter
from ..runtime.build import runtime_path, usable_cpus
from .compare_files import imatrix_importance, plan_stock

# Types that ggml_quantize_chunk writes and gguf-py decodes.
EMULATED_TYPES = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_S",
    "Q3_K",
    "IQ4_XS",
    "IQ4_NL",
    "Q4_0",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_0",
)
# llama-quantize's mixes of them, for models of this kind.
EMULATED_MIXES = (
    "IQ2_M",
    "Q2_K_S",
    "IQ3_XS",
    "Q3_K_S",
    "IQ3_M",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
)
MatrixTypes = dict[str, gguf.GGMLQuantizationType]  # of every matrix of the blocks, by name
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Emulated:
    """What a file would take, could it exist: file_bytes, bits per weight of the blocks' matrices and of the file."""

    file_bytes: int
    bpw_linear: float
    bpw_file: float


def named(types: Sequence[str]) -> list[str]:
    """Upper-case names, each once, all known. Raises TacqError for one that cannot be emulated."""
    if unknown := [name for name in types if name.upper() not in EMULATED_TYPES + EMULATED_MIXES]:
        raise TacqError(
            f"'{unknown[0]}' cannot be emulated; use a type ({', '.join(EMULATED_TYPES)}) or a mix of them "
            f"({', '.join(EMULATED_MIXES)})."
        )
    return list(dict.fromkeys(name.upper() for name in types))


def emulated_types(name: str, reference: Path, imatrix: Path | None, embedding: str, head: str) -> MatrixTypes:
    """Type of every matrix of the blocks: `name` for all, or what the mix of that name wants for each.

    imatrix: llama-quantize refuses some mixes without. Raises TacqError for a file without blocks, and for a mix with a
    type that cannot be emulated.
    """
    matrices = {t.name: t.tensor_type.name for t in open_gguf(reference).tensors if is_linear(t.name, numpy_shape(t))}
    if not matrices:
        raise TacqError(f"{reference} has no matrices in blocks; give a GGUF of a language model.")
    if name in EMULATED_TYPES:
        return dict.fromkeys(matrices, gguf.GGMLQuantizationType[name])
    wanted = plan_stock(reference, imatrix, name, embedding, head).wanted
    types = {
        matrix: wanted.get(matrix, now).upper() for matrix, now in matrices.items()
    }  # what is of its type already is not listed
    for matrix, kind in types.items():
        if kind not in EMULATED_TYPES:
            raise TacqError(
                f"tensor '{matrix}' would be {kind} in {name}, which cannot be emulated; leave it out of --emulate."
            )
    return {matrix: gguf.GGMLQuantizationType[kind] for matrix, kind in types.items()}


@cache
def _quantize_chunk(backend: str = "cpu"):
    function = ctypes.CDLL(str(runtime_path(backend) / "libggml-base.so")).ggml_quantize_chunk
    p, i64 = ctypes.c_void_p, ctypes.c_int64
    function.argtypes, function.restype = [ctypes.c_int, p, p, i64, i64, i64, p], ctypes.c_size_t
    return function


def ggml_quantize(
    values: np.ndarray, qtype: gguf.GGMLQuantizationType, importance: np.ndarray | None, threads: int = 1
) -> np.ndarray:
    """uint8 [rows, bytes a row] of float32 [rows, columns] by ggml_quantize_chunk; columns a multiple of the type's
    block.

    importance: float32 [columns] of every row, or None.
    """
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    if columns % block:
        raise ValueError(f"{columns} columns are no multiple of {block}")
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (columns,):
            raise ValueError(f"importance of shape {importance.shape}, expected ({columns},)")
    out = np.empty((rows, columns // block * size), np.uint8)
    quantize, weights = _quantize_chunk(), None if importance is None else importance.ctypes.data

    def piece(begin: int, end: int) -> None:  # ctypes lets other threads run meanwhile
        if begin < end:
            quantize(
                int(qtype), values[begin:].ctypes.data, out[begin:].ctypes.data, 0, int(end - begin), columns, weights
            )

    piece(0, min(1, rows))  # the first call makes the type's tables
    bounds = np.linspace(min(1, rows), rows, threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(piece, bounds[:-1], bounds[1:]))
    return out


def rounded_as(
    values: np.ndarray, qtype: gguf.GGMLQuantizationType, importance: np.ndarray, threads: int = 1
) -> np.ndarray:
    """float32 [rows, columns]: `values` after the type's rounding, its blocks running on across rows where a row is no
    multiple of one.

    importance: float32 [columns].
    """
    rows, columns = values.shape
    block = gguf.GGML_QUANT_SIZES[qtype][0]
    together = math.lcm(columns, block) // columns  # rows laid end to end, the least that make whole blocks
    padded = np.zeros((-(-rows // together) * together, columns), np.float32)
    padded[:rows] = values
    data = ggml_quantize(padded.reshape(-1, together * columns), qtype, np.tile(importance, together), threads)
    return gguf.quants.dequantize(data, qtype).astype(np.float32, copy=False).reshape(-1, columns)[:rows]


def emulated_size(reference: Path, types: MatrixTypes, embedding: str, head: str) -> Emulated:
    """Size of the file with every matrix of the blocks at its type's nominal bits per weight, embedding and head as
    given.

    Raises TacqError for an embedding or head that does not fit its type.
    """
    register_with_gguf()
    reader, change, linear, linear_bytes, total = open_gguf(reference), 0.0, 0, 0.0, 0
    for tensor in reader.tensors:
        n = int(tensor.n_elements)
        total += n
        if tensor.name in types:
            block, size = gguf.GGML_QUANT_SIZES[types[tensor.name]]
            linear, linear_bytes = linear + n, linear_bytes + n * size / block
            change += n * size / block - int(tensor.n_bytes)
        elif (kind := _other_type(tensor, embedding, head)) is not None:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            change += n // block * size - int(tensor.n_bytes)
    file_bytes = round(Path(reference).stat().st_size + change)
    return Emulated(file_bytes, 8 * linear_bytes / linear, 8 * file_bytes / total)


def _other_type(tensor: gguf.gguf_reader.ReaderTensor, embedding: str, head: str) -> gguf.GGMLQuantizationType | None:
    """Type that the embedding or the head shall have; None for other tensors."""
    name = {"token_embd.weight": embedding, "output.weight": head}.get(tensor.name)
    if name is None:
        return None
    if name.upper() not in gguf.GGMLQuantizationType.__members__:
        raise TacqError(f"There is no type {name} for {tensor.name}; use one such as Q6_K, or tacq4.")
    qtype = gguf.GGMLQuantizationType[name.upper()]
    if int(tensor.shape[0]) % gguf.GGML_QUANT_SIZES[qtype][0]:
        raise TacqError(
            f"{tensor.name} has {int(tensor.shape[0])} columns, which {name.upper()} cannot hold; give an "
            "--embedding-type that can, such as q8_0."
        )
    return qtype


def write_emulated(
    reference: Path,
    imatrix: Path,
    types: MatrixTypes,
    outfile: Path,
    embedding: str,
    head: str,
    threads: int | None,
    reporter: Reporter,
) -> None:
    """F16 GGUF of the reference with every matrix of the blocks rounded as its type, embedding and head in the types of
    our file.

    Raises TacqError: a matrix of experts, one without importance in the imatrix, no space for the file.
    """
    register_with_gguf()
    threads = threads or usable_cpus()
    reader, importance = open_gguf(reference), imatrix_importance(imatrix)
    need_space(
        outfile.parent,
        1.1e-9 * Path(reference).stat().st_size,
        "the emulated file at F16",
        "give --workdir on a larger disk",
    )

    def rounded(tensor: gguf.gguf_reader.ReaderTensor) -> np.ndarray:
        values = rounded_as(tensor_values(tensor), types[tensor.name], importance[tensor.name], threads)
        return encode_as(values, "f16", tensor.name)

    def quantized(tensor: gguf.gguf_reader.ReaderTensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
        # As llama-quantize does it: the imatrix has no weights for them.
        return ggml_quantize(tensor_values(tensor), kind, None, threads)

    planned: list[PlannedTensor] = []
    for tensor in reader.tensors:
        other = _other_type(tensor, embedding, head)
        if tensor.name in types:
            if len(tensor.shape) != 2 or tensor.name not in importance:
                raise TacqError(
                    f"tensor '{tensor.name}' cannot be emulated: it has no row weights in {imatrix.name}; leave out "
                    "--emulate for this model."
                )
            planned.append(
                PlannedTensor(tensor.name, numpy_shape(tensor), gguf.GGMLQuantizationType.F16, partial(rounded, tensor))
            )
        elif other is not None and other.name not in _FLOATS:
            planned.append(
                PlannedTensor(
                    tensor.name,
                    numpy_shape(tensor),
                    other,
                    partial(quantized, tensor, other),
                )
            )
        else:
            planned.append(copied(tensor))
    write_gguf(outfile, reader, planned, {"general.file_type": 1}, reporter)
