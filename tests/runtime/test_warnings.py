"""Our C and C++ compile without a warning, for this machine and, where there is a cross compiler, for aarch64."""

import shutil
import subprocess
from pathlib import Path

import pytest

import tacq_export
from tacq_export.runtime.source import cpp_ext_dir, source_tree

SOURCES = [
    *sorted(p for p in cpp_ext_dir().rglob("*") if p.suffix in (".c", ".cpp")),
    *sorted((Path(tacq_export.__file__).parent / "quantization").glob("*.c")),
    Path(__file__).parents[1] / "check_kernels.c",
]


@pytest.mark.parametrize("target", ["", "aarch64-linux-gnu-"], ids=["native", "aarch64"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_no_warning(source, target):
    c = source.suffix == ".c"
    compiler = target + ("gcc" if c else "g++") if target else ("cc" if c else "c++")
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}; install gcc-aarch64-linux-gnu and g++-aarch64-linux-gnu")
    tree = source_tree()
    folders = [tree / part for part in ("ggml/include", "ggml/src", "ggml/src/ggml-cpu", "include", "src")]
    include = [f"-I{folder}" for folder in (cpp_ext_dir(), *folders)]
    march = "-march=armv8.2-a+dotprod" if target else "-march=native"
    command = [compiler, "-std=gnu11" if c else "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", march]
    done = subprocess.run([*command, *include, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
