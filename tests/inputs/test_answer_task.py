"""`tacq-export answer`: a task file with the model's own answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tacq_export import cli
from tacq_export.errors import TacqError
from tacq_export.inputs.answer_task import answer_task
from tacq_export.inputs.load_task import gguf_tokenizer, load_task, prompt_tokens
from tacq_export.reporting import Reporter
from tacq_export.runtime.generate import generate

N_PREDICT = 24
ROWS = [
    {"question": "Say only the word yes.", "answer": "yes"},
    {
        "messages": [
            {"role": "system", "content": "Answer with one word."},
            {"role": "user", "content": "Which city is the capital of France?"},
            {"role": "assistant", "content": "Paris"},
        ]
    },
    {"question": "Write a long story about the sea.", "answer": "No."},
]


@pytest.fixture
def task(tmp_path) -> Path:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_answers_are_the_models_own_and_those_without_an_end_are_left_out(model, task, tmp_path, capsys):
    outfile = tmp_path / "own.jsonl"
    assert (
        cli.main(
            [
                "answer",
                str(model),
                "--task",
                str(task),
                "--outfile",
                str(outfile),
                "--n-predict",
                str(N_PREDICT),
                "--threads",
                "1",
            ]
        )
        == 0
    )
    examples, tokenizer = load_task(task).examples, gguf_tokenizer(model)
    answers = generate(model, [prompt_tokens(e, tokenizer) for e in examples], N_PREDICT, 1)
    ended = [i for i, (tokens, _) in enumerate(answers) if len(tokens) < N_PREDICT]
    assert ended and 2 not in ended, "the story is longer"
    found = load_task(outfile).examples
    assert [e.messages for e in found] == [
        (*examples[i].messages[:-1], {"role": "assistant", "content": answers[i][1]}) for i in ended
    ]
    assert f"{len(ended)} answers; {3 - len(ended)} were longer than {N_PREDICT} tokens" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.jsonl", "task.jsonl"]
    assert cli.main(["answer", str(model), "--task", str(task), "--outfile", str(outfile)]) == 1
    assert "own.jsonl exists" in capsys.readouterr().err


def test_a_hugging_face_folder_is_converted_and_nothing_is_left_of_it(load_tiny, runtime, task, tmp_path):
    """The tiny model knows no end, so no answer ends: an error, without an output."""
    folder = load_tiny("llama").reference_path.parent.parent / "model"
    with pytest.raises(TacqError, match="None of 2 answers ended within 4 tokens"):
        answer_task(str(folder), task, tmp_path / "own.jsonl", 2, 4, 1, Reporter())
    assert [path.name for path in tmp_path.iterdir()] == ["task.jsonl"]


def test_what_has_no_question_cannot_be_answered(tiny_gguf, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("some words")
    with pytest.raises(TacqError, match="Example 1 of .*plain.txt has no question and answer"):
        answer_task(str(tiny_gguf), plain, tmp_path / "own.jsonl", 1, 4, 1, Reporter())
