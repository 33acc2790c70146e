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
from .source import Say, cache_dir, copy_own_sources, is_of_today, load_patcher, own_sources, pin, source_tree, work_dir

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
    "llama-gguf-split",
    "test-backend-ops",
    "test-quantize-fns",
]

# Targets that no program needs: llama-cpp-python's chat handlers for images load it.
LIBRARIES = ["mtmd"]

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


# Words of /proc/cpuinfo. On x86 those of instructions that a compiler emits under -march=native, or that ggml and our
# sources ask for by macro, under the kernel's names (pni is SSE3, abm is LZCNT). Most other words are about the kernel,
# the hypervisor and its mitigations, and come and go with updates. On ARM there are few words, and nearly all are
# instructions: there those are left out that are not.
_DECISIVE_X86 = re.compile(
    r"(mmx|sse|ssse3|avx|amx_|apx|fma|bmi)\w*|pni|f16c|abm|popcnt|movbe|cmov|cx16|lahf_lm|3dnow|3dnowext|3dnowprefetch|"
    r"xop|tbm|gfni|aes|vaes|pclmulqdq|vpclmulqdq|sha_ni|sha512|sm3|sm4"
)
_INDECISIVE_ARM = {"cpuid", "evtstrm", "ssbs", "dcpop", "dcpodp", "mte", "mte3", "ecv", "rng", "wfxt", "hbc", "gcs"}


def machine_identity() -> str:
    """What GGML_NATIVE=ON makes code for: architecture and the CPU features that decide code, so that a shared cache
    never gives illegal instructions, and an update of kernel or microcode asks for no new build."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    return " ".join([platform.system(), platform.machine(), *cpu_features(cpuinfo)])


def cpu_features(cpuinfo: str) -> list[str]:
    """The features in a /proc/cpuinfo that decide what code a compiler makes, sorted; none where it lists none."""
    x86 = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if x86:
        return sorted(word for word in set(x86[1].split()) if _DECISIVE_X86.fullmatch(word))
    arm = re.search(r"^Features\s*:(.*)$", cpuinfo, re.MULTILINE)
    return sorted(set(arm[1].split()) - _INDECISIVE_ARM) if arm else []


def build_parts(backend: str) -> dict[str, dict[str, str]]:
    """Everything that decides what a build contains, {kind: {name: value}}, in words that `difference` can compare."""
    call_sites = hashlib.sha256(repr(load_patcher()[1]).encode()).hexdigest()
    return {
        "llama.cpp": dict(zip(("package", "version", "sha256"), pin(), strict=True)) | {"call sites": call_sites},
        "option": cmake_options(backend),
        "program": dict.fromkeys([*PROGRAMS, *LIBRARIES], "built"),
        "source": {inside: hashlib.sha256(content).hexdigest() for inside, content in own_sources().items()},
        "CPU feature": dict.fromkeys(machine_identity().split(), "used"),
    }


def runtime_key(backend: str) -> str:
    """Hash of everything that decides what a build contains."""
    return hashlib.sha256(json.dumps(build_parts(backend), sort_keys=True).encode()).hexdigest()[:16]


def difference(earlier: dict, now: dict) -> str:
    """What is not as it was in an earlier build, in words; at most three things of each kind are named."""
    changed = []
    for kind, parts in now.items():
        before = earlier.get(kind, {})
        names = [name for name in {**before, **parts} if before.get(name) != parts.get(name)]
        words = [name if name in before and name in parts else f"{'no ' * (name in before)}{name}" for name in names]
        if words:
            more = f" and {len(words) - 3} more" if len(words) > 3 else ""
            changed.append(f"{kind}{'s' * (len(words) > 1)}: {', '.join(words[:3])}{more}")
    return "; ".join(changed)


def runtime_dir(backend: str) -> Path:
    """Where the finished build of today's sources lies, or will lie."""
    return cache_dir() / "runtime" / f"{backend}-{runtime_key(backend)}"


def is_complete(folder: Path) -> bool:
    """True if the build in `folder` was finished: the marker is written last."""
    return (folder / "complete.json").is_file()


def runtime_path(backend: str = "cpu") -> Path:
    """Folder of the finished build; TacqError that says how to make it, and what has changed since the last build, if
    there is none."""
    folder = runtime_dir(backend)
    if not is_complete(folder):
        raise TacqError(
            f"llama.cpp with the TACQ types is not built yet for this version{_changed(backend)}; run "
            f"'tacq-export runtime build --backend {backend}' (once, about 10 minutes on 2 cores)."
        )
    return folder


def _changed(backend: str) -> str:
    """What the latest other build of `backend` in the cache lacks, in brackets; empty if there is none."""
    markers = sorted(
        (cache_dir() / "runtime").glob(f"{backend}-*/complete.json"), key=lambda path: path.stat().st_mtime
    )
    if not markers:
        return ""
    try:
        parts = json.loads(markers[-1].read_text())["parts"]
    except (ValueError, KeyError, TypeError):
        return " (there is a build of an older version)"
    return f" (changed since {markers[-1].parent.name} was built: {difference(parts, build_parts(backend))})"


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
            for line in process.stdout or ():
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


def collect(build: Path, folder: Path, parts: dict) -> None:
    """Copy programs and libraries from the build folder to `folder`, the marker last: what it was built of."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in sorted((build / "bin").iterdir()):
        if path.name in PROGRAMS or re.match(r"lib[\w-]+\.(so|dylib)|lib[\w-]+[\d.]+\.dylib", path.name):
            shutil.copy2(path, partial / path.name, follow_symlinks=False)
    libraries = [f"lib{name}.so" for name in ("llama", *LIBRARIES)]
    missing = [name for name in [*PROGRAMS, *libraries] if not (partial / name).exists()]
    if missing and platform.system() == "Linux":
        raise TacqError(f"The build made no {missing[0]}; delete {build} and run again.")
    marker = {"pin": pin(), "programs": PROGRAMS, "parts": parts}
    (partial / "complete.json").write_text(json.dumps(marker, indent=1) + "\n")
    partial.rename(folder)


def usable_cpus() -> int:
    """How many CPUs this process may run on; all of the machine where the system cannot say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        copy_own_sources(work_dir() / "cpp_ext")
        folder, parts = runtime_dir(backend), build_parts(backend)  # of the sources just copied: they may be edited
        build = work_dir() / f"build-{backend}"
        log = work_dir() / f"build-{backend}.log"
        say("Configuring llama.cpp ...")
        configure(tree, build, backend, log)
        jobs = jobs or usable_cpus()
        say(f"Building llama.cpp with {jobs} jobs (log: {log}) ...")
        command = [
            find_program("cmake", "install it with 'pip install cmake'."),
            "--build",
            str(build),
            "--parallel",
            str(jobs),
            "--target",
            *PROGRAMS,
            *LIBRARIES,
        ]
        if run_with_progress(command, log, progress or (lambda done, total, what: None)):
            raise failure("Building", log)
        if not is_of_today(work_dir()):
            raise TacqError(
                f"The sources in {work_dir()} were changed by another version of tacq-export while they were "
                "compiled; run the same command again, or give each version a cache of its own (TACQ_EXPORT_CACHE)."
            )
        collect(build, folder, parts)
    say(f"Built: {folder}")
    return folder
