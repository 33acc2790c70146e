"""How the build of llama.cpp is found and keyed. Nothing is built or fetched here: the caches are empty folders."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from tacq_export.errors import TacqError
from tacq_export.files import locked, need_space
from tacq_export.runtime import build as runtime
from tacq_export.runtime import source as runtime_source
from tacq_export.runtime.build import (
    LIBRARIES,
    PROGRAMS,
    build_parts,
    cmake_options,
    collect,
    cpu_features,
    difference,
    failure,
    run_with_progress,
    runtime_build,
    runtime_dir,
    runtime_key,
    runtime_path,
    tool,
    usable_cpus,
)
from tacq_export.runtime.source import cache_dir, fetch_sdist, own_sources, pin, source_tree


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TACQ_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def finish(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "llama-cli").write_text("")
    (folder / "complete.json").write_text("{}")


@pytest.mark.parametrize("backend", ["vulkan", "cuda", "", "CPU"])
def test_an_unknown_backend_is_named_with_those_there_are(backend):
    for ask in (runtime_key, runtime_path, cmake_options, runtime_build):
        with pytest.raises(TacqError, match=f"There is no '{backend}' backend in this version; use one of: cpu"):
            ask(backend)


def test_without_a_build_the_command_that_makes_it_is_said():
    with pytest.raises(
        TacqError,
        match="llama.cpp with the TACQ types is not built yet for this version; run 'tacq-export runtime build "
        "--backend cpu'",
    ):
        runtime_path()
    with pytest.raises(TacqError, match="is not built yet"):
        tool("llama-cli")


def test_a_finished_build_is_found_and_an_unfinished_one_is_not(cache):
    folder = runtime_dir("cpu")
    assert folder.parent == cache / "runtime"
    folder.mkdir(parents=True)
    (folder / "llama-cli").write_text("")
    with pytest.raises(TacqError, match="not built yet"):
        runtime_path()
    (folder / "complete.json").write_text("{}")
    assert runtime_path() == folder and tool("llama-cli") == folder / "llama-cli"
    assert runtime_build("cpu", say=lambda _: pytest.fail("built again")) == folder
    with pytest.raises(TacqError, match="The build has no program 'llama-frobnicate'; it has: llama-cli, "):
        tool("llama-frobnicate")


def test_what_changed_since_the_last_build_is_named(cache, monkeypatch):
    """The marker of the newest build of the same backend says what it was made of."""
    build = cache / "bin"
    build.mkdir(parents=True)
    for name in [*PROGRAMS, "libllama.so", *(f"lib{name}.so" for name in LIBRARIES)]:
        (build / name).write_text(name)
    collect(cache, runtime_dir("cpu"), build_parts("cpu"))
    assert runtime_path() == runtime_dir("cpu")
    sources, identity = own_sources(), runtime.machine_identity()
    first, second = list(sources)[:2]
    with monkeypatch.context() as patch:
        patch.setattr(
            runtime, "own_sources", lambda: {k: v for k, v in (sources | {first: b"new"}).items() if k != second}
        )
        with pytest.raises(TacqError) as error:
            runtime_path()
        built = runtime_dir("cpu")  # of the changed sources: the build there is has another name
        assert str(error.value).startswith(
            "llama.cpp with the TACQ types is not built yet for this version (changed since cpu-"
        )
        assert "was built: sources: " in str(error.value) and first in str(error.value), error.value
        assert f"no {second}" in str(error.value) and not built.exists()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "machine_identity", lambda: f"{identity} avx9")
        with pytest.raises(TacqError, match=r"was built: CPU feature: avx9"):
            runtime_path()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "cmake_options", lambda backend: runtime.CMAKE_OPTIONS | {"GGML_NATIVE": "OFF"})
        with pytest.raises(TacqError, match=r"was built: option: GGML_NATIVE\); run"):
            runtime_path()
    (runtime_dir("cpu") / "complete.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "PROGRAMS", [*PROGRAMS, "llama-gguf"])
        with pytest.raises(TacqError, match=r"for this version \(there is a build of an older version\); run"):
            runtime_path()


def test_differences_in_words():
    now = {"option": {"A": "1", "B": "2"}, "source": {f"{i}.c": "x" for i in range(6)}}
    assert difference(now, now) == ""
    assert difference(now | {"option": {"A": "1", "B": "3"}}, now) == "option: B"
    assert difference(now | {"option": {"A": "1"}}, now) == "option: B"
    assert difference(now | {"option": now["option"] | {"C": "3"}}, now) == "option: no C"
    assert difference(now | {"source": {}}, now) == "sources: 0.c, 1.c, 2.c and 3 more"
    assert difference({}, now) == "options: A, B; sources: 0.c, 1.c, 2.c and 3 more"


X86 = "processor : 0\nflags\t\t: fpu sse sse2 ht nopl pni ibrs ssse3 fma avx avx2 avx512f amx_tile md_clear abm\n"
ARM = "processor : 0\nFeatures\t: fp asimd evtstrm aes asimddp sve i8mm cpuid ssbs\n"


def test_only_features_that_decide_code_count():
    assert cpu_features(X86) == ["abm", "amx_tile", "avx", "avx2", "avx512f", "fma", "pni", "sse", "sse2", "ssse3"]
    assert cpu_features(ARM) == ["aes", "asimd", "asimddp", "fp", "i8mm", "sve"]
    assert cpu_features("") == []
    for noise in (
        "stibp",
        "retbleed",
        "nopl",
        "arat",
        "ibpb",
        "flush_l1d",
        "tsc_adjust",
        "constant_tsc",
        "pti",
        "smap",
    ):
        assert cpu_features(X86.replace("md_clear", noise)) == cpu_features(X86)


# gcc's names of what /proc/cpuinfo calls otherwise.
KERNEL_NAME = {"sse3": "pni", "lzcnt": "abm", "pclmul": "pclmulqdq", "sha": "sha_ni", "sahf": "lahf_lm", "bmi": "bmi1"}
KERNEL_NAME |= {"prfchw": "3dnowprefetch", "3dnow": "3dnow", "avxvnni": "avx_vnni"}
# Instructions that a compiler never emits unasked, and that neither ggml nor our sources ask for.
UNASKED = {
    "adx",
    "clflushopt",
    "clwb",
    "clzero",
    "fsgsbase",
    "fxsr",
    "mwaitx",
    "pku",
    "rdpid",
    "rdrnd",
    "rdseed",
    "shstk",
}
UNASKED |= {"xsave", "xsavec", "xsaveopt", "xsaves", "cldemote", "enqcmd", "movdir64b", "movdiri", "pconfig", "ptwrite"}
UNASKED |= {
    "serialize",
    "sgx",
    "tsxldtrk",
    "uintr",
    "waitpkg",
    "wbnoinvd",
    "hle",
    "rtm",
    "hreset",
    "kl",
    "widekl",
    "lwp",
}
UNASKED |= {"prefetchi", "raoint", "cmpccxadd", "usermsr"}


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("gcc"), reason="asks gcc on an x86 processor")
def test_every_instruction_set_that_the_compiler_uses_here_counts():
    """gcc says what -march=native turns on; each must be among the features of the key."""
    asked = subprocess.run(
        ["gcc", "-march=native", "-###", "-E", "-x", "c", "-"], input="", capture_output=True, text=True
    )
    flags = shlex.split(next(line for line in asked.stderr.splitlines() if "cc1" in line))
    used = {flag[2:] for flag in flags if re.match("-m(?!no-|arch|tune)", flag)}
    ours = {word.replace("_", "") for word in cpu_features(Path("/proc/cpuinfo").read_text())}
    assert {"sse2", "avx2"} & used
    for flag in used - UNASKED:
        name = re.sub("[._-]", "", KERNEL_NAME.get(flag, flag))
        assert name in ours, flag


def test_the_key_stays_and_changes_with_everything_that_decides_a_build(monkeypatch):
    key = runtime_key("cpu")
    assert runtime_key("cpu") == key and len(key) == 16
    sources = own_sources()
    name = next(iter(sources))
    patcher, sites = runtime_source.load_patcher()
    changes = {
        "content of a source": ("own_sources", lambda: sources | {name: sources[name] + b" "}),
        "name of a source": ("own_sources", lambda: {("x" + n if n == name else n): c for n, c in sources.items()}),
        "one source more": ("own_sources", lambda: sources | {"new.c": b""}),
        "content moved between sources": (
            "own_sources",
            lambda: dict(zip(sources, reversed(sources.values()), strict=True)),
        ),
        "pin": ("pin", lambda: ("llama-cpp-python", "0.0.0", "0" * 64)),
        "call sites": ("load_patcher", lambda: (patcher, sites[:-1])),
        "machine": ("machine_identity", lambda: "Linux riscv64 v"),
        "options": ("cmake_options", lambda backend: runtime.CMAKE_OPTIONS | {"GGML_NATIVE": "OFF"}),
        "programs": ("PROGRAMS", [*PROGRAMS, "llama-gguf"]),
    }
    keys = {key}
    for what, (attribute, value) in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(runtime, attribute, value)
            assert runtime_key("cpu") not in keys, what
            keys.add(runtime_key("cpu"))
    assert runtime_key("cpu") == key


def test_the_key_follows_the_real_source_files(monkeypatch, tmp_path):
    """own_sources reads the folder: a changed byte in a copy of it gives another key, a changed Python file does
    not."""
    copy = tmp_path / "cpp_ext"
    shutil.copytree(runtime_source.cpp_ext_dir(), copy)
    key = runtime_key("cpu")
    monkeypatch.setattr(runtime_source, "cpp_ext_dir", lambda: copy)
    same = own_sources()
    (copy / "README.md").write_text("words")
    assert own_sources() == same
    with open(copy / "tacq-common.h", "a") as f:
        f.write("\n")
    assert own_sources() != same
    assert runtime_key("cpu") != key


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("TACQ_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "tacq-export"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "tacq-export"


def test_the_pin_names_package_version_and_hash(monkeypatch, tmp_path):
    package, version, sha256 = pin()
    assert package == "llama-cpp-python" and version.count(".") == 2 and len(sha256) == 64
    (tmp_path / "LLAMA_CPP_VERSION").write_text("llama-cpp-python>=0.3\n")
    monkeypatch.setattr(runtime_source, "cpp_ext_dir", lambda: tmp_path)
    with pytest.raises(
        TacqError,
        match="LLAMA_CPP_VERSION reads 'llama-cpp-python>=0.3', not 'package==version --hash=sha256:...'; restore it.",
    ):
        pin()


def fake_pin(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(runtime_source, "pin", lambda: ("llama-cpp-python", "9.9", hashlib.sha256(content).hexdigest()))


def test_a_download_with_another_hash_is_refused_and_deleted(monkeypatch, cache):
    fake_pin(monkeypatch, b"the right one")
    target = cache / "downloads" / "llama_cpp_python-9.9.tar.gz"
    monkeypatch.setattr(runtime_source, "pip_download", lambda *_: target.write_bytes(b"another one"))
    with pytest.raises(TacqError, match="The downloaded llama_cpp_python-9.9.tar.gz is not the pinned file"):
        fetch_sdist(lambda _: None)
    assert not target.exists()
    monkeypatch.setattr(runtime_source, "pip_download", lambda *_: target.write_bytes(b"the right one"))
    assert fetch_sdist(lambda _: None) == target
    monkeypatch.setattr(runtime_source, "pip_download", lambda *_: pytest.fail("fetched again"))
    assert fetch_sdist(lambda _: None) == target


def test_a_damaged_download_in_the_cache_is_fetched_again(monkeypatch, cache):
    fake_pin(monkeypatch, b"right")
    target = cache / "downloads" / "llama_cpp_python-9.9.tar.gz"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"cut off")
    monkeypatch.setattr(runtime_source, "pip_download", lambda *_: target.write_bytes(b"right"))
    assert fetch_sdist(lambda _: None).read_bytes() == b"right"


def test_pip_errors_are_one_sentence_with_pips_reason(monkeypatch, tmp_path):
    with pytest.raises(TacqError) as error:
        runtime_source.pip_download("tacq-no-such-package==1", tmp_path, ["--no-index"], "check the network.")
    message = str(error.value)
    assert message.startswith(
        "pip could not fetch tacq-no-such-package==1 (ERROR: No matching distribution"
    ) and message.endswith("check the network.")
    assert "\n" not in message


def test_an_archive_that_is_damaged_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "bad.tar.gz").write_bytes(b"this is no archive")
    monkeypatch.setattr(runtime_source, "fetch_sdist", lambda say: tmp_path / "bad.tar.gz")
    with pytest.raises(TacqError, match=r"Could not unpack .*bad.tar.gz \(.+\); delete it and run again."):
        source_tree(lambda _: None)


def test_an_anchor_that_moved_is_named(monkeypatch, tmp_path):
    patcher, _ = runtime_source.load_patcher()
    site = patcher.CallSite(
        name="call", file="a.c", inside="void f(void) {\n", anchor="    g();\n", where="after", insert="    ours();\n"
    )
    with tarfile.open(tmp_path / "up.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("pkg/vendor/llama.cpp/a.c")
        info.size = len(content := b"void f(void) {\n    moved();\n}\n")
        archive.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(runtime_source, "fetch_sdist", lambda say: tmp_path / "up.tar.gz")
    for sites, message in (
        (
            [site],
            r"The pinned llama.cpp does not take our call sites: a.c: call site 'call': the anchor 'g\(\);' occurs 0 "
            r"times",
        ),
        (
            [patcher.CallSite(name="b", file="b.c", inside="x\n", anchor="x\n", where="after", insert="y\n")],
            "has no file b.c, which call_sites.py names",
        ),
    ):
        monkeypatch.setattr(runtime_source, "load_patcher", lambda sites=sites: (patcher, sites))
        with pytest.raises(TacqError, match=message):
            source_tree(lambda _: None)


def test_too_little_space_is_said_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 10**10, 10**8))
    with pytest.raises(
        TacqError, match="has 0.1 GB free and the build needs 3.0 GB; free some space, or set TACQ_EXPORT_CACHE"
    ):
        need_space(tmp_path, 3.0)
    need_space(tmp_path, 0.05)


def test_a_lock_waits_for_the_other_and_says_so(tmp_path):
    said, inside = [], threading.Event()

    def enter():
        with locked(tmp_path / "lock", said.append):
            inside.set()

    with locked(tmp_path / "lock", said.append):
        other = threading.Thread(target=enter)
        other.start()
        assert not inside.wait(0.3)
    other.join(5)
    assert inside.is_set() and len(said) == 1 and said[0].startswith("Waiting for another tacq-export")


def test_progress_is_read_from_ninja_and_make_and_the_log_is_whole(tmp_path):
    steps = []
    script = (
        "print('-- configuring'); print('[1/3] Building a'); print('[ 66%] Building b'); print('[3/3] Linking'); "
        "raise SystemExit(4)"
    )
    status = run_with_progress([sys.executable, "-c", script], tmp_path / "log", lambda *step: steps.append(step))
    assert status == 4 and steps == [(1, 3, "Building a"), (66, 100, "Building b"), (3, 3, "Linking")]
    assert (tmp_path / "log").read_text().splitlines()[0] == "-- configuring"


@pytest.mark.parametrize(
    ("log", "cause", "remedy"),
    [
        (
            "ok\na.c:3:1: error: unknown type name 'foo'\nninja: build stopped",
            "a.c:3:1: error: unknown type name 'foo'",
            "read the log: ",
        ),
        ("CMake Error at CMakeLists.txt:1\n", "CMake Error at CMakeLists.txt:1", "read the log: "),
        ("c++: fatal error: Killed signal terminated program cc1plus", "Killed signal", "run again with --jobs 1: "),
        ("only words", "only words", "read the log: "),
        ("", "no output", "read the log: "),
    ],
)
def test_a_failed_build_says_its_first_error_and_where_the_log_is(tmp_path, log, cause, remedy):
    (tmp_path / "log").write_text(log)
    message = str(failure("Building", tmp_path / "log"))
    assert (
        message.startswith("Building llama.cpp failed (")
        and cause in message
        and message.endswith(f"{remedy}{tmp_path}/log")
        and "\n" not in message
    )


def test_collect_copies_programs_and_libraries_and_marks_the_end(tmp_path):
    build = tmp_path / "build"
    (build / "bin").mkdir(parents=True)
    for name in [*PROGRAMS, "libllama.so", "libmtmd.so", "libggml-base.so", "notes.txt", "test-other"]:
        (build / "bin" / name).write_text(name)
    collect(build, tmp_path / "runtime" / "cpu-x", {"option": {"A": "1"}})
    found = {p.name for p in (tmp_path / "runtime" / "cpu-x").iterdir()}
    assert found == {*PROGRAMS, "libllama.so", "libmtmd.so", "libggml-base.so", "complete.json"}
    marker = json.loads((tmp_path / "runtime" / "cpu-x" / "complete.json").read_text())
    assert marker["programs"] == PROGRAMS and marker["parts"] == {"option": {"A": "1"}}
    for name in ("llama-bench", "libmtmd.so"):
        (build / "bin" / name).unlink()
        with pytest.raises(TacqError, match=f"The build made no {name}; delete .*build and run again."):
            collect(build, tmp_path / "runtime" / "cpu-y", {})
        (build / "bin" / name).write_text(name)
    assert not (tmp_path / "runtime" / "cpu-y").exists()


def test_a_missing_cmake_or_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime.shutil, "which", lambda name, path=None: None)
    with pytest.raises(
        TacqError, match="'cmake' is missing, and building llama.cpp needs it; install it with 'pip install cmake'."
    ):
        runtime.configure(tmp_path, tmp_path / "build", "cpu", tmp_path / "log")
    monkeypatch.setattr(runtime.shutil, "which", lambda name, path=None: "/bin/cmake" if name == "cmake" else None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(TacqError, match=r"There is no C\+\+ compiler; install one"):
        runtime.configure(tmp_path, tmp_path / "build", "cpu", tmp_path / "log")


def test_only_a_build_copies_our_sources_and_sees_when_they_are_changed(cache, monkeypatch):
    """Another version that shares the cache, and only wants the tree, must not change what is being compiled."""
    work = runtime_source.work_dir()
    source_tree_folder = work / "cpp_ext"
    monkeypatch.setattr(runtime_source, "own_sources", lambda: {"a.c": b"ours", "vulkan/b.comp": b"too"})
    runtime_source.copy_own_sources(source_tree_folder)
    (work / "tree.stamp").write_text(runtime_source._tree_state())
    assert runtime_source.is_of_today(work)
    before = (source_tree_folder / "a.c").stat().st_mtime_ns
    runtime_source.copy_own_sources(source_tree_folder)
    assert (source_tree_folder / "a.c").stat().st_mtime_ns == before  # so that nothing is compiled again
    (source_tree_folder / "a.c").write_bytes(b"another's")
    assert not runtime_source.is_of_today(work)
    runtime_source.copy_own_sources(source_tree_folder)
    (source_tree_folder / "stale.c").write_bytes(b"")
    assert not runtime_source.is_of_today(work)
    runtime_source.copy_own_sources(source_tree_folder)
    assert runtime_source.is_of_today(work) and not (source_tree_folder / "stale.c").exists()
    (work / "tree.stamp").write_text("another pin")
    assert not runtime_source.is_of_today(work)


def test_the_cpus_of_a_system_that_cannot_say_which_are_ours(monkeypatch):
    """macOS has no sched_getaffinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert usable_cpus() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_cpus() == 7
