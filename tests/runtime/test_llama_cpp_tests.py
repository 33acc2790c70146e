"""llama.cpp's own tests, run on our types: every expected case must have run and passed, not merely nothing have
failed.

On the CPU, test-backend-ops compares the backend with itself in reference mode; tests/test_kernels.py compares with
float64.
"""

import re
import subprocess

import pytest

from tacq_export.format.tensor_types import TYPES

BASE = ("tacq2", "tacq3", "tacq4")
# {ops: (regular expression on the parameters, least number of cases a type)}; MUL_MAT_ID has 73 cases a type, a minute
# of them
CASES = {
    "MUL_MAT": ("type_a={}", 40),
    "MUL_MAT_ID": ("type_a={}.*n_mats=4,n_used=2", 12),
    "GET_ROWS": ("type={}", 4),
    "SET_ROWS": ("type={}|type_dst={}|dst_type={}", 10),
    "CPY": ("type_src={}|type_dst={}", 10),
    "OUT_PROD": ("type_a={}", 8),
}


def test_quantize_fns(runtime):
    """Rounding error, reference error and dot product error of every type, below the limits of
    cpp_ext/call_sites.py."""
    done = subprocess.run([runtime / "test-quantize-fns", "-v"], capture_output=True, text=True, timeout=100)
    for name in BASE:
        for what in ("absolute quantization error", "reference implementation error", "dot product error"):
            assert re.search(rf"^ *{name} {what}: +ok ", done.stdout, re.MULTILINE), (
                f"{name}: {what}\n{done.stdout[-3000:]}"
            )
    for t in TYPES:
        assert f"Testing {t.name.lower()}\n" in done.stdout
    assert done.returncode == 0 and "0 tests failed" in done.stdout


@pytest.mark.parametrize("op", list(CASES))
def test_backend_ops(runtime, op):
    pattern, least = CASES[op]
    expression = pattern.replace("{}", "tacq[234]")
    command = [runtime / "test-backend-ops", "test", "-b", "CPU", "-o", op, "-p", expression, "-j", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    for name in BASE:
        passed = [line for line in output.splitlines() if re.match(rf" *{op}\(.*{name}\b.*: OK$", line)]
        assert len(passed) >= least, f"{len(passed)} cases of {name} passed, expected {least}\n{output[-2000:]}"
    assert done.returncode == 0 and "FAIL" not in output, output[-3000:]
