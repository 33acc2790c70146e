"""Examples to token lists: what is calibrated on, what is measured, and what a model is asked.

All of it goes through ModelTokenizer, so the ids are llama.cpp's. What the model wrote itself ("tokens" in a row, see
load_task.py) is taken as it wrote it: the prompt, and behind it those ids. A template that cuts thinking out of old
turns, or a text that is tokenized otherwise than it was written, changes nothing there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import TacqError
from .load_task import Example, Task
from .tokenizer import ModelTokenizer


@contextmanager
def example_named(task: Task | str, number: int) -> Iterator[None]:
    """A TacqError that is raised inside says which example it is about (counted from 1)."""
    name = task if isinstance(task, str) else task.name
    try:
        yield
    except TacqError as error:
        raise TacqError(f"Example {number} of the task '{name}': {str(error).rstrip('.')}.") from None


def render_example(example: Example, tokenizer: ModelTokenizer) -> str:
    """The text of an example, in the chat template if it is a conversation. Raises TacqError as the template does."""
    if not example.messages:
        return example.text
    if example.answer_tokens:
        return tokenizer.text(example_tokens(example, tokenizer), special=True)
    return tokenizer.render(example.messages, example.tools)


def calibration_text(task: Task, tokenizer: ModelTokenizer, n_samples: int, seq_len: int) -> str:
    """What a task is calibrated on, as text for programs that make tokens of it themselves (llama-imatrix)."""
    if task.packed:
        windows = tokenize_task(task, tokenizer, n_samples, seq_len)
        return "".join(tokenizer.text(window, special=True) for window in windows)
    texts = []
    for number, example in enumerate(task.examples[:n_samples], 1):
        with example_named(task, number):
            texts.append(render_example(example, tokenizer))
    return "\n".join(texts)


def prompt_tokens(example: Example, tokenizer: ModelTokenizer) -> list[int]:
    """Tokens of a conversation up to where the assistant's last turn begins: what a model is asked, in calibration's
    template.

    Without a template it is the turns before, each ended by a newline. Raises TacqError if there is no such turn.
    """
    if not example.has_answer:
        raise TacqError(
            "The example has no assistant's turn at its end to compare an answer with; give question and answer."
        )
    return tokenizer.encode_chat(example.messages[:-1], example.tools, ask=True)


def example_tokens(example: Example, tokenizer: ModelTokenizer, limit: int | None = None) -> list[int]:
    """Tokens of an example, or the first `limit` of them.

    Raises TacqError if its answer was written with another vocabulary, or was changed since.
    """
    if example.answer_tokens:
        _check_answer(example, tokenizer)
        return [*prompt_tokens(example, tokenizer), *example.answer_tokens][:limit]
    if example.messages:
        return tokenizer.encode_chat(example.messages, example.tools, limit=limit)
    return tokenizer.encode(example.text, limit)


def _check_answer(example: Example, tokenizer: ModelTokenizer) -> None:
    if example.vocabulary != tokenizer.vocabulary:
        raise TacqError(
            f"its answer was written with another vocabulary (named {example.vocabulary}) than that of "
            f"{tokenizer.path.name} ({tokenizer.vocabulary}); let this model answer ('tacq-export answer'), or delete "
            '"tokens" from the rows'
        )
    tokenizer.check_rows(example.answer_tokens, "its answer")
    if tokenizer.text(example.answer_tokens) != example.messages[-1]["content"]:
        raise TacqError(
            'its last turn is not what its "tokens" stand for; it was changed, so delete "tokens" from that row'
        )


def tokenize_task(task: Task, tokenizer: ModelTokenizer, n_samples: int, seq_len: int) -> list[list[int]]:
    """Token lists of the first `n_samples` examples (or windows of a plain text), each at most `seq_len` long.

    Raises TacqError if no example has two tokens: there would be nothing to predict.
    """
    if task.text is not None:
        tokens = tokenizer.encode_head(task.text.head, n_samples * seq_len)
        tokenizer.check_rows(tokens, f"The text of the task '{task.name}'")
        texts = [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)]
    else:
        texts = []
        for number, example in enumerate(task.examples[:n_samples], 1):
            with example_named(task, number):
                texts.append(example_tokens(example, tokenizer, seq_len))
            tokenizer.check_rows(texts[-1], f"Example {number} of the task '{task.name}'")
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise TacqError(f"The task '{task.name}' has no example of at least two tokens; give longer ones.")
    return texts


def require_answers(task: Task, n_samples: int) -> None:
    """Raises TacqError if one of the first `n_samples` examples has no assistant's turn at its end."""
    for number, example in enumerate(task.examples[:n_samples] or [Example()], 1):
        if not example.has_answer:
            raise TacqError(
                f"Example {number} of the task '{task.name}' has no assistant's turn at its end; use --loss text."
            )


def tokenize_answers(
    task: Task, tokenizer: ModelTokenizer, n_samples: int, seq_len: int
) -> tuple[list[list[int]], list[int]]:
    """`tokenize_task`, and of each text the index of the first token of the answer; examples that `seq_len` cuts before
    it are left out.

    Raises TacqError for an example without an assistant's turn at its end, or if no answer is left.
    """
    require_answers(task, n_samples)
    texts, begins = [], []
    for number, example in enumerate(task.examples[:n_samples], 1):
        with example_named(task, number):
            tokens, prompt = example_tokens(example, tokenizer, seq_len), prompt_tokens(example, tokenizer)
        tokenizer.check_rows(tokens, f"Example {number} of the task '{task.name}'")
        # As many tokens as both have in common: a tokenizer may join the prompt's last one to the answer's first.
        begin = next(
            (i for i, (one, other) in enumerate(zip(tokens, prompt, strict=False)) if one != other),
            min(len(tokens), len(prompt)),
        )
        if 0 < begin < len(tokens):
            texts.append(tokens)
            begins.append(begin)
    if not texts:
        raise TacqError(f"No answer of the task '{task.name}' begins within {seq_len} tokens; give a larger --seq-len.")
    return texts, begins


def tokenize_for_loss(
    loss: str, task: Task, tokenizer: ModelTokenizer, n_samples: int, seq_len: int
) -> tuple[list[list[int]], list[int] | None]:
    """Texts, and of each the first token whose loss counts: None (all count) for the loss "text", where the answers
    begin for "answer".

    Raises TacqError as `tokenize_task` and `tokenize_answers` do.
    """
    if loss == "answer":
        return tokenize_answers(task, tokenizer, n_samples, seq_len)
    return tokenize_task(task, tokenizer, n_samples, seq_len), None


def tokens_sha256(texts: Sequence[Sequence[int]], begins: Sequence[int] | None) -> str:
    """Names token lists, and where their answers begin, by their content: 64 hex digits."""
    plain = [[int(token) for token in text] for text in texts], begins and [int(begin) for begin in begins]
    return hashlib.sha256(repr(plain).encode()).hexdigest()
