"""tools/bench_kernels.py: what it times is checked against float64 by itself; here, that it times what a loader would
compute with."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_kernels.py"


@pytest.mark.parametrize("mapped", [False, True])
def test_weights_lie_where_the_loader_puts_them(runtime, mapped):
    command = [
        sys.executable,
        TOOL,
        "--types",
        "tacq2",
        "tacq3_s4",
        "iq2_xs",
        "--rows",
        "128",
        "--columns",
        "512",
        "--tokens",
        "1",
        "40",
    ]
    command += ["--threads", "1", "2", "--rounds", "1", "--megabytes", "1", "--json"] + ["--mapped"] * mapped
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in json.loads(done.stdout) if line["type"] != "memory"]
    assert {(line["type"], line["tokens"], line["threads"]) for line in lines} == {
        (t, n, k) for t in ("TACQ2", "TACQ3_S4", "IQ2_XS") for n in (1, 40) for k in (1, 2)
    }
    ours = {line["buffer"] for line in lines if line["type"].startswith("TACQ")}
    interleaves = ctypes.CDLL(str(runtime / "libggml-cpu.so")).tacq_lanes() > 0
    assert ours == {"CPU_TACQ" if interleaves and not mapped else "CPU"} and {
        line["buffer"] for line in lines if line["type"] == "IQ2_XS"
    } == {"CPU"}
    assert all(line["us"] > 0 for line in lines)


def test_an_unknown_type_is_named(runtime):
    done = subprocess.run([sys.executable, TOOL, "--types", "TACQ9"], capture_output=True, text=True)
    assert done.returncode != 0 and "unknown type 'TACQ9'" in done.stderr and "Traceback" not in done.stderr
