"""The whole way of a dozen architectures: exported, near its own reference, and torch and llama.cpp compute the same.
tools/check_architectures does the same for all of architecture_table.py."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import check_architectures  # noqa: E402
from check_architectures import TORCH_LIMIT, in_own_process, parse, table, wrong_file  # noqa: E402

# Each for its kind: experts and shared ones, MLA, state space, convolutions, linear attention, transposed matrices, a
# wrapper, windows, rope scaling.
NAMES = [
    "LlamaForCausalLM",
    "Phi3ForCausalLM",
    "GPT2LMHeadModel",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "Llama4ForCausalLM",
    "Qwen3_5ForCausalLM",
    "MambaForCausalLM",
    "Lfm2ForCausalLM",
    "Gemma3ForConditionalGeneration",
]


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_exported_and_runs(name, runtime, tmp_path):
    row = in_own_process(name, tmp_path / name, parse(["--timeout", "300"]))
    assert row["outcome"] == "exported", (row, Path(row["log"]).read_text()[-2000:])
    assert 0 < row["kl"] < 1.5 * row["q4_kl"] + 0.1 and row["torch_kl_best"] < TORCH_LIMIT


# -- the tool itself: what goes wrong in one process does not end the run, and is no success
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accident", "outcome", "sentence"),
    [
        (lambda: os.kill(os.getpid(), 9), "crash", "the process ended with status -9"),
        (lambda: os._exit(3), "crash", "the process ended with status 3"),
        (lambda: time.sleep(60), "timeout", "took more than 1 s"),
        (lambda: [][0], "traceback", "IndexError: list index out of range (test_architectures.py:"),
        (lambda: sys.exit("no"), "crash", "the process ended with status 1"),
    ],
    ids=["signal", "exit", "endless", "error", "sys.exit"],
)
def test_what_goes_wrong_in_one_process_is_a_row_of_the_table(monkeypatch, tmp_path, accident, outcome, sentence):
    monkeypatch.setattr(check_architectures, "check", lambda *_: accident())
    row = in_own_process("LlamaForCausalLM", tmp_path / "x", parse(["--timeout", "1"]))
    assert row["outcome"] == outcome and row["sentence"].startswith(sentence) and row["total_seconds"] < 30
    assert f"| LlamaForCausalLM | {outcome} |" in table([row])[2]


def test_a_file_that_is_wrong_is_no_success(monkeypatch, tmp_path, capsys):
    good = {"torch_kl_best": 1e-6, "kl": 0.1, "q4_kl": 0.1}
    assert wrong_file(good) == {}
    for bad in (
        {"torch_kl_best": 0.01},
        {"torch_kl_best": float("nan")},
        {"kl": 2.0},
        {"kl": float("nan")},
        {"measured": "x"},
    ):
        assert wrong_file(good | bad)["outcome"] == "wrong", bad
    outcomes = iter(["exported", "refused", "wrong"])
    monkeypatch.setattr(
        check_architectures,
        "in_own_process",
        lambda name, *_: {"name": name, "outcome": next(outcomes), "total_seconds": 1.0},
    )
    names = ["LlamaForCausalLM", "MixtralForCausalLM", "MambaForCausalLM"]
    args = parse(["--only", *names, "--outfile-json", str(tmp_path / "rows")])
    with pytest.raises(check_architectures.TacqError, match="^1 went as they should not: "):
        check_architectures.main(args)
    assert "3 tried: 1 exported, 1 refused, 1 wrong." in capsys.readouterr().out.splitlines()
    assert len((tmp_path / "rows").read_text().splitlines()) >= 3


def test_names_are_found_by_a_part_and_wrong_ones_are_named(capsys):
    assert parse(["--only", "mixtral", "Qwen2M"]).names == ["Qwen2MoeForCausalLM", "MixtralForCausalLM"]
    assert len(parse([]).names) >= 75
    with pytest.raises(SystemExit):
        parse(["--only", "Nonsense"])
    assert "no architecture has Nonsense in its name" in capsys.readouterr().err
