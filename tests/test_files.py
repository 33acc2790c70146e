"""Files are whole or not there: full disks, killed processes, temporary names."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tacq_export.errors import TacqError
from tacq_export.files import written_atomically
from tacq_export.format.gguf_file import open_gguf

# A process that may not write files of more than so many bytes: what it is told is what a full disk would tell it.
LIMITED = """
import resource, sys
from tacq_export import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(cli.main(sys.argv[2:]))
"""


def dequantize_with_room(source: Path, outfile: Path, room: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LIMITED, str(room), "dequantize", str(source), "--outfile", str(outfile)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_disk_that_fills_up_in_the_last_bytes_leaves_no_file(tiny_gguf, tmp_path):
    whole = tmp_path / "whole.gguf"
    assert dequantize_with_room(tiny_gguf, whole, 1 << 40).returncode == 0
    size = whole.stat().st_size
    last = open_gguf(whole).tensors[-1]
    for missing in (1, 32, 600, int(last.n_bytes) + 1, size - 100):
        done = dequantize_with_room(tiny_gguf, tmp_path / "cut.gguf", size - missing)
        assert done.returncode == 1 and "Could not write" in done.stderr and "Traceback" not in done.stderr, missing
        assert [p.name for p in tmp_path.iterdir()] == ["whole.gguf"]
    assert dequantize_with_room(tiny_gguf, tmp_path / "fits.gguf", size).returncode == 0
    assert (tmp_path / "fits.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("how", ["safetensors", "torch", "bytes"])
def test_a_full_disk_is_a_sentence_whoever_writes(tmp_path, how):
    code = f"""
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from tacq_export.errors import TacqError
from tacq_export.files import written_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
x = torch.zeros(10000)
try:
    with written_atomically(Path({str(tmp_path / "out")!r})) as partial:
        if {how!r} == "safetensors": save_file({{"x": x}}, partial)
        elif {how!r} == "torch": torch.save(x, partial)
        else: partial.write_bytes(bytes(40000))
except TacqError as error:
    sys.exit(f"said: {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("said: Could not write"), done.stderr
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_caller_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes differ"), written_atomically(tmp_path / "out") as partial:
        partial.write_bytes(b"half")
        raise RuntimeError("shapes differ")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_that_of_a_running_one_stays(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [
        f".out.{ended.pid}.partial",
        f".out.{os.getppid()}.partial",
        ".out.words.partial",
        f".other.{ended.pid}.partial",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    with written_atomically(tmp_path / "out") as partial:
        partial.write_bytes(b"whole")
    assert (tmp_path / "out").read_bytes() == b"whole"
    assert {p.name for p in tmp_path.iterdir()} == {"out", *names[1:]}


def test_tensors_of_libraries_are_written_whole(tmp_path):
    with written_atomically(tmp_path / "a") as partial:
        save_file({"x": torch.arange(5)}, partial)
    with written_atomically(tmp_path / "b") as partial:
        partial.write_bytes(np.arange(5, dtype=np.uint8).data)
    assert (tmp_path / "b").read_bytes() == bytes(range(5))
    with pytest.raises(TacqError, match="Could not write"), written_atomically(tmp_path / "no" / "c") as partial:
        partial.write_bytes(b"")
