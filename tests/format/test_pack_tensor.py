"""Whole tensors: base section and sparse section together."""

from __future__ import annotations

import numpy as np
import pytest
from random_tensors import random_tensor

from tacq_export.errors import TacqError
from tacq_export.format.block_codec import CODECS, level_indices
from tacq_export.format.pack_tensor import QuantizedTensor, dequantize, dequantize_tensor, pack_tensor, unpack_tensor
from tacq_export.format.sparse_section import unpack_sparse
from tacq_export.format.tensor_types import TYPES, TYPES_BY_NAME

ROWS, COLUMNS = 12, 1024


@pytest.mark.parametrize("t", TYPES, ids=lambda t: t.name)
def test_pack_and_unpack_are_inverses_of_the_right_size(t):
    before = random_tensor(np.random.default_rng(t.id), t, ROWS, COLUMNS)
    data = pack_tensor(before)
    assert data.dtype == np.uint8 and len(data) == ROWS * COLUMNS // 64 * ({2: 18, 3: 26, 4: 34}[t.bits] + t.p)
    after = unpack_tensor(t, data, ROWS, COLUMNS, "t")
    assert after.type is t and after.shape == (ROWS, COLUMNS)
    assert np.array_equal(before.codes, after.codes) and np.array_equal(before.scale_bytes, after.scale_bytes)
    assert (after.kept is None) == (t.p == 0)
    if t.p:
        assert after.kept.rows.tolist() == before.kept.rows.tolist()
        assert (
            after.kept.columns.tolist() == before.kept.columns.tolist()
            and after.kept.values.tolist() == before.kept.values.tolist()
        )
    assert np.array_equal(pack_tensor(after), data)


@pytest.mark.parametrize("t", TYPES, ids=lambda t: t.name)
def test_values_are_base_plus_kept_differences(t):
    """Naively, weight by weight, in float64: base values have 24 bits at most and the kept sum is rounded once to
    float32."""
    tensor = random_tensor(np.random.default_rng(t.id), t, ROWS, COLUMNS)
    codec = CODECS[t.bits]
    expected = np.zeros((ROWS, COLUMNS))
    for (row, i), index in np.ndenumerate(level_indices(t.bits, tensor.codes)):
        byte = tensor.scale_bytes[row, i // 32]
        expected[row, i] = float(codec.scale_of_byte[byte]) * codec.levels[index]
    if t.p:
        for row in range(ROWS):
            for at in range(tensor.kept.row_ptr[row], tensor.kept.row_ptr[row + 1]):
                expected[row, tensor.kept.columns[at]] += float(tensor.kept.values[at])
    values = dequantize(tensor)
    assert values.dtype == np.float32
    assert np.array_equal(values, expected.astype(np.float32))
    assert np.array_equal(dequantize_tensor(t, pack_tensor(tensor), ROWS, COLUMNS, "t"), values)


def test_the_base_section_of_a_mixed_tensor_is_the_base_tensor():
    """What lets a kernel use a mixed tensor's data pointer as a tensor of the base type."""
    mixed = random_tensor(np.random.default_rng(1), TYPES_BY_NAME["TACQ3_S6"], ROWS, COLUMNS)
    base = QuantizedTensor(TYPES_BY_NAME["TACQ3"], mixed.codes, mixed.scale_bytes)
    data, base_data = pack_tensor(mixed), pack_tensor(base)
    assert np.array_equal(data[: len(base_data)], base_data)
    assert unpack_sparse(data[len(base_data) :], ROWS, COLUMNS, "t").nnz == mixed.kept.nnz


@pytest.mark.parametrize("change", [-1, 1, -18])
def test_data_of_another_size_is_refused_by_name(change):
    t = TYPES_BY_NAME["TACQ2_S4"]
    data = pack_tensor(random_tensor(np.random.default_rng(2), t, ROWS, COLUMNS))
    wrong = np.resize(data, len(data) + change)
    with pytest.raises(
        TacqError,
        match=rf"tensor 'blk.0': {len(wrong)} bytes of TACQ2_S4 do not hold 12 x 1024 weights \({len(data)} bytes "
        rf"expected\)",
    ):
        unpack_tensor(t, wrong, ROWS, COLUMNS, "blk.0")


def test_a_width_that_blocks_do_not_divide_is_refused():
    t = TYPES_BY_NAME["TACQ2"]
    with pytest.raises(TacqError, match="tensor 'w': .* do not hold 2 x 96"):
        unpack_tensor(t, np.zeros(t.nbytes(192), np.uint8), 2, 96, "w")


def test_damage_in_the_sparse_section_is_refused_by_name():
    t = TYPES_BY_NAME["TACQ4_S8"]
    data = pack_tensor(random_tensor(np.random.default_rng(3), t, ROWS, COLUMNS))
    data[ROWS * COLUMNS // 64 * 34] ^= 0xFF
    with pytest.raises(TacqError, match="tensor 'w': sparse section has magic"):
        unpack_tensor(t, data, ROWS, COLUMNS, "w")


def test_kept_weights_and_type_must_go_together():
    mixed = random_tensor(np.random.default_rng(4), TYPES_BY_NAME["TACQ2_S8"], ROWS, COLUMNS)
    with pytest.raises(ValueError, match="TACQ2 and kept weights do not go together"):
        pack_tensor(QuantizedTensor(TYPES_BY_NAME["TACQ2"], mixed.codes, mixed.scale_bytes, mixed.kept))
    with pytest.raises(ValueError, match="TACQ2_S8 and kept weights do not go together"):
        pack_tensor(QuantizedTensor(mixed.type, mixed.codes, mixed.scale_bytes))
