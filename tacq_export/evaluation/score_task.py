"""Task scores: how many answers of a file are right, with intervals, and GSM8K's exact answer.

Whether an answer is right is kept for each example, so that two files which answered the same questions are compared in
pairs: that interval is much narrower than the two accuracies' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path

import numpy as np

from ..errors import TacqError
from ..inputs.load_task import Example, parse_row
from ..inputs.task_files import read_rows
from ..inputs.tokenize_task import example_named, prompt_tokens
from ..inputs.tokenizer import ModelTokenizer
from ..runtime.generate import PARALLEL, generate

# A chat model of 1.5B writes 290 tokens on average, 380 in a long answer (tools/LOG.md): a limit of 320 cut a third of
# them.
GSM8K_TOKENS = 512
Z = 1.959964  # the normal distribution's 97.5 % point: intervals of 95 %
# A sign only where no digit or letter stands before it ("10-4" holds 10 and 4); thousands commas, decimals, no
# exponent.
_NUMBER = re.compile(r"(?<![\w.)\]])[-\u2212]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)|\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class TaskScore:
    """hits[i]: example i was answered rightly; answers[i]: what the model wrote; cuts[i]: it ended at the token
    limit."""

    hits: tuple[bool, ...]
    answers: tuple[str, ...] = ()
    cuts: tuple[bool, ...] = ()

    @property
    def n(self) -> int:
        return len(self.hits)

    @property
    def correct(self) -> int:
        return sum(self.hits)

    @property
    def cut(self) -> int:
        return sum(self.cuts)

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def low(self) -> float:
        """Lower end of the accuracy's 95 % interval (Wilson)."""
        return wilson(self.correct, self.n)[0]

    @property
    def high(self) -> float:
        """Its upper end."""
        return wilson(self.correct, self.n)[1]

    def __post_init__(self) -> None:
        if not self.hits:
            raise TacqError("A task score needs at least one example; give a file that has some.")


@dataclass(frozen=True)
class Retention:
    """ratio: accuracy of a candidate over that of its reference; low, high: 95 % interval (paired bootstrap)."""

    ratio: float
    low: float
    high: float


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion p = correct / n (Wilson 1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 +
    z^2/n).

    Unlike p +- z sqrt(p(1-p)/n) it has a width at p = 0 and 1, and stays between them.
    """
    p = correct / n
    centre = p + Z * Z / (2 * n)
    half = Z * (p * (1 - p) / n + Z * Z / (4 * n * n)) ** 0.5
    scale = 1 + Z * Z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def retention(candidate: TaskScore, reference: TaskScore, draws: int = 10_000, seed: int = 0) -> Retention:
    """How much of the reference's accuracy the candidate keeps. Both must have answered the same examples in the same
    order.

    The interval is the 2.5 and 97.5 % points of the ratio over `draws` resamplings of the examples (with replacement,
    each with both its outcomes); the rare draw without a right answer of the reference is left out.
    Raises TacqError if the numbers of examples differ or the reference has none right.
    """
    if candidate.n != reference.n:
        raise TacqError(
            f"The two scores have {candidate.n} and {reference.n} examples; score both files on the same ones."
        )
    if not reference.correct:
        raise TacqError(
            f"The reference has none of {reference.n} right, so there is nothing to keep; use an easier task or a "
            "better model."
        )
    ours, theirs = np.array(candidate.hits, float), np.array(reference.hits, float)
    chosen = np.random.default_rng(seed).integers(0, reference.n, (draws, reference.n))
    below = theirs[chosen].sum(1)
    ratios = ours[chosen].sum(1)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Retention(candidate.correct / reference.correct, float(low), float(high))


def final_number(text: str) -> Decimal | None:
    """The answer in a solution: the number after the last ####, else in the last \\boxed{}, else the last number.

    Commas, $, % and trailing zeros do not matter: "$1,800.00" is 1800. None if there is no number.
    """
    _, marked, after = text.rpartition("####")
    if marked and (found := _NUMBER.search(after)):
        return _decimal(found[0])
    _, marked, after = text.rpartition("\\boxed{")
    if marked and (found := _NUMBER.search(after)):
        return _decimal(found[0])
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(number: str) -> Decimal | None:
    try:
        return Decimal(number.replace(",", "").replace("$", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def score_answers(
    file: Path | str,
    examples: Sequence[Example],
    right: Callable[[int, str], bool],
    tokenizer: ModelTokenizer,
    threads: int | None,
    n_predict: int,
    parallel: int,
    stop: Sequence[str],
    progress: Callable[[int, int], None] | None,
    backend: str,
    task: str = "",
    first: int = 0,
) -> TaskScore:
    """Ask the file each example without its last turn, greedily, and judge each answer with right(index, answer).

    task, first: name and number (from 0) of the first example, for errors.
    """
    prompts = []
    for number, example in enumerate(examples, first + 1):
        with example_named(task, number):
            prompts.append(prompt_tokens(example, tokenizer))
    answers = generate(file, prompts, n_predict, threads, parallel, stop, progress, backend)
    hits = tuple(right(i, text) for i, (_, text) in enumerate(answers))
    return TaskScore(hits, tuple(text for _, text in answers), tuple(len(tokens) >= n_predict for tokens, _ in answers))


def score_gsm8k(
    file: Path | str,
    examples_path: Path | str,
    n: int,
    tokenizer: ModelTokenizer,
    threads: int | None = None,
    n_predict: int = GSM8K_TOKENS,
    parallel: int = PARALLEL,
    progress: Callable[[int, int], None] | None = None,
    backend: str = "cpu",
    first: int = 0,
) -> TaskScore:
    """GSM8K's exact answer (arXiv 2110.14168): the share of n questions, from number `first` on, whose final number is
    the gold one.

    The prompt is the question in the model's chat template, no examples, as in calibration; greedy, n_predict tokens at
    most. tokenizer: that of the reference. Raises TacqError for a malformed file or a row
    without `#### number` in its answer, and as `generate` does.
    """
    path = Path(examples_path)
    examples, gold = [], []
    for row, fail in islice(read_rows(path), first, first + n):
        number = final_number(row["answer"]) if isinstance(row.get("answer"), str) and "####" in row["answer"] else None
        if number is None:
            raise fail('the "answer" has no "#### number" at its end, which GSM8K\'s score compares with')
        examples.append(parse_row(row, path, fail))
        gold.append(number)
    return score_answers(
        file,
        examples,
        lambda i, text: final_number(text) == gold[i],
        tokenizer,
        threads,
        n_predict,
        parallel,
        (),
        progress,
        backend,
        path.stem,
        first,
    )
