"""Running a GGUF with our llama.cpp: as a program (`run`) and as the Python module (`llama_cpp`)."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

from ..errors import TacqError
from .build import runtime_path, tool
from .source import pin

INSTALL = "CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --no-binary llama-cpp-python llama-cpp-python=={version}"


def llama_cpp(backend: str = "cpu") -> ModuleType:
    """The module `llama_cpp` of an unmodified llama-cpp-python, bound to our libraries, so that it reads the TACQ
    types.

    The binding happens when the module is imported for the first time in a process, so call this before anything else
    imports it. Raises TacqError if the runtime is not built, llama-cpp-python is missing or of another version than the
    pinned source, or the module is already bound to other libraries.
    """
    libraries = runtime_path(backend)
    package, pinned, _ = pin()
    install = INSTALL.format(version=pinned)
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise TacqError(f"{package} is not installed; install it without libraries of its own: {install}") from None
    if found != pinned:
        raise TacqError(
            f"{package} {found} is installed and our libraries are those of {pinned}; install that one: {install}"
        )
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is None:
        # Read once, at import; put back so that a program started from here is not bound to our libraries unasked.
        # llama-cpp-python's chat handlers for images import mtmd_cpp, later and from a variable of its own.
        before = {name: os.environ.get(name) for name in ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")}
        os.environ.update(dict.fromkeys(before, str(libraries)))
        try:
            importlib.import_module("llama_cpp")
            importlib.import_module("llama_cpp.mtmd_cpp")
        except (OSError, RuntimeError) as error:
            raise TacqError(
                f"The libraries in {libraries} do not load ({error}); delete that folder and build again."
            ) from error
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        loaded = sys.modules["llama_cpp.llama_cpp"]
    bound = Path(loaded._lib._name).resolve().parent
    if bound != libraries.resolve():
        raise TacqError(
            f"llama_cpp was imported before and is bound to {bound}, which cannot read the TACQ types; "
            "call tacq_export.llama_cpp() before any 'import llama_cpp'."
        )
    return sys.modules["llama_cpp"]


def run(
    file: Path | str,
    prompt: str,
    n_predict: int = 256,
    threads: int | None = None,
    ctx_size: int = 4096,
    temperature: float = 0.0,
    backend: str = "cpu",
    extra: list[str] | None = None,
    capture: bool = False,
) -> str:
    """Answer one prompt in the model's chat template with llama-completion, streaming to stdout, and return the answer.

    capture: return the text only, print nothing. extra: more llama.cpp flags, passed on as they are.
    Raises TacqError with llama.cpp's own reason if the model does not load or the program fails.
    """
    if not Path(file).is_file():
        raise TacqError(f"There is no file {file}; give the path of a GGUF.")
    command = [str(tool("llama-completion", backend)), *run_arguments(file, prompt, n_predict, ctx_size, temperature)]
    command += (["-t", str(threads)] if threads else []) + (extra or [])
    pieces = []
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        output, log = process.stdout, process.stderr
        assert output is not None and log is not None  # both are pipes
        errors: list[bytes] = []
        reader = threading.Thread(target=lambda: errors.extend(log))
        reader.start()
        while piece := os.read(output.fileno(), 4096):
            pieces.append(piece)
            if not capture:
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
        reader.join()
    if process.returncode:
        raise TacqError(
            f"llama-completion could not run {file}: {last_error(b''.join(errors).decode(errors='replace'))}"
        )
    return b"".join(pieces).decode(errors="replace")


def run_arguments(file: Path | str, prompt: str, n_predict: int, ctx_size: int, temperature: float) -> list[str]:
    """What llama-completion gets: one user turn in the chat template if the file has one, plain completion if not; then
    it exits. Without --jinja it aborts at a template that is none of the forty or so that it knows by heart."""
    arguments = ["-m", str(file), "-p", prompt, "-n", str(n_predict), "-c", str(ctx_size), "--temp", str(temperature)]
    return [*arguments, "--jinja", "--single-turn", "--no-display-prompt", "--simple-io", "--no-perf", "--no-warmup"]


_ERROR = re.compile(r"[\d.]+ E ")  # seconds, and the level of the line


def last_error(log: str) -> str:
    """The line of a llama.cpp log that says why it failed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if _ERROR.match(line)] or lines
    causes = [
        line for line in lines if "error" in line.lower() or "invalid" in line.lower() or "failed" in line.lower()
    ]
    return (causes or lines or ["no output"])[0][:400]
