"""Our build of llama.cpp: made once into the cache, then found by key.

runtime_build(backend)  -> folder with llama-cli, llama-server, ..., libllama.so; builds if there is none
runtime_path(backend)   -> that folder, or TacqError that says how to build it
tool(name)              -> path of one program in it
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import TacqError
from ..files import locked, need_space
from .source import Say, cache_dir, load_patcher, own_sources, pin, source_tree, work_dir

Progress = Callable[[int, int, str], None]

PROGRAMS = [
    "llama-cli",
    "llama-completion",
    "llama-server",
    "llama-bench",
    "llama-perplexity",
    "llama-imatrix",
    "llama-quantize",
    "llama-tokenize",
    "test-backend-ops",
    "test-quantize-fns",
]

CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    # Programs and libraries find each other in their own folder, so a finished build can be copied.
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "GGML_NATIVE": "ON",
    "GGML_CPU_ALL_VARIANTS": "OFF",
    "GGML_BACKEND_DL": "OFF",
    "LLAMA_BUILD_TESTS": "ON",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_APP": "OFF",
    # Nothing may be fetched while building: no web page for the server, no TLS.
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "MTMD_VIDEO": "OFF",
    # Constants: otherwise taken from whatever git repository surrounds the cache.
    "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_COMMIT": "tacq",
}

# Kernels for other backends are not written yet; a build with them would run our types nowhere but on the CPU.
BACKEND_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}}


def cmake_options(backend: str) -> dict[str, str]:
    """Options of a backend; TacqError for one that does not exist (yet)."""
    if backend not in BACKEND_OPTIONS:
        raise TacqError(
            f"There is no '{backend}' backend in this version; use one of: {', '.join(BACKEND_OPTIONS)} "
            "(a stock GPU build cannot read the TACQ types)."
        )
    return CMAKE_OPTIONS | BACKEND_OPTIONS[backend]


def machine_identity() -> str:
    """What GGML_NATIVE=ON makes code for: architecture and CPU features, so a shared cache never gives illegal
    instructions."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    features = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return f"{platform.system()} {platform.machine()} {' '.join(sorted(features[1].split())) if features else ''}"


def runtime_key(backend: str) -> str:
    """Hash of everything that decides what a build contains: pin, call sites, our sources, options, programs, CPU."""
    digest = hashlib.sha256()
    parts = [pin(), load_patcher()[1], sorted(cmake_options(backend).items()), PROGRAMS, machine_identity()]
    digest.update(repr(parts).encode())
    for inside, content in own_sources().items():
        digest.update(f"\n{inside} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def runtime_dir(backend: str) -> Path:
    """Where the finished build of today's sources lies, or will lie."""
    return cache_dir() / "runtime" / f"{backend}-{runtime_key(backend)}"


def is_complete(folder: Path) -> bool:
    """True if the build in `folder` was finished: the marker is written last."""
    return (folder / "complete.json").is_file()


def runtime_path(backend: str = "cpu") -> Path:
    """Folder of the finished build; TacqError that says how to make it if there is none."""
    folder = runtime_dir(backend)
    if not is_complete(folder):
        raise TacqError(
            f"llama.cpp with the TACQ types is not built yet for this version; run "
            f"'tacq-export runtime build --backend {backend}' (once, about 10 minutes on 2 cores)."
        )
    return folder


def tool(name: str, backend: str = "cpu") -> Path:
    """Path of one program of the build, such as llama-quantize."""
    path = runtime_path(backend) / name
    if not path.is_file():
        raise TacqError(f"The build has no program '{name}'; it has: {', '.join(PROGRAMS)}.")
    return path


def build_env() -> dict[str, str]:
    """Environment of the build. cmake and ninja may be wheels, beside a Python whose virtual environment is not
    active."""
    return os.environ | {
        "PATH": os.environ.get("PATH", os.defpath) + os.pathsep + str(Path(sys.executable).parent),
        "NINJA_STATUS": "[%f/%t] ",
        "LC_ALL": "C",
    }


def find_program(name: str, remedy: str) -> str:
    """Path of a program that the build needs; TacqError with the remedy if it is not installed."""
    path = shutil.which(name, path=build_env()["PATH"])
    if not path:
        raise TacqError(f"'{name}' is missing, and building llama.cpp needs it; {remedy}")
    return path


def run_with_progress(command: list[str], log: Path, progress: Progress) -> int:
    """Run `command` with its output in `log`, reporting ninja's [n/m] or make's [ n%] lines. Returns the exit
    status."""
    with (
        open(log, "a") as out,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=build_env()
        ) as process,
    ):
        try:
            for line in process.stdout:
                out.write(line)
                match = re.match(r"\[ *(\d+)(?:/(\d+)|%)\] *(.*)", line)
                if match:
                    progress(int(match[1]), int(match[2] or 100), match[3])
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def failure(step: str, log: Path) -> TacqError:
    """The error of a failed step, with the first line of the log that names an error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    causes = [line for line in lines if re.search(r"\berror\b|CMake Error|No space left|Killed", line, re.IGNORECASE)]
    cause = causes[0] if causes else (lines[-1] if lines else "no output")
    remedy = "run again with --jobs 1" if "Killed" in cause else "read the log"
    return TacqError(f"{step} llama.cpp failed ({cause[:300]}); {remedy}: {log}")


def configure(tree: Path, build: Path, backend: str, log: Path) -> None:
    """Run cmake; again and from nothing if the build folder was left by another cmake or generator."""
    cmake = find_program("cmake", "install it with 'pip install cmake'.")
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or os.environ.get("CXX")):
        raise TacqError("There is no C++ compiler; install one, for example with 'apt-get install g++'.")
    generator = "Ninja" if shutil.which("ninja", path=build_env()["PATH"]) else "Unix Makefiles"
    if generator != "Ninja":
        find_program("make", "install it with 'pip install ninja' or 'apt-get install make'.")
    cache = build / "CMakeCache.txt"
    if cache.is_file() and f"CMAKE_GENERATOR:INTERNAL={generator}\n" not in cache.read_text(errors="replace"):
        shutil.rmtree(build)
    command = [cmake, "-G", generator, "-S", str(tree), "-B", str(build), f"-DTACQ_CPP_EXT={tree.parent / 'cpp_ext'}"]
    command += [f"-D{name}={value}" for name, value in cmake_options(backend).items()]
    for attempt in (1, 2):
        log.write_text("")
        with open(log, "a") as out:
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=build_env()).returncode == 0:
                return
        if attempt == 1 and cache.is_file():
            shutil.rmtree(build)
    raise failure("Configuring", log)


def collect(build: Path, folder: Path) -> None:
    """Copy programs and libraries from the build folder to `folder`, the marker last."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in sorted((build / "bin").iterdir()):
        if path.name in PROGRAMS or re.match(r"lib[\w-]+\.(so|dylib)|lib[\w-]+[\d.]+\.dylib", path.name):
            shutil.copy2(path, partial / path.name, follow_symlinks=False)
    missing = [name for name in [*PROGRAMS, "libllama.so"] if not (partial / name).exists()]
    if missing and platform.system() == "Linux":
        raise TacqError(f"The build made no {missing[0]}; delete {build} and run again.")
    (partial / "complete.json").write_text(json.dumps({"pin": pin(), "programs": PROGRAMS}) + "\n")
    partial.rename(folder)


def runtime_build(
    backend: str = "cpu", jobs: int | None = None, progress: Progress | None = None, say: Say = print
) -> Path:
    """Build llama.cpp with our types for `backend`, or find that it is built; returns the folder.

    jobs: compilers at once (default: the cores this process may use). progress(done, total, what) is called a step.
    A build that was interrupted goes on where it stopped. Raises TacqError: compiler or cmake missing, disk full, an
    anchor that moved, or a compiler error (with the log's path).
    """
    folder = runtime_dir(backend)
    if is_complete(folder):
        return folder
    with locked(work_dir() / f"build-{backend}.lock", say):
        if is_complete(folder):
            return folder
        need_space(cache_dir(), 2.0)
        tree = source_tree(say)
        folder = runtime_dir(backend)  # of the sources just copied: someone may be editing them
        build = work_dir() / f"build-{backend}"
        log = work_dir() / f"build-{backend}.log"
        say("Configuring llama.cpp ...")
        configure(tree, build, backend, log)
        jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        say(f"Building llama.cpp with {jobs} jobs (log: {log}) ...")
        command = [
            find_program("cmake", "install it with 'pip install cmake'."),
            "--build",
            str(build),
            "--parallel",
            str(jobs),
            "--target",
            *PROGRAMS,
        ]
        if run_with_progress(command, log, progress or (lambda done, total, what: None)):
            raise failure("Building", log)
        collect(build, folder)
    say(f"Built: {folder}")
    return folder
