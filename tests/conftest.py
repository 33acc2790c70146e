"""Fixtures shared by the tests."""

import os

# Read when torch is imported. The matrices here are tiny: on two busy cores a second thread makes them ten times
# slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
from pathlib import Path

import pytest

from tacq_export.errors import TacqError
from tacq_export.runtime.build import runtime_path


@pytest.fixture(scope="session")
def runtime():
    """Folder of our build of llama.cpp: programs and libraries. Without one the test fails and says how to build it."""
    try:
        return runtime_path()
    except TacqError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def model(runtime) -> Path:
    """SmolLM2-135M-Instruct's GGUF, fetched where it is not there yet."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
    from fetch_models import fetch_model

    return fetch_model("smollm2-135m")


@pytest.fixture(scope="session")
def load_tiny(tmp_path_factory):
    """load_tiny(architecture): a tiny Hugging Face folder (tiny_hf.py), loaded and converted; each once in a
    session."""
    from tiny_hf import write_model_folder

    from tacq_export.inputs.load_model import load_model
    from tacq_export.reporting import Reporter

    loaded = {}

    def load(architecture: str):
        if architecture not in loaded:
            folder = tmp_path_factory.mktemp(architecture)
            write_model_folder(folder / "model", architecture)
            (folder / "work").mkdir()
            loaded[architecture] = load_model(str(folder / "model"), folder / "work", "cpu", Reporter())
        return loaded[architecture]

    return load


@pytest.fixture(scope="session")
def tiny_gguf(load_tiny):
    """The tiny llama as an F16 GGUF, which loads in a fraction of a second."""
    return load_tiny("llama").reference_path


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory):
    """A task file of eight short questions and answers."""
    path = tmp_path_factory.mktemp("task") / "sums.jsonl"
    rows = [
        f'{{"question": "how many apples are {i} and {i + 1}", "answer": "{2 * i + 1} apples are left"}}'
        for i in range(8)
    ]
    path.write_text("\n".join(rows) + "\n")
    return path
