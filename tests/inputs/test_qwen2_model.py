"""The 0.5B model as it is downloaded: slow, because it is half a gigabyte (tools/test --slow)."""

import sys
from pathlib import Path

import pytest

from tacq_export.inputs.load_model import load_model
from tacq_export.reporting import Reporter


@pytest.mark.slow
def test_every_matrix_of_the_real_qwen2_is_linked(tmp_path):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
    from fetch_models import fetch_model

    loaded = load_model(str(fetch_model("qwen2.5-coder-0.5b")), tmp_path, "cpu", Reporter())
    assert len(loaded.linear) == 24 * 7
    assert {t.shape for t in loaded.linear} == {(896, 896), (128, 896), (4864, 896), (896, 4864)}
    assert loaded.embedding.shape == (151936, 896) == loaded.head.shape  # this file has a head of its own
    assert all(t.rows is None for t in loaded.linear)
