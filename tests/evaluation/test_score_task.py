"""Task scores: answers found in text, intervals against worked numbers, and GSM8K through the real model."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from tacq_export.errors import TacqError
from tacq_export.evaluation import score_task
from tacq_export.evaluation.score_task import TaskScore, final_number, retention, score_gsm8k, wilson
from tacq_export.inputs.load_task import Example
from tacq_export.inputs.tokenize_task import example_tokens, prompt_tokens
from tacq_export.inputs.tokenizer import ModelTokenizer

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = ROOT / "tools" / "data" / "gsm8k-test-24.jsonl"

ANSWERS = {
    "9 * 2 = $<<9*2=18>>18 a day.\n#### 18": "18",
    "#### 5\nno, wait\n#### $1,800.00.": "1800",
    "so she has \\boxed{42} apples, not 43": "42",
    "in dollars \\boxed{\\$1,000}, as in \\boxed{12}": "12",
    "16 - 3 - 4 = 9, times $2 is **$18.00**.": "18",
    "The profit is $70,000.": "70000",
    "it grew by 150%": "150",
    "10-4": "4",
    "5 - 8 = -3": "-3",
    "5 \u2212 8 = \u22123": "-3",
    "he loses -$5": "-5",
    "half of it is .5": "0.5",
    "#### none; 7 in all": "7",
    "####": None,
    "I do not know.": None,
    "": None,
}


@pytest.mark.parametrize("text", ANSWERS)
def test_the_number_in_an_answer(text):
    assert final_number(text) == (None if ANSWERS[text] is None else Decimal(ANSWERS[text]))


def test_wilson_intervals():
    # Worked by hand for 8 of 10: centre .8 + .192 = .992, half 1.96 sqrt(.016 + .0096) = .3137, over 1.3841.
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    score = TaskScore((True,) * 8 + (False,) * 2)
    assert (score.n, score.correct, score.accuracy) == (10, 8, 0.8) and (score.low, score.high) == wilson(8, 10)
    with pytest.raises(TacqError, match="needs at least one example"):
        TaskScore(())


def test_retention_is_paired():
    reference = TaskScore((True, False) * 50)
    assert retention(reference, reference) == score_task.Retention(1, 1, 1)
    # 40 of the reference's 50, no others: the ratio's standard error is about sqrt(.8 * .2 / 50) = .057.
    candidate = TaskScore(tuple(hit and i >= 20 for i, hit in enumerate(reference.hits)))
    found = retention(candidate, reference)
    assert (
        found.ratio == 0.8
        and found.low == pytest.approx(0.8 - 0.111, abs=0.03)
        and found.high == pytest.approx(0.8 + 0.111, abs=0.03)
    )
    assert retention(candidate, reference) == found
    # As many right answers on other questions: the same ratio, a wider interval.
    others = TaskScore(candidate.hits[50:] + candidate.hits[:50][::-1])
    wide = retention(others, reference)
    assert wide.ratio == 0.8 and wide.high - wide.low > found.high - found.low


def test_retention_needs_the_same_examples_and_something_to_keep():
    with pytest.raises(TacqError, match="The two scores have 2 and 1 examples; score both files on the same ones."):
        retention(TaskScore((True, True)), TaskScore((True,)))
    with pytest.raises(TacqError, match="The reference has none of 2 right"):
        retention(TaskScore((True, True)), TaskScore((False, False)))


@pytest.fixture(scope="module")
def tokenizer(model):
    return ModelTokenizer(model)


def test_the_prompt_is_the_beginning_of_what_calibration_sees(tokenizer):
    example = Example(
        messages=({"role": "user", "content": "How much is 2 + 3?"}, {"role": "assistant", "content": "5"})
    )
    prompt = prompt_tokens(example, tokenizer)
    whole = example_tokens(example, tokenizer)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.text(prompt, special=True).endswith("<|im_start|>assistant\n")


def test_gsm8k_with_the_real_model(model, tokenizer):
    seen = []
    score = score_gsm8k(
        model, HELD_OUT, 2, tokenizer, 1, n_predict=24, parallel=2, progress=lambda *step: seen.append(step)
    )
    assert (
        score.n == 2 and len(score.answers) == 2 and all(score.answers) and 0 <= score.cut <= 2 and seen[-1] == (2, 2)
    )


def test_gsm8k_compares_numbers(monkeypatch, tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [f'{{"question": "how much is {i} thousand", "answer": "it is\\n#### {i},000"}}' for i in range(1, 5)]
    path.write_text("\n".join(rows))
    replies = ["$1000.00.", "2", "no idea"]
    monkeypatch.setattr(score_task, "prompt_tokens", lambda example, tokenizer: [len(example.messages[0]["content"])])
    monkeypatch.setattr(
        score_task,
        "generate",
        lambda file, prompts, n_predict, *_: [([1] * (n_predict if "idea" in text else 2), text) for text in replies],
    )
    score = score_gsm8k("none.gguf", path, 3, None, n_predict=5)
    assert score == TaskScore((True, False, False), tuple(replies), cuts=(False, False, True)) and score.cut == 1


def test_a_row_without_a_gold_number_is_named(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"question": "q", "answer": "#### 5"}\n{"question": "q", "answer": "5"}\n')
    with pytest.raises(TacqError, match=r'sums.jsonl, line 2: the "answer" has no "#### number" at its end'):
        score_gsm8k("none.gguf", path, 5, None)
