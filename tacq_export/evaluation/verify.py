"""How much a quantized GGUF differs from its reference: KL divergence, perplexity, top-1 agreement; and decode
equality.

Both files run in llama.cpp side by side on the same tokens, chunk by chunk, so memory does not grow with the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import TacqError
from ..runtime.llama_logits import LlamaLogits

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quality:
    """Means over all predicted tokens, each with its standard error (the tokens taken as independent).

    kl: KL(reference || candidate) in nats a token.  top1: share of positions where both rank the same token first.
    ppl, ref_ppl: perplexity of the candidate and of the reference; ppl_ratio = ppl / ref_ppl, from paired differences.
    """

    n_tokens: int
    kl: float
    kl_stderr: float
    ppl: float
    ppl_stderr: float
    ref_ppl: float
    ppl_ratio: float
    ppl_ratio_stderr: float
    top1: float
    top1_stderr: float

    def as_dict(self) -> dict:
        """Plain numbers, for a JSON line."""
        return asdict(self)


def token_statistics(ref: np.ndarray, cand: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64 [n, 4] of n positions: KL, reference NLL, candidate NLL, 1 if the top tokens agree.

    ref, cand: float32 logits [n, vocab]; targets: int64 [n], the tokens that came next.
    """
    out = np.empty((len(targets), 4))
    for begin in range(0, len(targets), 64):  # the temporaries of a few rows stay in cache
        rows = slice(begin, begin + 64)
        p = torch.log_softmax(torch.from_numpy(ref[rows]), -1)
        q = torch.log_softmax(torch.from_numpy(cand[rows]), -1)
        target = torch.from_numpy(targets[rows])[:, None]
        out[rows, 0] = (p.exp() * (p - q)).sum(-1, dtype=torch.float64)
        out[rows, 1] = -p.gather(1, target)[:, 0].double()
        out[rows, 2] = -q.gather(1, target)[:, 0].double()
        out[rows, 3] = (p.argmax(-1) == q.argmax(-1)).double()
    return out


def summarize(stats: np.ndarray) -> Quality:
    """Quality of the rows of `token_statistics`."""
    n = len(stats)
    mean = stats.mean(0)
    ratio = stats[:, 2] - stats[:, 1]

    def stderr(x: np.ndarray) -> float:
        return float(x.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan

    ppl, ref_ppl = math.exp(mean[2]), math.exp(mean[1])
    return Quality(
        n_tokens=n,
        # Rounding can bring the KL of equal files to -1e-9; it is never negative.
        kl=max(0.0, float(mean[0])),
        kl_stderr=stderr(stats[:, 0]),
        ppl=ppl,
        ppl_stderr=ppl * stderr(stats[:, 2]),
        ref_ppl=ref_ppl,
        ppl_ratio=ppl / ref_ppl,
        ppl_ratio_stderr=ppl / ref_ppl * stderr(ratio),
        top1=float(mean[3]),
        top1_stderr=stderr(stats[:, 3]),
    )


def compare_models(
    reference: Path | str,
    candidate: Path | str,
    texts: Sequence[Sequence[int]],
    threads: int | None = None,
    progress: Progress | None = None,
    backend: str = "cpu",
    begins: Sequence[int] | None = None,
) -> Quality:
    """Quality of `candidate` against `reference` on token lists; position i of a text predicts i+1. All predictions
    count, or with `begins` those of each text's tokens from that index on.

    progress(done, total) counts tokens. Raises TacqError if a file does not load, vocabularies differ, or there is no
    text of two tokens.
    """
    begins = [begin for text, begin in zip(texts, begins or [1] * len(texts), strict=True) if len(text) > 1]
    lists = [[int(t) for t in text] for text in texts if len(text) > 1]
    if not lists:
        raise TacqError("There is no text of at least two tokens to compare on; give a longer one.")
    longest, total, done = max(map(len, lists)), sum(map(len, lists)), 0
    stats = []
    with (
        LlamaLogits(reference, longest, threads, backend) as ref,
        LlamaLogits(candidate, longest, threads, backend) as cand,
    ):
        if ref.n_vocab != cand.n_vocab:
            raise TacqError(
                f"{candidate} has {cand.n_vocab} tokens and {reference} {ref.n_vocab}; compare files of one model."
            )
        for text, first in zip(lists, begins, strict=True):
            following = np.asarray(text[1:], np.int64)
            for (begin, p), (_, q) in zip(ref.chunks(text), cand.chunks(text), strict=True):
                counted = slice(
                    max(first - 1 - begin, 0), len(following) - begin
                )  # the last position of a text predicts nothing
                targets = following[begin : begin + len(p)][counted]
                if len(targets):
                    stats.append(token_statistics(p[counted], q[counted], targets))
                done += len(p)
                if progress:
                    progress(done, total)
    rows = np.concatenate(stats)
    if not np.isfinite(rows).all():
        raise TacqError(
            f"{candidate} or {reference} gives logits that are no numbers; the file is damaged or its kernels are "
            "wrong."
        )
    return summarize(rows)


def text_windows(model: LlamaLogits, text: str, window: int = 512, limit: int | None = None) -> list[list[int]]:
    """Plain text cut into windows of `window` tokens (BOS first where the model wants it); the last short one is left
    out.

    limit: at most that many windows, from the start.
    """
    bos = model.bos()
    tokens, step = model.tokenize(text), window - len(bos)
    count = len(tokens) // step
    if count == 0:
        raise TacqError(f"The text has {len(tokens)} tokens, less than one window of {window}; give a longer text.")
    return [bos + tokens[i * step : (i + 1) * step] for i in range(min(count, limit or count))]


def compare_on_text(
    reference: Path | str,
    candidate: Path | str,
    text: str,
    window: int = 512,
    limit: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    backend: str = "cpu",
) -> Quality:
    """`compare_models` on windows of a plain text, such as wikitext2. The tokens are the reference's."""
    with LlamaLogits(reference, window, threads, backend) as model:
        windows = text_windows(model, text, window, limit)
    return compare_models(reference, candidate, windows, threads, progress, backend)
