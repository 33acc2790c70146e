"""A GGUF in several parts is one model: the export of its parts is the export of the whole, byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from tacq_export import ExportConfig, export
from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import field_value, open_gguf, raw_bytes
from tacq_export.inputs.make_reference import make_reference
from tacq_export.reporting import Reporter
from tacq_export.workdir import _identity


def split(source: Path, folder: Path, count: int) -> list[Path]:
    """Parts as llama-gguf-split writes them: the metadata in the first, `split.*` in each."""
    folder.mkdir(exist_ok=True)
    reader = gguf.GGUFReader(source)
    size = -(-len(reader.tensors) // count)
    paths = [folder / f"model-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for field in reader.fields.values() if number == 0 else []:
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
        for tensor in reader.tensors[number * size : (number + 1) * size]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.fixture
def parts(tiny_gguf, tmp_path):
    return split(tiny_gguf, tmp_path / "parts", 3)


def tensors_of(path: Path) -> dict[str, bytes]:
    return {tensor.name: raw_bytes(tensor).tobytes() for tensor in open_gguf(path).tensors}


@pytest.mark.parametrize("given", [0, 1])
def test_any_part_gives_the_tensors_and_keys_of_all(tiny_gguf, parts, given):
    whole, reader = open_gguf(tiny_gguf), open_gguf(parts[given])
    assert [t.name for t in reader.tensors] == [t.name for t in whole.tensors]
    for mine, theirs in zip(reader.tensors, whole.tensors, strict=True):
        assert np.array_equal(raw_bytes(mine), raw_bytes(theirs)), mine.name
    keys = lambda r: {name for name in r.fields if not name.startswith("GGUF.")}  # noqa: E731
    assert keys(reader) == keys(whole)


def test_the_export_of_the_parts_is_that_of_the_whole(tiny_gguf, parts, tiny_task, tmp_path):
    for name, model in (("whole", tiny_gguf), ("parts", parts[0]), ("second", parts[1])):
        export(
            ExportConfig(model=model, task=tiny_task, outfile=tmp_path / f"{name}.gguf", target_bpw=3.5, n_samples=4)
        )
    whole = tensors_of(tmp_path / "whole.gguf")
    assert len(whole) == len(open_gguf(tiny_gguf).tensors)
    assert tensors_of(tmp_path / "parts.gguf") == whole == tensors_of(tmp_path / "second.gguf")
    assert not any(name.startswith("split.") for name in open_gguf(tmp_path / "parts.gguf").fields)


def test_a_reference_is_made_of_all_parts(tiny_gguf, parts, tmp_path):
    make_reference(str(parts[2]), tmp_path / "reference.gguf", Reporter())
    assert tensors_of(tmp_path / "reference.gguf") == tensors_of(tiny_gguf)


def refused(path: Path) -> str:
    with pytest.raises(TacqError) as error:
        open_gguf(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_part_is_named(parts):
    parts[1].unlink()
    assert "is one of 3 parts of a split GGUF, and model-00002-of-00003.gguf is not beside it" in refused(parts[0])
    parts[2].unlink()
    assert "model-00002-of-00003.gguf, model-00003-of-00003.gguf are not beside it" in refused(parts[0])


def test_parts_with_other_names_or_of_other_models(parts, tiny_gguf, tmp_path):
    renamed = parts[0].with_name("first.gguf")
    shutil.copy(parts[0], renamed)
    assert "its name does not say where the others are; give all parts the names that they had" in refused(renamed)
    second = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    assert "says that it is part 2 of 3, counted from 0, and its name that it is 1 of 3" in refused(parts[0])
    parts[1].write_bytes(second)
    other = split(tiny_gguf, tmp_path / "other", 2)
    reader = open_gguf(other[0])
    assert field_value(reader, "split.count") is None
    writer = gguf.GGUFWriter(parts[2], "llama")
    writer.add_uint16("split.no", 2)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "they are of different models, fetch them again" in refused(parts[0])


def test_another_part_is_another_model_for_the_work_folder(parts):
    before = _identity(str(parts[0]))
    assert len(before) == 4  # the name that was given, and each part
    parts[2].write_bytes(parts[2].read_bytes() + b"x")
    assert _identity(str(parts[0])) != before
