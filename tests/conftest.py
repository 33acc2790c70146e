"""Fixtures shared by the tests."""

import pytest

from tacq_export.errors import TacqError
from tacq_export.runtime import runtime_path


@pytest.fixture(scope="session")
def runtime():
    """Folder of our build of llama.cpp: programs and libraries. Without one the test fails and says how to build it."""
    try:
        return runtime_path()
    except TacqError as error:
        pytest.fail(str(error), pytrace=False)
