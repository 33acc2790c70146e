"""Programs and libraries of the build load those beside them, whatever the environment names first, and
llama-cpp-python's handlers for images find libmtmd."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from tacq_export.runtime.build import PROGRAMS

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="LD_LIBRARY_PATH is Linux'")


@pytest.fixture(scope="module")
def wrong_libraries(tmp_path_factory, runtime) -> Path:
    """A folder with an empty library under each name that ours have."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty.c").write_text("int nothing;\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "empty.so", folder / "empty.c"], check=True)
    for library in runtime.glob("lib*.so*"):
        shutil.copy(folder / "empty.so", folder / library.name)
    assert (folder / "libllama.so").is_file() and (folder / "libggml-base.so.0").is_file()
    return folder


@LINUX
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name.startswith("llama-")])
def test_programs_load_their_own_libraries(runtime, wrong_libraries, name):
    env = os.environ | {"LD_LIBRARY_PATH": str(wrong_libraries), "LD_BIND_NOW": "1"}
    done = subprocess.run([runtime / name, "--help"], capture_output=True, text=True, env=env, timeout=60)
    assert "error while loading" not in done.stderr and "undefined symbol" not in done.stderr, done.stderr
    assert "usage" in (done.stdout + done.stderr).lower() or "-m" in done.stdout


@LINUX
def test_python_loads_their_own_libraries(runtime, wrong_libraries, tiny_gguf):
    code = (
        "import sys; from tacq_export.runtime.llama_logits import LlamaLogits\n"
        "with LlamaLogits(sys.argv[1], 8, 1) as model: print(model.n_vocab)\n"
        "print(open('/proc/self/maps').read())"
    )
    env = os.environ | {"LD_LIBRARY_PATH": str(wrong_libraries)}
    done = subprocess.run([sys.executable, "-c", code, tiny_gguf], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "320"
    assert f"{runtime.resolve()}/libggml-base.so" in done.stdout and str(wrong_libraries) not in done.stdout


def test_the_handlers_for_images_find_our_libmtmd(runtime):
    """The variables are as they were afterwards: nothing that is started from here is bound to our libraries."""
    code = (
        "import os, tacq_export\n"
        "os.environ['MTMD_CPP_LIB'] = '/elsewhere'; os.environ.pop('LLAMA_CPP_LIB_PATH', None)\n"
        "tacq_export.llama_cpp()\n"
        "assert os.environ['MTMD_CPP_LIB'] == '/elsewhere' and 'LLAMA_CPP_LIB_PATH' not in os.environ\n"
        "import llama_cpp.mtmd_cpp as mtmd\n"
        "from llama_cpp.llama_chat_format import Llava15ChatHandler\n"
        "handler = Llava15ChatHandler(clip_model_path=os.devnull, verbose=False)\n"
        "print(mtmd._libmtmd._name, mtmd.mtmd_default_marker().decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path, marker = done.stdout.split()
    assert Path(path).resolve().parent == runtime.resolve() and marker == "<__media__>"


def test_a_gguf_is_split_and_merged(runtime, tiny_gguf, tmp_path):
    """With the program that messages about split files name."""
    split = runtime / "llama-gguf-split"
    subprocess.run([split, "--split-max-tensors", "8", tiny_gguf, tmp_path / "part"], check=True, capture_output=True)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 1
    subprocess.run([split, "--merge", parts[0], tmp_path / "merged.gguf"], check=True, capture_output=True)
    before, after = (gguf.GGUFReader(path) for path in (tiny_gguf, tmp_path / "merged.gguf"))
    assert [(t.name, t.data.tobytes()) for t in before.tensors] == [(t.name, t.data.tobytes()) for t in after.tensors]


def test_the_libraries_leave_amx_alone(runtime):
    """torch configures the same tiles in the same threads: each would read what the other has set (tacq.cmake)."""
    library = ctypes.CDLL(str(runtime / "libllama.so"))
    library.llama_print_system_info.restype = ctypes.c_char_p
    said = library.llama_print_system_info().decode()
    assert "CPU : " in said and "AMX" not in said
