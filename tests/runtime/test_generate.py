"""Batched greedy generation: the tokens one-at-a-time decoding would choose, whatever runs beside them."""

from __future__ import annotations

import numpy as np
import pytest

from tacq_export.errors import TacqError
from tacq_export.runtime.generate import LlamaGenerator, generate
from tacq_export.runtime.llama_logits import LlamaLogits

QUESTIONS = ["The capital of France is", "Count on, one number a line:\n1\n2\n3\n4\n", "Once upon a time there was"]


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    with LlamaLogits(model, 256, 1) as one:
        return [one.tokenize(text) for text in QUESTIONS]


@pytest.mark.parametrize("parallel", [1, 2])
def test_each_token_is_the_most_probable_one_after_what_precedes_it(model, prompts, parallel):
    """Three prompts in one or two sequences: the last one takes over a sequence, and must see nothing of its owner
    before."""
    answers = generate(model, prompts, 12, threads=1, parallel=parallel)
    with LlamaLogits(model, 256, 1) as one:
        for prompt, (tokens, text) in zip(prompts, answers, strict=False):
            assert 0 < len(tokens) <= 12 and text == one.text(tokens)
            logits = np.concatenate([chunk.copy() for _, chunk in one.chunks(prompt + tokens)])[len(prompt) - 1 : -1]
            # Batches of other sizes round differently: the token must be a winner but for a near-tie.
            behind = logits.max(1) - logits[np.arange(len(tokens)), tokens]
            assert behind.max() < 0.5, (text, behind)


def test_the_same_call_gives_the_same_answers_and_leaves_nothing_behind(model, prompts):
    seen = []
    with LlamaGenerator(model, 64, 1, parallel=2) as several:
        first = several.generate(prompts, 8, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 3), (2, 3), (3, 3)]
        several.generate(prompts[::-1], 3)
        assert several.generate(prompts, 8) == first
    assert [tokens for tokens, _ in generate(model, prompts, 8, threads=1, parallel=2)] == first


def test_what_a_prompt_shares_with_the_one_before_it_is_not_evaluated_again(model, prompts):
    shared = prompts[1] * 4
    with LlamaGenerator(model, 256, 1, parallel=1) as several:
        evaluated, decode = [], several._decode
        several._decode = lambda entries, wanted: evaluated.append(len(entries)) or decode(entries, wanted)
        several.generate([shared + prompts[0], shared + prompts[2], shared + prompts[2]], 1)
    assert evaluated[0] == len(shared + prompts[0]) and evaluated[1] <= len(prompts[2]) and evaluated[2] == 1


def test_an_answer_ends_with_a_stop_string_and_prompts_are_longer_than_a_chunk(model, prompts):
    long = (prompts[1] * 30)[:300] + prompts[1]  # more than one chunk of 256
    ((tokens, text),) = generate(model, [long], 40, threads=1, stop=("?!", "3\n4"))
    assert text.endswith("3\n4") and text.count("3\n4") == 1
    assert len(tokens) < 40
    assert generate(model, [long], 0, threads=1) == [([], "")]


def test_an_answer_ends_before_an_end_of_generation_token(model):
    with LlamaGenerator(model, 256, 1, parallel=1) as several:
        prompt = several.tokenize("<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\nYes.", special=True)
        (tokens,) = several.generate([prompt], 60)
        assert len(tokens) < 60 and not any(several._lib.llama_vocab_is_eog(several.vocab, token) for token in tokens)


def test_wrong_prompts_and_files_are_one_sentence(model, prompts, tmp_path):
    with pytest.raises(
        TacqError, match="A prompt is empty or has a token outside the 49152 of .*; use the model's own tokenizer."
    ):
        generate(model, [prompts[0], []], 4, threads=1)
    with pytest.raises(TacqError, match="outside the 49152"):
        generate(model, [[49152]], 4, threads=1)
    with (
        LlamaGenerator(model, 256, 1, parallel=1) as several,
        pytest.raises(TacqError, match="A prompt of 200 tokens and 57 of answer do not fit the context of 256"),
    ):
        several.generate([[5] * 200], 57)
    with pytest.raises(TacqError, match="0 sequences side by side are not possible; give from 1 to 256."):
        LlamaGenerator(model, 256, parallel=0)
    with pytest.raises(TacqError, match="There is no file"):
        generate(tmp_path / "none.gguf", prompts, 4)
    assert generate(tmp_path / "none.gguf", [], 4) == []
