"""GGUF files: copies that keep everything, outputs that are whole or not there, and sources that are damaged."""

from __future__ import annotations

import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_model import write_tiny_model

from tacq_export.errors import TacqError
from tacq_export.files import written_atomically
from tacq_export.format.gguf_file import field_value, numpy_shape, open_gguf, tensor_values
from tacq_export.format.pack_tensor import dequantize_tensor
from tacq_export.format.tensor_types import TYPES_BY_ID, register_with_gguf, tensor_type
from tacq_export.format.write_gguf import PlannedTensor, copied, dequantize_gguf, encode_as, write_gguf
from tacq_export.reporting import Reporter

V = gguf.GGUFValueType
SCALARS = {
    "a.uint8": (V.UINT8, 255),
    "a.int8": (V.INT8, -128),
    "a.uint16": (V.UINT16, 65535),
    "a.int16": (V.INT16, -32768),
    "a.uint32": (V.UINT32, 2**32 - 1),
    "a.int32": (V.INT32, -(2**31)),
    "a.uint64": (V.UINT64, 2**64 - 1),
    "a.int64": (V.INT64, -(2**63)),
    "a.float32": (V.FLOAT32, 0.1),
    "a.float64": (V.FLOAT64, 0.1),
    "a.bool": (V.BOOL, True),
    "a.string": (V.STRING, "grüße \n 日本 \U0001f600"),
    "a.empty string": (V.STRING, ""),
}
ARRAYS = {
    "b.strings": (V.STRING, ["a", "", "▁the", "é\n"]),
    "b.floats": (V.FLOAT32, [0.1, -0.0, 3e38]),
    "b.ints": (V.INT32, [-1, 2**31 - 1]),
    "b.uint8": (V.UINT8, [0, 255]),
    "b.bools": (V.BOOL, [True, False]),
    "b.uint64": (V.UINT64, [2**64 - 1]),
    "b.one": (V.UINT32, [7]),
}


def write_source(path: Path, alignment: int | None = None) -> Path:
    """Every kind of metadata, and tensors of several types and ranks, some of odd sizes."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in SCALARS.items():
        writer.add_key_value(key, value, kind)
    for key, (kind, values) in ARRAYS.items():
        writer.add_key_value(key, values, V.ARRAY, sub_type=kind)
    writer.add_tensor("f32", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("f16", rng.normal(size=(3, 64)).astype(np.float16))
    writer.add_tensor("one", np.ones(1, np.float32))
    writer.add_tensor("i32", np.arange(7, dtype=np.int32))
    q8 = gguf.quants.quantize(rng.normal(size=(2, 96)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q8_0", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("experts", rng.normal(size=(2, 3, 64)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def content(path: Path) -> tuple[dict, dict]:
    """({key: (types, value, bytes of every part of the value)}, {tensor: (type, shape, bytes)}) with plain gguf-py."""
    reader = gguf.GGUFReader(path)
    fields = {
        f.name: (f.types, f.contents(), b"".join(part.tobytes() for part in f.parts[3:]))
        for f in reader.fields.values()
        if not f.name.startswith("GGUF.")
    }
    return fields, {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


def copy(source: Path, outfile: Path, keys: dict | None = None, **options) -> None:
    reader = open_gguf(source)
    write_gguf(outfile, reader, [copied(t) for t in reader.tensors], keys or {}, Reporter(), **options)


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_a_copy_keeps_every_key_and_tensor_bit_for_bit(tmp_path, alignment):
    copy(write_source(tmp_path / "a.gguf", alignment), tmp_path / "b.gguf")
    before, after = content(tmp_path / "a.gguf"), content(tmp_path / "b.gguf")
    assert {**SCALARS, **ARRAYS}.keys() <= before[0].keys()
    assert before == after
    assert list(before[1]) == list(after[1]), "tensors change their order"
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    assert all(t.data_offset % (alignment or 32) == 0 for t in reader.tensors), "llama.cpp refuses such a file"


def test_strings_that_are_no_utf8_are_kept_and_empty_arrays_do_no_harm(tmp_path):
    """As in the token lists of some models; written here byte by byte, since gguf-py writes neither."""
    strings = [b"\xff\xfe half", b"\xe2\x96"]
    key = lambda name: struct.pack("<Q", len(name)) + name  # noqa: E731
    body = (
        key(b"general.architecture")
        + struct.pack("<I", 8)
        + key(b"llama")
        + key(b"tokens")
        + struct.pack("<IIQ", 9, 8, 2)
        + b"".join(map(key, strings))
    )
    body += key(b"empty") + struct.pack("<IIQ", 9, 8, 0) + key(b"raw") + struct.pack("<I", 8) + key(strings[0])
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 4) + body + bytes(-(24 + len(body)) % 32))
    copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    fields = gguf.GGUFReader(tmp_path / "b.gguf").fields
    assert [bytes(fields["tokens"].parts[i]) for i in fields["tokens"].data] == strings
    assert bytes(fields["raw"].parts[-1]) == strings[0] and "empty" not in fields


def test_a_copy_of_a_copy_is_the_same_file(tmp_path):
    copy(write_source(tmp_path / "a.gguf"), tmp_path / "b.gguf")
    copy(tmp_path / "b.gguf", tmp_path / "c.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_the_tokenizer_of_a_converted_model_is_kept(tiny_gguf, tmp_path):
    copy(tiny_gguf, tmp_path / "b.gguf")
    assert content(tiny_gguf) == content(tmp_path / "b.gguf")
    assert any(key.startswith("tokenizer.ggml.tokens") for key in content(tiny_gguf)[0])


def test_keys_are_replaced_added_and_dropped(tmp_path):
    write_source(tmp_path / "a.gguf")
    copy(
        tmp_path / "a.gguf",
        tmp_path / "b.gguf",
        {"a.string": "new", "tacq.ratio": 0.25, "tacq.n_samples": 7},
        dropped_prefixes=("b.",),
    )
    before, after = content(tmp_path / "a.gguf")[0], content(tmp_path / "b.gguf")[0]
    assert after.pop("a.string")[:2] == ([V.STRING], "new")
    assert after.pop("tacq.ratio")[:2] == ([V.FLOAT32], 0.25) and after.pop("tacq.n_samples")[:2] == ([V.UINT32], 7)
    assert after == {k: v for k, v in before.items() if not k.startswith("b.") and k != "a.string"}


# -- whole or not there
# ----------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_no_file_and_is_one_sentence(tmp_path, monkeypatch):
    write_source(tmp_path / "a.gguf")
    reader = open_gguf(tmp_path / "a.gguf")

    def full(*_):
        raise OSError(28, "No space left on device")

    planned = [copied(t) for t in reader.tensors]
    planned[3] = PlannedTensor("i32", planned[3].shape, planned[3].type, full)
    with pytest.raises(
        TacqError,
        match=r"Could not write .*b.gguf \(No space left on device\); free some space or give another --outfile.",
    ):
        write_gguf(tmp_path / "b.gguf", reader, planned, {}, Reporter())
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_any_other_end_leaves_the_earlier_file_untouched(tmp_path, error):
    (tmp_path / "out").write_text("earlier")
    with pytest.raises(error), written_atomically(tmp_path / "out") as partial:
        partial.write_text("half")
        raise error
    assert (tmp_path / "out").read_text() == "earlier" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_size_limit_in_another_process_leaves_no_file(tiny_gguf, tmp_path):
    """The system's own refusal (EFBIG, as ENOSPC on a full disk), through the command line."""
    limit = tiny_gguf.stat().st_size // 2
    done = subprocess.run(
        [sys.executable, "-m", "tacq_export", "dequantize", tiny_gguf, "--outfile", tmp_path / "big.gguf"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith(f"error: Could not write {tmp_path}/big.gguf (")
        and "Traceback" not in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    write_source(tmp_path / "a.gguf")
    with pytest.raises(TacqError, match="Could not write .*gone/b.gguf"):
        copy(tmp_path / "a.gguf", tmp_path / "gone" / "b.gguf")


# -- damaged sources
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, share):
    good = write_source(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(good[: int(len(good) * share)])
    with pytest.raises(TacqError, match="short.gguf is not a GGUF file, or is damaged or cut off"):
        open_gguf(tmp_path / "short.gguf")


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04" + bytes(100), b"\x00" * 1000, b"GGUF", b"GGUF" + struct.pack("<I", 99) + bytes(100), b"{}"]
)
def test_files_of_other_kinds_are_refused(tmp_path, data):
    (tmp_path / "other.gguf").write_bytes(data)
    with pytest.raises(TacqError, match="other.gguf is not a GGUF file"):
        open_gguf(tmp_path / "other.gguf")


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "gone.gguf", tmp_path):
        with pytest.raises(TacqError, match=f"There is no file {path}; give the path of a GGUF."):
            open_gguf(path)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (1, "has tacq.format_version 1, which this program does not read any more; export it again."),
        (3, "has tacq.format_version 3 and this program reads version 2; upgrade tacq-export."),
    ],
)
def test_another_format_version_is_refused(tmp_path, version, words):
    write_tiny_model(tmp_path / "other.gguf", tensor_type("tacq2"), format_version=version)
    with pytest.raises(TacqError, match=words):
        open_gguf(tmp_path / "other.gguf")


def test_a_type_id_that_is_a_hole_is_refused(tmp_path):
    write_tiny_model(tmp_path / "a.gguf", tensor_type("tacq2"))
    data = (tmp_path / "a.gguf").read_bytes()
    for type_id in (43, 511, 515, 544, 0xFFFFFFFF):
        at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
        assert struct.unpack_from("<I", data, at) == (512,)
        (tmp_path / "hole.gguf").write_bytes(data[:at] + struct.pack("<I", type_id) + data[at + 4 :])
        with pytest.raises(TacqError, match="hole.gguf is not a GGUF file, or is damaged"):
            open_gguf(tmp_path / "hole.gguf")


def test_an_array_longer_than_the_file_ends_at_once(tmp_path):
    """A hostile length must not be looped over: 2^60 numbers that are not there."""
    body = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**60)
    (tmp_path / "long.gguf").write_bytes(body)
    script = (
        "import sys\nfrom tacq_export.format.gguf_file import open_gguf\nfrom tacq_export.errors import TacqError\n"
    )
    script += "try:\n    open_gguf(sys.argv[1])\nexcept TacqError as error:\n    print(error)\n"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "long.gguf"],
        capture_output=True,
        text=True,
        timeout=20,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert "is not a GGUF file, or is damaged" in done.stdout, done.stderr[-500:]


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bytes_give_a_sentence_or_a_file_that_reads(tmp_path, seed):
    """100 files with one to four bytes changed in the part before the tensors' data: TacqError or nothing."""
    write_tiny_model(tmp_path / "a.gguf", tensor_type("tacq2_s4"))
    good = (tmp_path / "a.gguf").read_bytes()
    rng = random.Random(seed)
    begin = open_gguf(tmp_path / "a.gguf").data_offset
    small = [i for i in range(begin) if not good[i - 60 : i + 60].count(b"<0x")]  # not inside the list of tokens
    refused = 0
    for _ in range(100):
        changed = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            changed[rng.choice(small)] = rng.randrange(256)
        (tmp_path / "b.gguf").write_bytes(changed)
        try:
            for tensor in open_gguf(tmp_path / "b.gguf").tensors[:3]:
                assert tensor_values(tensor).shape == numpy_shape(tensor)
        except TacqError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10


# -- values
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tacq2", "tacq3_s4", "tacq4_s16"])
@pytest.mark.parametrize("outtype", ["f16", "f32", "q8_0"])
def test_a_dequantized_file_is_stock_and_holds_the_decoded_values(tmp_path, name, outtype):
    """Read with gguf-py alone; expected from the packed bytes and gguf-py's own quantizer."""
    write_tiny_model(tmp_path / "ours.gguf", tensor_type(name))
    dequantize_gguf(tmp_path / "ours.gguf", tmp_path / "stock.gguf", outtype, Reporter())
    qtype = gguf.GGMLQuantizationType[outtype.upper()]
    stock = {t.name: t for t in gguf.GGUFReader(tmp_path / "stock.gguf").tensors}
    register_with_gguf()
    source = gguf.GGUFReader(tmp_path / "ours.gguf")
    assert list(stock) == [t.name for t in source.tensors]
    for tensor in source.tensors:
        found = stock[tensor.name]
        assert found.shape.tolist() == tensor.shape.tolist()
        ours = TYPES_BY_ID.get(int(tensor.tensor_type))
        if ours is None:
            assert found.tensor_type == tensor.tensor_type and np.array_equal(found.data, tensor.data)
            continue
        columns, rows = tensor.shape.tolist()
        values = dequantize_tensor(ours, tensor.data.reshape(-1).view(np.uint8), rows, columns, tensor.name)
        assert found.tensor_type == qtype
        expected = (
            values
            if outtype == "f32"
            else values.astype(np.float16)
            if outtype == "f16"
            else gguf.quants.quantize(values, qtype)
        )
        assert found.data.tobytes() == expected.tobytes()
    fields = gguf.GGUFReader(tmp_path / "stock.gguf").fields
    assert not any(key.startswith("tacq.") for key in fields), "a stock file must not say that it is one of ours"
    assert fields["general.file_type"].contents() == {"f32": 0, "f16": 1, "q8_0": 7}[outtype]


def test_widths_that_a_stock_block_does_not_divide_fall_back_to_f16(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("odd", np.ones((2, 80), np.float16))
    writer.add_tensor("even", np.ones((2, 96), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    dequantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0", Reporter())
    assert {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors} == {
        "odd": "F16",
        "even": "Q8_0",
    }


@pytest.mark.parametrize("bad", [1e6, np.nan, np.inf])
def test_values_beyond_f16_are_refused_by_name(bad):
    values = np.ones((2, 64), np.float32)
    values[1, 1] = bad
    with pytest.raises(
        TacqError, match="tensor 'blk.0.ffn_up.weight': has NaN, Inf, or values beyond the range of F16"
    ):
        encode_as(values, "f16", "blk.0.ffn_up.weight")


def test_a_block_that_does_not_fit_is_refused_by_name():
    with pytest.raises(TacqError, match="tensor 'w': 80 columns are not a multiple of q8_0's block; use f16 for it."):
        encode_as(np.ones((2, 80), np.float32), "q8_0", "w")


def test_values_of_stock_tensors_are_gguf_pys(tmp_path):
    reader = open_gguf(write_source(tmp_path / "a.gguf"))
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "I32":
            continue
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = tensor_values(tensor)
        assert found.dtype == np.float32 and np.array_equal(found, expected.reshape(numpy_shape(tensor)))
    assert field_value(reader, "a.string") == SCALARS["a.string"][1] and field_value(reader, "gone") is None


def test_experts_of_three_dimensions_are_decoded_as_rows_of_all_experts(tmp_path):
    """A mixed tensor of rank 3: its rows are those of all experts one after the other."""
    from random_tensors import random_tensor

    from tacq_export.format.pack_tensor import dequantize, pack_tensor

    t = tensor_type("tacq2_s8")
    tensor = random_tensor(np.random.default_rng(0), t, 6, 512)
    register_with_gguf()
    writer = gguf.GGUFWriter(tmp_path / "experts.gguf", "llama")
    writer.add_tensor("exps", pack_tensor(tensor).reshape(2, 3, -1), raw_dtype=gguf.GGMLQuantizationType(t.id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "experts.gguf").tensors[0]
    assert np.array_equal(tensor_values(found), dequantize(tensor).reshape(2, 3, 512))
