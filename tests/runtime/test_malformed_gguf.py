"""Hostile and damaged files: our build of llama.cpp refuses each with one clear line, and never crashes or divides by
zero."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_model import WIDTH, matrices, write_tiny_model

from tacq_export.format.tensor_types import tensor_type

Change = Callable[[np.ndarray], np.ndarray]

NAME = "blk.1.ffn_up.weight"
ROWS, COLUMNS = matrices()[NAME]
TYPE = tensor_type("tacq2_s16")
SECTION = ROWS * COLUMNS // 64 * TYPE.base_bytes  # where the sparse section begins
ROW_PTR = SECTION + 16
COLUMN = ROW_PTR + 4 * (ROWS + 1)


def run(runtime: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"GGML_NO_BACKTRACE": "1"}
    command = [runtime / program, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=60, env=env, stdin=subprocess.DEVNULL
    )


def load(runtime: Path, path: Path, *options: str) -> subprocess.CompletedProcess:
    one_token = ["-p", "ab", "-n", "1", "-no-cnv", "-t", "1", "-c", "64", "--no-warmup"]
    return run(runtime, "llama-completion", "-m", str(path), *one_token, *options)


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    output = done.stdout + done.stderr
    assert done.returncode > 0, f"exit status {done.returncode} (negative: a signal)\n{output[-2000:]}"
    lines = [line for line in output.splitlines() if all(word in line for word in words)]
    assert lines, f"no line with {words} in:\n{output[-2000:]}"


def nnz_of(data: np.ndarray) -> int:
    return int(data[SECTION + 12 : SECTION + 16].view("<u4")[0])


def poke(at: int, form: str, value) -> Change:
    """A change of a tensor's bytes: `value`, packed as `form`, at byte `at`."""

    def change(data: np.ndarray) -> np.ndarray:
        flat = data.reshape(-1)
        packed = np.frombuffer(struct.pack(form, value), np.uint8)
        flat[at : at + len(packed)] = packed
        return data

    return change


def first_full_row(flat: np.ndarray) -> int:
    """Index of the first kept weight of the first row that keeps at least two."""
    row_ptr = flat[ROW_PTR:COLUMN].view("<u4")
    return int(row_ptr[np.flatnonzero(np.diff(row_ptr.astype(np.int64)) >= 2)[0]])


def swap_columns(data: np.ndarray) -> np.ndarray:
    at = COLUMN + 2 * first_full_row(data.reshape(-1))
    columns = data.reshape(-1)[at : at + 4].view("<u2")
    columns[:] = columns[::-1].copy()
    return data


def repeat_column(data: np.ndarray) -> np.ndarray:
    at = COLUMN + 2 * first_full_row(data.reshape(-1))
    columns = data.reshape(-1)[at : at + 4].view("<u2")
    columns[1] = columns[0]
    return data


def out_of_range_column(data: np.ndarray) -> np.ndarray:
    flat = data.reshape(-1)
    return poke(COLUMN + 2 * (nnz_of(flat) - 1), "<H", COLUMNS)(data)


def bad_value(bits: int) -> Change:
    return lambda data: poke(COLUMN + 2 * nnz_of(data.reshape(-1)) + 2, "<H", bits)(data)


def decreasing_row_ptr(data: np.ndarray) -> np.ndarray:
    flat = data.reshape(-1)
    return poke(ROW_PTR + 4 * (ROWS // 2), "<I", nnz_of(flat) + 1000)(data)


HOSTILE = {
    "bad magic": (poke(SECTION, "<I", 0xDEADBEEF), "magic"),
    "zeroed section": (lambda data: (data.reshape(-1)[SECTION:].fill(0), data)[1], "magic"),
    "newer section version": (poke(SECTION + 4, "<H", 2), "newer"),
    "flags": (poke(SECTION + 6, "<H", 1), "flags"),
    "too many rows": (poke(SECTION + 8, "<I", ROWS + 1), "rows"),
    "all the rows there are": (poke(SECTION + 8, "<I", 0xFFFFFFFF), "rows"),
    "too many kept weights": (poke(SECTION + 12, "<I", 0xFFFFFFFF), "do not fit"),
    "row_ptr does not begin at 0": (poke(ROW_PTR, "<I", 1), "row pointers run"),
    "row_ptr does not end at nnz": (poke(ROW_PTR + 4 * ROWS, "<I", 0), "row pointers run"),
    "row_ptr decreases": (decreasing_row_ptr, "row pointers decrease"),
    "row_ptr far outside": (poke(ROW_PTR + 4, "<I", 0xFFFFFFF0), "row pointers decrease"),
    "column out of range": (out_of_range_column, "out of range"),
    "columns descend": (swap_columns, "do not ascend"),
    "column twice": (repeat_column, "do not ascend"),
    "NaN": (bad_value(0x7E00), "NaN or Inf"),
    "Inf": (bad_value(0xFC00), "NaN or Inf"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    write_tiny_model(path, TYPE)
    return path


@pytest.mark.parametrize("mode", ["mmap", "none", "dio"])
def test_the_good_file_runs(runtime, good, mode):
    done = load(runtime, good, "--load-mode", mode)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("what", list(HOSTILE))
def test_hostile_sections_are_refused(runtime, tmp_path, what):
    change, word = HOSTILE[what]
    write_tiny_model(tmp_path / "hostile.gguf", TYPE, change={NAME: change})
    assert_refused(load(runtime, tmp_path / "hostile.gguf"), NAME, word)


@pytest.mark.parametrize("mode", ["mmap", "none", "dio"])
def test_hostile_sections_are_refused_however_they_are_loaded(runtime, tmp_path, mode):
    write_tiny_model(tmp_path / "hostile.gguf", TYPE, change={NAME: out_of_range_column})
    assert_refused(load(runtime, tmp_path / "hostile.gguf", "--load-mode", mode), NAME, "out of range")


def test_hostile_token_embeddings_are_refused(runtime, tmp_path):
    section = matrices()["token_embd.weight"][0] * WIDTH // 64 * TYPE.base_bytes
    write_tiny_model(tmp_path / "hostile.gguf", TYPE, change={"token_embd.weight": poke(section + 8, "<I", 3)})
    assert_refused(load(runtime, tmp_path / "hostile.gguf"), "token_embd.weight", "rows")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (1, "this file has tacq.format_version 1, which this program does not read any more; export it again"),
        (3, "this file has tacq.format_version 3 and this program reads version 2; upgrade tacq-export"),
    ],
)
def test_another_format_version_is_refused(runtime, tmp_path, version, words):
    write_tiny_model(tmp_path / "other.gguf", TYPE, format_version=version)
    assert_refused(load(runtime, tmp_path / "other.gguf"), words)


def test_a_file_without_format_version_is_read(runtime, tmp_path):
    write_tiny_model(tmp_path / "plain.gguf", tensor_type("tacq3"), format_version=None)
    assert load(runtime, tmp_path / "plain.gguf").returncode == 0


def tensor_info(content: bytes, name: str) -> int:
    """Offset of the dimensions (u32 count, u64 each, u32 type, u64 offset) of a tensor in a GGUF file."""
    encoded = struct.pack("<Q", len(name)) + name.encode()
    assert content.count(encoded) == 1
    return content.index(encoded) + len(encoded)


def rewritten(good: Path, path: Path, at: int, form: str, value) -> Path:
    content = bytearray(good.read_bytes())
    where = tensor_info(bytes(content), NAME) + at
    content[where : where + struct.calcsize(form)] = struct.pack(form, value)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("type_id", [4, 31, 43, 100, 511, 515, 519, 544, 1000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_type_ids_that_mean_nothing_are_refused(runtime, good, tmp_path, type_id):
    path = rewritten(good, tmp_path / "hole.gguf", 4 + 16, "<I", type_id)
    signed = type_id - (1 << 32) if type_id > 0x7FFFFFFF else type_id
    assert_refused(load(runtime, path), NAME, f"type {signed}, which does not exist")


@pytest.mark.parametrize("width", [0, 32, 96, 100, (1 << 62) + 64, -64])
def test_widths_that_are_no_multiple_of_64_or_absurd_are_refused(runtime, good, tmp_path, width):
    path = rewritten(good, tmp_path / "width.gguf", 4, "<q", width)
    assert_refused(load(runtime, path))


def test_a_width_that_is_no_multiple_of_64_is_named(runtime, good, tmp_path):
    assert_refused(load(runtime, rewritten(good, tmp_path / "width.gguf", 4, "<q", 96)), NAME, "tacq2_s16", "96")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9, 0.999])
def test_truncated_files_are_refused(runtime, good, tmp_path, share):
    content = good.read_bytes()
    (tmp_path / "short.gguf").write_bytes(content[: int(len(content) * share)])
    assert_refused(load(runtime, tmp_path / "short.gguf"))


@pytest.mark.parametrize(
    "options", [[], ["--allow-requantize"], ["--pure", "--allow-requantize"], ["--dry-run", "--allow-requantize"]]
)
def test_quantize_refuses_to_convert_a_mixed_tensor(runtime, good, tmp_path, options):
    done = run(runtime, "llama-quantize", *options, str(good), str(tmp_path / "out.gguf"), "Q4_0")
    assert_refused(done, "cannot be converted from tacq2_s16", "tacq-export only")


@pytest.mark.parametrize(
    "option, value",
    [
        ("--tensor-type", "ffn_up=tacq2_s4"),
        ("--token-embedding-type", "tacq3_s1"),
        ("--output-tensor-type", "tacq4_s16"),
    ],
)
def test_quantize_refuses_to_make_a_mixed_tensor(runtime, tmp_path, option, value):
    write_tiny_model(tmp_path / "base.gguf", tensor_type("tacq4"))
    files = [str(tmp_path / "base.gguf"), str(tmp_path / "out.gguf")]
    done = run(runtime, "llama-quantize", "--allow-requantize", option, value, *files, "Q8_0")
    assert_refused(done, f"to {value.split('=')[-1]}", "tacq-export only")


def test_quantize_makes_base_types(runtime, tmp_path):
    write_tiny_model(tmp_path / "base.gguf", tensor_type("tacq4"))
    options = ["--allow-requantize", "--tensor-type", "ffn_up=tacq2", "--token-embedding-type", "tacq3"]
    done = run(runtime, "llama-quantize", *options, str(tmp_path / "base.gguf"), str(tmp_path / "out.gguf"), "Q8_0")
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert load(runtime, tmp_path / "out.gguf").returncode == 0


def test_quantize_copies_mixed_tensors_unchanged(runtime, good, tmp_path):
    done = run(runtime, "llama-quantize", str(good), str(tmp_path / "out.gguf"), "COPY")
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    before, after = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} for path in (good, tmp_path / "out.gguf")
    )
    assert before == after
    assert load(runtime, tmp_path / "out.gguf").returncode == 0


def test_programs_name_the_type(runtime, good):
    done = run(runtime, "llama-bench", "-m", str(good), "-p", "2", "-n", "0", "-t", "1", "-r", "1")
    assert "tacq2_s16" in done.stdout and "unknown" not in done.stdout + done.stderr


def test_a_mixed_type_where_no_kernel_reads_it_is_refused(runtime, tmp_path):
    """Norms are multiplied element by element, which no mixed tensor can be; the loader finds out before any kernel
    runs."""
    write_tiny_model(tmp_path / "norm.gguf", TYPE, mixed_norm=True)
    assert_refused(load(runtime, tmp_path / "norm.gguf"), "output_norm.weight")
