"""A system that is neither Linux nor macOS gets one sentence, before anything that only Unix has is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What Windows' Python lacks cannot be imported, and the system says that it is Windows.
PRETEND = "import sys; sys.platform = 'win32'; sys.modules.update(dict.fromkeys(['fcntl', 'resource', 'pwd', 'grp']));"
SENTENCE = "tacq-export runs on Linux and macOS, and this system is 'win32'; on Windows use it inside WSL."


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PRETEND + code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [["model", "--task", "t.jsonl"], ["runtime", "path"], ["inspect", "x.gguf"]])
def test_the_command_line_says_so_in_one_sentence(arguments):
    done = python(f"from tacq_export.cli import main; sys.exit(main({arguments!r}))")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {SENTENCE}\n")


@pytest.mark.parametrize("name", ["export", "ExportConfig", "llama_cpp"])
def test_python_raises_our_error(name):
    done = python(f"import tacq_export\ntry: tacq_export.{name}\nexcept tacq_export.TacqError as error: print(error)")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{SENTENCE}\n", "")


def test_what_the_package_imports_first_needs_nothing_of_unix():
    """Such as what puts the pinned gguf-py in front of sys.path."""
    done = python("import tacq_export, tacq_export.files, tacq_export.runtime.source; print('imported')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported\n", "")
