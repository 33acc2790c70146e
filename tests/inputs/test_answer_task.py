"""`tacq-export answer`: a task file with the model's own answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tiny_hf import VOCAB, write_model_folder

from tacq_export import cli
from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import open_gguf
from tacq_export.format.write_gguf import copied, write_gguf
from tacq_export.inputs.answer_task import answer_task
from tacq_export.inputs.load_task import load_task
from tacq_export.inputs.tokenize_task import prompt_tokens, tokenize_answers, tokenize_task
from tacq_export.inputs.tokenizer import ModelTokenizer
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
    examples, tokenizer = load_task(task).examples, ModelTokenizer(model)
    answers = generate(model, [prompt_tokens(e, tokenizer) for e in examples], N_PREDICT, 1)
    ended = [i for i, (tokens, _) in enumerate(answers) if len(tokens) < N_PREDICT]
    assert ended and 2 not in ended, "the story is longer"
    found = load_task(outfile).examples
    assert [e.messages for e in found] == [
        (*examples[i].messages[:-1], {"role": "assistant", "content": answers[i][1]}) for i in ended
    ]
    end = tokenizer.encode("<|im_end|>")
    assert [list(e.answer_tokens) for e in found] == [answers[i][0] + end for i in ended], "its end is kept"
    assert {e.vocabulary for e in found} == {tokenizer.vocabulary}
    texts, begins = tokenize_answers(load_task(outfile), tokenizer, 3, 2048)
    assert texts == [prompt_tokens(examples[i], tokenizer) + answers[i][0] + end for i in ended]
    assert begins == [len(prompt_tokens(examples[i], tokenizer)) for i in ended]
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


THINKS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% else %}"
    "<|im_start|>assistant\n{{ m.content.split('e')[-1] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def cutting(model, tmp_path_factory) -> Path:
    """The model with a template that cuts everything up to the last "e" out of the assistant's turns, as templates of
    models that think do with their thoughts."""
    reader, outfile = open_gguf(model), tmp_path_factory.mktemp("cutting") / "cutting.gguf"
    write_gguf(outfile, reader, [copied(t) for t in reader.tensors], {"tokenizer.chat_template": THINKS}, Reporter())
    return outfile


def test_a_template_that_cuts_the_answer_changes_nothing(cutting, task, tmp_path):
    outfile, tokenizer = tmp_path / "own.jsonl", ModelTokenizer(cutting)
    answer_task(str(cutting), task, outfile, 2, 24, 1, Reporter())
    own = load_task(outfile)
    whole, (texts, begins) = tokenize_task(own, tokenizer, 3, 2048), tokenize_answers(own, tokenizer, 3, 2048)
    assert whole == texts and own.examples
    for example, tokens, begin in zip(own.examples, texts, begins, strict=True):
        assert tuple(tokens[begin:]) == example.answer_tokens and tokens[:begin] == prompt_tokens(example, tokenizer)
        assert tokenizer.text(tokens[begin:]) == example.messages[-1]["content"]
        assert example.messages[-1]["content"] not in tokenizer.render(example.messages), "the template does cut it"


def small(**more) -> dict:
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    return sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128} | more


@pytest.mark.parametrize("name", ["SmolLM3", "Granite"])
def test_models_whose_gguf_transformers_cannot_read_are_answered(name, runtime, tmp_path):
    """The tokenizer of their GGUF, that is; the tiny model knows no end, so that is where it stops."""
    config = getattr(transformers, name + "Config")(**small(bos_token_id=1, eos_token_id=2, pad_token_id=0))
    model = getattr(transformers, name + "ForCausalLM")(config)
    write_model_folder(tmp_path / "model", "", model=model)
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(TacqError, match="None of 1 answers ended within 4 tokens"):
        answer_task(str(tmp_path / "model"), task, tmp_path / "own.jsonl", 1, 4, 1, Reporter())


def test_tools_that_the_template_leaves_out_name_the_example(model, task, tmp_path):
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    rows[1]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        TacqError, match="^Example 2 of the task 'task': the model's chat template leaves out the tools"
    ):
        answer_task(str(model), task, tmp_path / "own.jsonl", 3, 4, 1, Reporter())
    assert [path.name for path in tmp_path.iterdir()] == ["task.jsonl"]


def test_columns_of_a_table_are_read(model, tmp_path, capsys):
    table, outfile = tmp_path / "t.csv", tmp_path / "own.jsonl"
    table.write_text("Q,A,extra\nSay only the word yes.,yes,1\n")
    command = ["answer", str(model), "--task", str(table), "--outfile", str(outfile), "--threads", "1"]
    assert cli.main([*command, "--columns", "prompt=Q,completion=B"]) == 1
    assert "t.csv, line 2: has no column 'B', which --columns names; it has Q, A, extra" in capsys.readouterr().err
    assert cli.main([*command, "--columns", "Q=prompt"]) == 1
    assert "--columns has 'Q=prompt', expected KEY=COLUMN pairs such as prompt=Q" in capsys.readouterr().err
    assert cli.main([*command, "--columns", "prompt=Q,completion=A", "--n-predict", "24"]) == 0
    assert load_task(outfile).examples[0].messages[0]["content"] == "Say only the word yes."
