"""Names, ids and sizes of the tensor types: the numbers of DESIGN section 3, written out."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest

from tacq_export.errors import TacqError
from tacq_export.format.tensor_types import TYPES, TYPES_BY_ID, TYPES_BY_NAME, register_with_gguf, tensor_type
from tacq_export.runtime.source import cpp_ext_dir

DENSITIES = (1, 2, 3, 4, 6, 8, 12, 16)
BASE_BYTES = {2: 18, 3: 26, 4: 34}


def test_there_are_three_base_and_twenty_four_mixed_types_with_fixed_ids():
    expected = {"TACQ2": 512, "TACQ3": 513, "TACQ4": 514}
    for bits, first in ((2, 520), (3, 528), (4, 536)):
        expected |= {f"TACQ{bits}_S{p}": first + i for i, p in enumerate(DENSITIES)}
    assert {t.name: t.id for t in TYPES} == expected
    assert {i: t.name for i, t in TYPES_BY_ID.items()} == {i: n for n, i in expected.items()}


def test_ids_are_those_of_the_enum_in_ggml_h():
    """call_sites.py holds the C side: `NAME = id` starts a run of ids that count up."""
    text = (cpp_ext_dir() / "call_sites.py").read_text()
    enum, following = {}, None
    for name, value in re.findall(
        r"GGML_TYPE_(TACQ\d(?:_S\d+)?)\s*(?:=\s*(\d+))?,", text[: text.index("GGML_TYPE_COUNT     =")]
    ):
        following = int(value) if value else following + 1
        enum[name] = following
    assert enum == {t.name: t.id for t in TYPES}


@pytest.mark.parametrize("t", TYPES, ids=lambda t: t.name)
def test_sizes(t):
    assert t.base_bytes == BASE_BYTES[t.bits]
    assert t.type_size == BASE_BYTES[t.bits] + t.p
    assert t.bits_per_weight == {2: 2.25, 3: 3.25, 4: 4.25}[t.bits] + 0.125 * t.p
    assert t.nbytes(64 * 7) == 7 * t.type_size
    assert t.base.name == f"TACQ{t.bits}" and t.base.p == 0
    assert t.base.with_density(t.p) is t


def test_names_are_found_in_any_case_and_others_are_refused_with_the_list():
    assert tensor_type("tacq3_s12") is tensor_type("TACQ3_S12") is TYPES_BY_NAME["TACQ3_S12"]
    for wrong in ("tacq5", "q4_0", "tacq2_s5", "", "512"):
        with pytest.raises(TacqError, match=f"unknown tensor type '{wrong}': use one of tacq2, ") as error:
            tensor_type(wrong)
        assert "tacq4_s16" in str(error.value)


def test_gguf_py_writes_and_reads_our_types_after_registration(tmp_path):
    register_with_gguf()
    register_with_gguf()  # safe to repeat
    rng = np.random.default_rng(0)
    data = {t.name: rng.integers(0, 256, (3, 2 * t.type_size), dtype=np.uint8) for t in TYPES}
    writer = gguf.GGUFWriter(tmp_path / "types.gguf", "llama")
    for t in TYPES:
        writer.add_tensor(t.name, data[t.name], raw_dtype=gguf.GGMLQuantizationType(t.id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "types.gguf").tensors}
    for t in TYPES:
        found = tensors[t.name]
        assert (found.tensor_type.name, int(found.tensor_type)) == (t.name, t.id)
        assert found.shape.tolist() == [128, 3] and found.n_bytes == t.nbytes(3 * 128)
        assert np.array_equal(found.data, data[t.name])
