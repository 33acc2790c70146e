"""A model's own answers to the questions of a task file.

A file can be near its reference on answers that people wrote and still fail at the task: a model that answers with
programs or long derivations generates text of which such a calibration has none (tools/LOG.md, 2026-11-25). Its own
answers have it. They are kept token by token, so that a chat template that cuts thinking out of old turns, or text that
is tokenized otherwise than it was written, changes nothing when they are calibrated on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import TacqError
from ..files import written_atomically
from ..reporting import Reporter
from ..runtime.generate import PARALLEL, generate
from .load_task import load_task
from .make_reference import make_reference
from .tokenize_task import example_named, prompt_tokens
from .tokenizer import ModelTokenizer


def answer_task(
    model: str,
    task_file: Path,
    outfile: Path,
    n_samples: int,
    n_predict: int,
    threads: int | None,
    reporter: Reporter,
    parallel: int = PARALLEL,
    columns: Mapping[str, str] | None = None,
) -> tuple[int, int]:
    """Write `outfile`: JSONL of the first `n_samples` conversations of `task_file`, the last turn of each greedily
    answered by `model`. Each row has the answer's tokens, too, its end among them.

    Returns (answers written, answers left out because they did not end within `n_predict` tokens). A GGUF answers as it
    is; another model is converted to an F16 one beside `outfile` first, which is deleted afterwards.
    Raises TacqError for a plain text, an example without an assistant's turn at its end, a model that llama.cpp cannot
    run, or if no answer ended.
    """
    task = load_task(task_file, columns, n_samples)
    examples = task.examples
    for number, answered in enumerate([example.has_answer for example in examples] or [False], 1):
        if not answered:
            raise TacqError(
                f"Example {number} of {task_file} has no question and answer; only conversations can be answered."
            )
    with TemporaryDirectory(prefix=outfile.name + ".", dir=outfile.parent) as work:
        file = Path(model)
        if not file.is_file():
            file = Path(work) / "reference-f16.gguf"
            make_reference(model, file, reporter)
        tokenizer = ModelTokenizer(file, reporter.say)
        prompts = []
        for number, example in enumerate(examples, 1):
            with example_named(task, number):
                prompts.append(prompt_tokens(example, tokenizer))
            tokenizer.check_rows(prompts[-1], f"Example {number} of the task '{task.name}'")
        answers = generate(
            file,
            prompts,
            n_predict,
            threads,
            parallel,
            progress=lambda done, total: reporter.progress(done, total, "answering"),
            keep_end=True,
        )
    rows: list[dict[str, Any]] = []
    for example, (tokens, text) in zip(examples, answers, strict=True):
        if tokenizer.ends(tokens[-1]) and text.strip():
            row = {"messages": [*example.messages[:-1], {"role": "assistant", "content": text}]}
            row |= {"tools": list(example.tools)} if example.tools else {}
            rows.append(row | {"tokens": {"vocabulary": tokenizer.vocabulary, "answer": tokens}})
    if not rows:
        raise TacqError(f"None of {len(examples)} answers ended within {n_predict} tokens; give a larger --n-predict.")
    with written_atomically(outfile) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows), len(examples) - len(rows)
