"""The sparse section: bytes written out with struct, and everything that a hostile file can say in it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from random_tensors import random_kept

from tacq_export.errors import TacqError
from tacq_export.format.sparse_section import KeptWeights, capacity, pack_sparse, section_bytes, unpack_sparse
from tacq_export.format.tensor_types import SPARSE_DENSITIES

ROWS, COLUMNS, P = 5, 128, 16
N = ROWS * COLUMNS
# (row, column, value); row 1 and 3 keep nothing.
ENTRIES = [(0, 0, 0.5), (0, 127, -0.25), (2, 3, 1.0), (2, 4, -2.0), (2, 100, 0.125), (4, 64, 6e-8)]


def kept() -> KeptWeights:
    return KeptWeights(
        np.array([0, 2, 2, 5, 5, 6], np.uint32),
        np.array([c for _, c, _ in ENTRIES], np.uint16),
        np.array([v for _, _, v in ENTRIES], np.float16),
    )


def expected_bytes() -> bytes:
    body = struct.pack("<4sHHII", b"TCQS", 1, 0, ROWS, len(ENTRIES)) + struct.pack("<6I", 0, 2, 2, 5, 5, 6)
    body += struct.pack("<6H", *(c for _, c, _ in ENTRIES)) + struct.pack("<6e", *(v for _, _, v in ENTRIES))
    return body + bytes(N // 64 * P - len(body))


def test_bytes_are_header_row_pointers_columns_values_and_zeros():
    assert pack_sparse(kept(), N, P).tobytes() == expected_bytes()


def test_unpack_reads_them_back():
    back = unpack_sparse(np.frombuffer(expected_bytes(), np.uint8), ROWS, COLUMNS, "t")
    assert list(zip(back.rows.tolist(), back.columns.tolist(), back.values.tolist(), strict=False)) == [
        (r, c, float(np.float16(v))) for r, c, v in ENTRIES
    ]
    assert back.nnz == 6


@pytest.mark.parametrize("p", SPARSE_DENSITIES)
def test_pack_and_unpack_are_inverses_at_full_capacity(p):
    rows, columns = 24, 1024
    before = random_kept(np.random.default_rng(p), rows, columns, p)
    after = unpack_sparse(pack_sparse(before, rows * columns, p), rows, columns, "t")
    assert before.nnz > 0
    for field in ("row_ptr", "columns", "values"):
        assert np.array_equal(getattr(before, field), getattr(after, field)), field


def test_a_section_that_keeps_nothing_is_legal():
    nothing = KeptWeights(np.zeros(ROWS + 1, np.uint32), np.empty(0, np.uint16), np.empty(0, np.float16))
    assert unpack_sparse(pack_sparse(nothing, N, P), ROWS, COLUMNS, "t").nnz == 0


@pytest.mark.parametrize("p", SPARSE_DENSITIES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (4, 64), (576, 576), (1536, 576), (4864, 896), (100, 65536)])
def test_capacity_is_what_is_left_of_the_section_over_four_bytes_a_weight(rows, columns, p):
    size = rows * columns * p // 64
    assert section_bytes(rows * columns, p) == size
    free = size - 16 - 4 * (rows + 1)
    assert capacity(rows, rows * columns, p) == (free // 4 if free >= 0 else -1)


def test_one_weight_more_than_the_capacity_does_not_fit():
    room = capacity(ROWS, N, 12)  # 120 bytes: 16 header, 24 row pointers, 20 weights
    assert room == 20
    for count in (room, room + 1):
        many = KeptWeights(
            np.array([0, *[count] * ROWS], np.uint32), np.arange(count, dtype=np.uint16), np.ones(count, np.float16)
        )
        if count == room:
            assert unpack_sparse(pack_sparse(many, N, 12), ROWS, COLUMNS, "t").nnz == room
        else:
            with pytest.raises(ValueError, match="21 kept weights do not fit a section with room for 20"):
                pack_sparse(many, N, 12)


ROW_PTR, COLUMN = 16, 16 + 4 * (ROWS + 1)
VALUE = COLUMN + 2 * len(ENTRIES)
HOSTILE = {
    "magic": (0, "<I", 0xDEADBEEF, "magic 0xdeadbeef, expected 0x53514354"),
    "newer version": (4, "<H", 2, "version 2 is newer than this program's 1; upgrade"),
    "version 0": (4, "<H", 0, "version 0 and flags 0"),
    "flags": (6, "<H", 1, "version 1 and flags 1"),
    "one row more": (8, "<I", ROWS + 1, "has 6 rows, expected 5"),
    "most rows": (8, "<I", 0xFFFFFFFF, "has 4294967295 rows, expected 5"),
    "no rows": (8, "<I", 0, "has 0 rows, expected 5"),
    "one weight more": (12, "<I", 7, "row pointers run from 0 to 6, expected 0 to 7"),
    "one more than fits": (12, "<I", 31, "31 kept weights do not fit a sparse section of 160 bytes"),
    "most weights": (12, "<I", 0xFFFFFFFF, "4294967295 kept weights do not fit"),
    "no weights": (12, "<I", 0, "row pointers run from 0 to 6, expected 0 to 0"),
    "first row pointer": (ROW_PTR, "<I", 1, "row pointers run from 1 to 6"),
    "last row pointer": (ROW_PTR + 4 * ROWS, "<I", 5, "row pointers run from 0 to 5"),
    "row pointer decreases": (ROW_PTR + 8, "<I", 1, "row pointers decrease at row 1"),
    "row pointer far outside": (ROW_PTR + 4, "<I", 0xFFFFFFF0, "row pointers decrease at row 1"),
    "column out of range": (COLUMN + 10, "<H", COLUMNS, "column index 128 is out of range, the tensor has 128 columns"),
    "largest column": (COLUMN, "<H", 0xFFFF, "column index 65535 is out of range"),
    "columns descend": (COLUMN + 2 * 3, "<H", 2, "do not ascend within a row"),
    "column twice": (COLUMN + 2 * 3, "<H", 3, "do not ascend within a row"),
    "first row descends": (COLUMN + 2, "<H", 0, "do not ascend within a row"),
    "NaN": (VALUE, "<H", 0x7E00, "a kept value is NaN or Inf"),
    "Inf": (VALUE + 10, "<H", 0xFC00, "a kept value is NaN or Inf"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_sections_are_refused_by_name(what):
    at, form, value, message = HOSTILE[what]
    content = bytearray(expected_bytes())
    struct.pack_into(form, content, at, value)
    with pytest.raises(TacqError) as error:
        unpack_sparse(np.frombuffer(bytes(content), np.uint8), ROWS, COLUMNS, "blk.7.ffn_up.weight")
    assert str(error.value).startswith("tensor 'blk.7.ffn_up.weight': ")
    assert message in str(error.value)


@pytest.mark.parametrize("size", [0, 15, 16, 39])
def test_sections_too_small_for_their_row_pointers_are_refused(size):
    with pytest.raises(TacqError, match=f"tensor 't': sparse section of {size} bytes is too small for {ROWS} rows"):
        unpack_sparse(np.frombuffer(expected_bytes()[:size], np.uint8), ROWS, COLUMNS, "t")


def test_columns_may_start_anew_in_every_row():
    """The ascent is checked within rows only: the first column of a row may be below the last of the row before."""
    back = unpack_sparse(np.frombuffer(expected_bytes(), np.uint8), ROWS, COLUMNS, "t")
    assert back.columns.tolist()[1:3] == [127, 3]


def test_no_flipped_bit_is_read_past_the_section():
    """Every single-bit error is either refused by name or decodes to indices inside the tensor."""
    good = expected_bytes()
    refused = 0
    for bit in range(8 * (VALUE + 2 * len(ENTRIES))):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        try:
            back = unpack_sparse(np.frombuffer(bytes(content), np.uint8), ROWS, COLUMNS, "t")
        except TacqError as error:
            assert "'t'" in str(error)
            refused += 1
        else:
            assert back.rows.max() < ROWS and back.columns.max() < COLUMNS and np.isfinite(back.values).all()
    assert refused > 8 * COLUMN / 2, "the header and the row pointers are hardly checked"
