"""The sparse section of a mixed tensor: which weights are kept, and by how much each differs from its base value.

Little endian: a 16-byte header (u32 magic, u16 version, u16 flags, u32 n_rows, u32 nnz), u32 row_ptr[n_rows + 1],
u16 column[nnz], f16 value[nnz], zero padding to the section's size. Rows in order, columns strictly ascending in a row.
`pack_sparse` and `unpack_sparse` are inverses; `unpack_sparse` trusts nothing that it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import TacqError
from .tensor_types import BLOCK_SIZE

MAGIC = 0x53514354  # "TCQS"
VERSION = 1
HEADER_BYTES = 16
ENTRY_BYTES = 4
MOST_COLUMNS = 1 << 16  # column indices have 16 bits
_HEADER = np.dtype([("magic", "<u4"), ("version", "<u2"), ("flags", "<u2"), ("n_rows", "<u4"), ("nnz", "<u4")])


@dataclass(frozen=True)
class KeptWeights:
    """Kept weights of one tensor in CSR form.

    row_ptr: uint32 [n_rows + 1]; columns: uint16 [nnz], ascending in each row; values: float16 [nnz], the difference of
    the weight to its base value.
    """

    row_ptr: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    @property
    def nnz(self) -> int:
        return len(self.columns)

    @property
    def rows(self) -> np.ndarray:
        """int64 [nnz]: the row of every kept weight."""
        counts: np.ndarray = np.diff(self.row_ptr.astype(np.int64))
        return np.repeat(np.arange(len(self.row_ptr) - 1), counts)


def section_bytes(n_weights: int, p: int) -> int:
    """Size of the sparse section, in bytes, of a tensor of `n_weights` weights."""
    return n_weights // BLOCK_SIZE * p


def capacity(n_rows: int, n_weights: int, p: int) -> int:
    """How many weights a sparse section can keep; negative when not even its row pointers fit."""
    room = section_bytes(n_weights, p) - HEADER_BYTES - 4 * (n_rows + 1)
    return room // ENTRY_BYTES if room >= 0 else -1


def pack_sparse(kept: KeptWeights, n_weights: int, p: int) -> np.ndarray:
    """uint8 [section_bytes(n_weights, p)]. Raises ValueError when the kept weights do not fit."""
    n_rows = len(kept.row_ptr) - 1
    if kept.nnz > capacity(n_rows, n_weights, p):
        raise ValueError(f"{kept.nnz} kept weights do not fit a section with room for {capacity(n_rows, n_weights, p)}")
    header = np.zeros(1, dtype=_HEADER)
    header[0] = (MAGIC, VERSION, 0, n_rows, kept.nnz)
    parts = [header, kept.row_ptr.astype("<u4"), kept.columns.astype("<u2"), kept.values.astype("<f2")]
    body = np.concatenate([part.view(np.uint8) for part in parts])
    return np.concatenate([body, np.zeros(section_bytes(n_weights, p) - len(body), dtype=np.uint8)])


def unpack_sparse(section: np.ndarray, n_rows: int, n_columns: int, name: str) -> KeptWeights:
    """Read and check a sparse section (uint8 [bytes]) of the tensor `name` with `n_rows` rows of `n_columns` weights.

    Raises TacqError, naming the tensor and what is wrong, for anything that a correct writer cannot have written: the
    same checks as `tacq_validate_section` in cpp_ext/tacq-validate.c.
    """

    def fail(what: str) -> None:
        raise TacqError(
            f"tensor '{name}': {what}; the file is damaged or was not written by tacq-export, export it again"
        )

    if len(section) < HEADER_BYTES + 4 * (n_rows + 1):
        fail(f"sparse section of {len(section)} bytes is too small for {n_rows} rows")
    header = section[:HEADER_BYTES].view(_HEADER)[0]
    if header["magic"] != MAGIC:
        fail(f"sparse section has magic 0x{int(header['magic']):08x}, expected 0x{MAGIC:08x}")
    if header["version"] > VERSION:
        raise TacqError(
            f"tensor '{name}': sparse section version {header['version']} is newer than this program's {VERSION}; "
            "upgrade tacq-export"
        )
    if header["version"] != VERSION or header["flags"] != 0:
        fail(f"sparse section has version {header['version']} and flags {header['flags']}, expected {VERSION} and 0")
    if header["n_rows"] != n_rows:
        fail(f"sparse section has {header['n_rows']} rows, expected {n_rows}")
    nnz = int(header["nnz"])
    columns_at = HEADER_BYTES + 4 * (n_rows + 1)
    if columns_at + ENTRY_BYTES * nnz > len(section):
        fail(f"{nnz} kept weights do not fit a sparse section of {len(section)} bytes")
    row_ptr = section[HEADER_BYTES:columns_at].view("<u4")
    if row_ptr[0] != 0 or row_ptr[-1] != nnz:
        fail(f"row pointers run from {row_ptr[0]} to {row_ptr[-1]}, expected 0 to {nnz}")
    if (row_ptr[1:] < row_ptr[:-1]).any():
        fail(f"row pointers decrease at row {int(np.argmax(row_ptr[1:] < row_ptr[:-1]))}")
    columns = section[columns_at : columns_at + 2 * nnz].view("<u2")
    values = section[columns_at + 2 * nnz : columns_at + 4 * nnz].view("<f2")
    if nnz and int(columns.max()) >= n_columns:
        fail(f"column index {int(columns.max())} is out of range, the tensor has {n_columns} columns")
    same_row = np.ones(max(nnz - 1, 0), dtype=bool)
    starts = row_ptr[1:-1].astype(np.int64)
    same_row[starts[(starts > 0) & (starts < nnz)] - 1] = False
    if (same_row & (columns[1:] <= columns[:-1])).any():
        fail("column indices do not ascend within a row")
    if not np.isfinite(values).all():
        fail("a kept value is NaN or Inf")
    return KeptWeights(row_ptr, columns, values)
