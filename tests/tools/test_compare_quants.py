"""tools/compare_quants.py on a tiny model: exports, measures, writes its results, and does nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tacq_export.evaluation.compare_stock

KEYS = ["name", "file_bytes", "bpw_linear", "kl", "ppl", "top1", "gsm8k", "spider", "wikitext2_ppl"]


@pytest.fixture
def task(tmp_path):
    """Enough text for llama-imatrix's window of 512 tokens."""
    path = tmp_path / "sums.jsonl"
    rows = [
        {"question": f"how many apples are {i} and {i + 1}", "answer": f"{2 * i + 1} apples are left #### {2 * i + 1}"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def quants(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    import compare_quants

    return compare_quants


@pytest.fixture
def data(tmp_path, task):
    """A folder as --data expects it."""
    folder = tmp_path / "data"
    for name, content in (
        ("gsm8k/test.jsonl", task.read_text()),
        (
            "spider/eval.jsonl",
            json.dumps({"db_id": "zoo", "question": "how many pets are there", "query": "SELECT count(*) FROM pets"})
            + "\n",
        ),
        ("spider/schemas.json", json.dumps({"zoo": "CREATE TABLE pets (id INTEGER PRIMARY KEY, name TEXT)"})),
        ("wikitext2/test.raw", "a train leaves the station at nine and arrives at noon\n" * 60),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_compare_quants_writes_rows_and_picture(quants, data, task, tiny_gguf, tmp_path, capsys, monkeypatch):
    arguments = [
        str(tiny_gguf),
        "--name",
        "tiny",
        "--target-bpw",
        "2.5",
        "3.25",
        "--task",
        str(task),
        "--n-samples",
        "40",
        "--n-eval",
        "2",
        "--n-gsm8k",
        "2",
        "--n-spider",
        "1",
    ]
    arguments += [
        "--n-windows",
        "1",
        "--types",
        "Q4_0",
        "--emulate",
        "Q2_K",
        "--data",
        str(data),
        "-w",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "results"),
        "-t",
        "1",
    ]
    assert quants.main(arguments + ["--", "--refine-sweeps", "0"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    rows = json.loads(line)
    assert [row["name"] for row in rows] == ["reference, F16", "tacq-2.5", "tacq-3.25", "Q4_0", "Q2_K (emulated)"]
    assert all(row[key] is not None for row in rows for key in KEYS)
    assert (
        2.25 <= rows[1]["bpw_linear"] <= 2.5 < rows[2]["bpw_linear"] <= 3.25
        and rows[1]["file_bytes"] < rows[2]["file_bytes"]
    )
    assert json.loads((tmp_path / "results" / "compare-tiny.json").read_text()) == rows
    assert (tmp_path / "results" / "compare-tiny.png").read_bytes()[:4] == b"\x89PNG"
    # Again: nothing is exported, made or measured.
    monkeypatch.setattr(quants.subprocess, "run", lambda *_: pytest.fail("exported again"))
    monkeypatch.setattr(
        tacq_export.evaluation.compare_stock, "compare_models", lambda *_, **__: pytest.fail("measured again")
    )
    assert (
        quants.main(arguments + ["--", "--refine-sweeps", "0"]) == 0
        and capsys.readouterr().out.splitlines()[-1] == line
    )
    assert quants.main(arguments) == 1
    assert "tacq-2.5.gguf was exported with other options" in capsys.readouterr().err


def test_compare_quants_says_what_is_missing(quants, data, task, tiny_gguf, tmp_path, capsys, runtime):
    for more, message in (
        (["--n-spider", "1"], "give --data a folder with spider/eval.jsonl"),
        (["--n-gsm8k", "25"], "25 examples are asked for and tools/data has 24"),
        (["--data", str(tmp_path)], "has no gsm8k/test.jsonl"),
        (["--task", str(tmp_path / "gone.jsonl")], "gone.jsonl"),
        (["--types", "none", "--emulate", "x", "--data", str(data)], "'x' cannot be emulated"),
        (
            ["--target-bpw", "2.5", "--eval", str(data / "wikitext2" / "test.raw"), "--loss", "answer"],
            "has no assistant's turn at its end",
        ),
    ):
        assert (
            quants.main([str(tiny_gguf), "-w", str(tmp_path / "work"), "--out", str(tmp_path / "results"), *more]) == 1
        )
        captured = capsys.readouterr()
        assert (
            message in captured.err
            and captured.err.count("error: ") == 1
            and "Traceback" not in captured.err
            and captured.out == ""
        )
    assert not (tmp_path / "results").exists() and not (tmp_path / "work").exists(), "found before anything is made"
