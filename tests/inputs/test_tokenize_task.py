"""Examples to token lists, with a tokenizer that can be followed by hand (words.py)."""

from __future__ import annotations

import pytest
from words import Words

from tacq_export.errors import TacqError
from tacq_export.inputs.load_task import Example, Task
from tacq_export.inputs.task_files import PlainText
from tacq_export.inputs.tokenize_task import (
    calibration_text,
    prompt_tokens,
    render_example,
    tokenize_answers,
    tokenize_task,
    tokens_sha256,
)

USER_AND_ASSISTANT = ({"role": "user", "content": "what is 2 and 3"}, {"role": "assistant", "content": "it is 5"})
IN_THE_TEMPLATE = ["BOS", "<user>", "what", "is", "2", "and", "3", "<assistant>", "it", "is", "5"]


@pytest.fixture
def plain(tmp_path):
    """plain(text): a task of one plain text."""

    def make(text: str) -> Task:
        (tmp_path / "t.txt").write_text(text)
        return Task("t", [], PlainText(tmp_path / "t.txt"))

    return make


def test_conversations_go_through_the_template():
    words = Words()
    task = Task("t", [Example(messages=USER_AND_ASSISTANT)])
    assert words.words(tokenize_task(task, words, 5, 100)[0]) == IN_THE_TEMPLATE


def test_text_examples_are_taken_as_they_are_also_with_a_template():
    words = Words()
    assert words.words(tokenize_task(Task("t", [Example(text="a b c")]), words, 5, 100)[0]) == ["BOS", "a", "b", "c"]


def test_an_error_of_the_template_names_the_example():
    task = Task("t", [Example(text="a b"), Example(messages=({"role": "nobody", "content": "x"},))])
    with pytest.raises(
        TacqError,
        match=r"^Example 2 of the task 't': the model's chat template refuses it \(Conversation roles must alternate\)",
    ):
        tokenize_task(task, Words(), 5, 100)


def test_the_first_n_examples_are_taken_and_cut():
    words = Words()
    task = Task("t", [Example(text=f"{i} b c d e f") for i in range(6)])
    found = tokenize_task(task, words, 3, 4)
    assert [words.words(t) for t in found] == [["BOS", str(i), "b", "c"] for i in range(3)]


def test_examples_of_one_token_are_left_out_and_none_at_all_is_refused():
    words = Words(template=False)
    short, long = Example(messages=({"role": "user", "content": ""},)), Example(text="a b")
    assert len(tokenize_task(Task("t", [short, long]), words, 5, 100)) == 1
    with pytest.raises(TacqError, match="The task 't' has no example of at least two tokens; give longer ones."):
        tokenize_task(Task("t", [short, short]), words, 5, 100)


@pytest.mark.parametrize(
    ("template", "asked"),
    [(True, "BOS <user> what is 2 and 3 <assistant>"), (False, "BOS what is 2 and 3")],
)
def test_an_answer_begins_behind_what_the_model_is_asked(template, asked):
    words = Words(template)
    task = Task("t", [Example(messages=USER_AND_ASSISTANT)] * 2)
    texts, begins = tokenize_answers(task, words, 5, 100)
    assert texts == tokenize_task(task, words, 5, 100) and len(begins) == 2
    assert words.words(texts[0][: begins[0]]) == asked.split()
    assert words.words(texts[0][begins[0] :]) == ["it", "is", "5"]
    assert words.words(prompt_tokens(task.examples[0], words)) == asked.split()


def test_an_answer_that_seq_len_cuts_off_is_left_out():
    words = Words()
    short = Example(messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "it is 5"}))
    task = Task("t", [Example(messages=USER_AND_ASSISTANT), short])
    texts, begins = tokenize_answers(task, words, 5, 6)
    assert [words.words(t) for t in texts] == [["BOS", "<user>", "hi", "<assistant>", "it", "is"]] and begins == [4]
    with pytest.raises(TacqError, match="No answer of the task 't' begins within 4 tokens; give a larger --seq-len."):
        tokenize_answers(task, words, 5, 4)


@pytest.mark.parametrize("kind", ["text", "plain text", "no answer"])
def test_examples_without_an_answer_are_named(kind, plain):
    tasks = {
        "text": Task("t", [Example(text="a b c")]),
        "plain text": plain("a b c"),
        "no answer": Task("t", [Example(messages=USER_AND_ASSISTANT[:1])]),
    }
    with pytest.raises(
        TacqError, match="Example 1 of the task 't' has no assistant's turn at its end; use --loss text."
    ):
        tokenize_answers(tasks[kind], Words(), 5, 100)


def test_plain_text_is_cut_into_consecutive_windows(plain):
    words = Words()
    task = plain(" ".join(f"w{i}" for i in range(22)))
    windows = [words.words(t) for t in tokenize_task(task, words, 100, 8)]
    everything = ["BOS"] + [f"w{i}" for i in range(22)]
    assert windows == [everything[0:8], everything[8:16], everything[16:23]]
    assert len(tokenize_task(task, words, 2, 8)) == 2
    assert calibration_text(task, words, 2, 8) == " ".join(everything[:8]) + " ".join(everything[8:16])
    exact = plain(" ".join("w" for _ in range(16)))  # 17 tokens: the last window has one only
    assert [len(t) for t in tokenize_task(exact, words, 100, 8)] == [8, 8]


def test_the_prompt_needs_an_answer_behind_it():
    for other in (Example(text="a b"), Example(messages=USER_AND_ASSISTANT[:1])):
        with pytest.raises(TacqError, match="has no assistant's turn at its end"):
            prompt_tokens(other, Words())


def written(words: Words, answer: str, **changes) -> Example:
    """An example as `tacq-export answer` writes it, its answer token by token."""
    tokens = tuple(words.encode(answer)[1:])
    messages = (USER_AND_ASSISTANT[0], {"role": "assistant", "content": answer})
    return Example(**({"messages": messages, "answer_tokens": tokens, "vocabulary": words.vocabulary} | changes))


def test_what_the_model_wrote_is_taken_token_by_token():
    """The template here would print the answer; with its tokens given, it is not asked to."""
    words = Words()
    example = written(words, "so 5 <end>")
    words.render = lambda messages, tools=(), ask=False: "question <assistant>" if ask else pytest.fail("rendered")
    texts, begins = tokenize_answers(Task("t", [example]), words, 5, 100)
    assert words.words(texts[0]) == ["BOS", "question", "<assistant>", "so", "5", "<end>"] and begins == [3]
    assert tokenize_task(Task("t", [example]), words, 5, 5) == [texts[0][:5]]
    assert render_example(example, words) == "BOS question <assistant> so 5 <end>"


def test_tokens_of_another_vocabulary_or_of_an_answer_that_was_edited_are_refused():
    words = Words()
    good = written(words, "so 5")
    for changes, message in [
        (
            {"vocabulary": "another"},
            r"^Example 2 of the task 't': its answer was written with another vocabulary \(named ",
        ),
        (
            {"messages": (USER_AND_ASSISTANT[0], {"role": "assistant", "content": "so 6"})},
            "Example 2 of the task 't': its last turn is not what its \"tokens\" stand for; it was changed",
        ),
    ]:
        task = Task("t", [good, written(words, "so 5", **changes)])
        for tokenize in (tokenize_task, tokenize_answers):
            with pytest.raises(TacqError, match=message):
                tokenize(task, words, 5, 100)


def test_a_token_beyond_the_embedding_names_the_example():
    words = Words()
    words.n_rows = 14
    task = Task("t", [Example(text="a b"), Example(text="c d e f")])
    with pytest.raises(TacqError, match="^Example 2 of the task 't' has the token 15."):
        tokenize_task(task, words, 5, 100)


def test_the_hash_names_tokens_and_where_answers_begin():
    hashes = [
        tokens_sha256(texts, begins)
        for texts, begins in [([[1, 2], [3]], None), ([[1, 2], [3]], [1, 0]), ([[1], [2, 3]], None), ([[1, 2]], None)]
    ]
    assert len(set(hashes)) == 4 and hashes[0] == tokens_sha256(((1, 2), (3,)), None)
