"""The model that is calibrated is the model that runs: torch and llama.cpp give the same next-token distributions.

`link_tensors` proves the weights equal, number by number. This measures the function: rope, biases, scales, norms,
windows and experts too. One calibration text goes through the torch model and through our llama.cpp with the float
GGUF, and the logits are compared before anything long begins.

What is normal: llama.cpp multiplies F16 weights by activations rounded to F16 and keeps keys and values in F16. That
costs a KL of 2e-7 to 2e-5 nats a token and a relative error of the logits of 5e-4 to 3e-3 in tiny models of 45
architectures; 4e-6 and 1e-3 in SmolLM2-135M-Instruct. A dropped bias, rope scaling or window costs 1e-2 and more
in either number. A router turns to another expert where two are nearly as likely and the numbers differ by
rounding; that moves the mean over positions (to 2e-3 in tiny models) and not the median, so models with experts are
judged by the median.

The context is llama.cpp's default one. llama-cli stores fewer keys of layers with a sliding window (`swa_full` off),
but masks the same ones: what a token sees is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import TacqError
from ..reporting import Reporter
from ..runtime.llama_logits import LlamaLogits
from .gguf_differences import differences, window_lengths
from .gguf_header import Header
from .load_model import LoadedModel

KL_LIMIT = 1e-3
# Of the logits, less their mean at each position. It is for models with flat logits, whose KL is small whatever is
# wrong. Where logits spread by 1, a KL of 1e-3 is an error of about 4 %.
ERROR_LIMIT = 0.05
_FIRST = 8  # texts that are looked at
_TOKENS = 256  # of the text, more where a window needs it
_LOGITS = 1 << 23  # held at once on each side: 32 MB
_BLOCK = 1 << 18  # compared at once: 1 MB, which the heap gives back
_BEYOND = 64  # tokens after the end of a window


@dataclass(frozen=True)
class Agreement:
    """How far torch and llama.cpp are apart on one text.

    positions: int64 [n], the tokens whose next-token distributions were compared. kl: float64 [n], the larger of
    KL(torch || llama.cpp) and KL(llama.cpp || torch) in nats. error: float64 [n], norm of the difference of the logits
    over the norm of llama.cpp's, both less their mean. n_tokens: length of the text.
    """

    positions: np.ndarray
    kl: np.ndarray
    error: np.ndarray
    n_tokens: int

    def holds(self, robust: bool, since: int = 0) -> bool:
        """True if both numbers are below their limits from position `since` on; robust: by the median position."""
        average = np.median if robust else np.mean
        chosen = self.positions >= since
        kl, error = self.kl[chosen], self.error[chosen]
        return not len(kl) or bool(average(kl) < KL_LIMIT and average(error) < ERROR_LIMIT)  # NaN is not below


def check_function(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], from_gguf: bool, threads: int | None, reporter: Reporter
) -> Agreement:
    """Compare torch with llama.cpp on one of `texts` (token ids); says what was measured, and returns it.

    The text is the longest of the first few, at most 256 tokens of it; where the model has a sliding window (or another
    length at which its function changes) and texts are longer than it, a text that reaches beyond it. from_gguf: the
    model came from a GGUF, for the remedy. Raises TacqError if they are further apart than rounding can bring them, if
    a logit is no number, or if either cannot evaluate the model.
    """
    lengths = window_lengths(loaded.reference, loaded.model.config)
    text, passed = _choose_text(texts, lengths)
    agreement = measure(loaded, text, threads)
    robust = has_experts(loaded)
    if agreement.holds(robust) and all(agreement.holds(robust, since=length) for length in passed):
        if (length := _long_rope(loaded)) and max(map(len, texts)) <= length:
            reporter.say(
                f"This model has other rope factors in llama.cpp for a context of more than {length} tokens, whatever "
                f"the length of the text; all texts here are shorter, so run the file with -c {length} or less."
            )
        reporter.say(
            f"torch and llama.cpp agree on the float model: KL {agreement.kl.mean():.1e} on {agreement.n_tokens} "
            f"tokens, relative error of the logits {agreement.error.mean():.1e}."
        )
        return agreement
    raise TacqError(_refusal(loaded, agreement, passed, robust, from_gguf))


def has_experts(loaded: LoadedModel) -> bool:
    """True if tokens are routed to experts."""
    return any("_exps." in tensor.name for tensor in loaded.reference.tensors)


def _long_rope(loaded: LoadedModel) -> int:
    """Tokens of context beyond which llama.cpp takes LongRoPE's long factors; 0 if there are none."""
    if not any(tensor.name.startswith("rope_factors_long") for tensor in loaded.reference.tensors):
        return 0
    return Header(loaded.reference).get("rope.scaling.original_context_length") or 0


def _choose_text(texts: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """(text, the `lengths` that it reaches beyond)."""
    longest = max(texts[:_FIRST], key=len)
    overall = max(texts, key=len)
    passed = [length for length in lengths if length < len(overall)]
    if any(length >= len(longest) for length in passed):
        longest = overall
    size = max([_TOKENS, *(length + _BEYOND for length in passed)])
    return [int(token) for token in longest[:size]], passed


@torch.no_grad()
def measure(loaded: LoadedModel, text: list[int], threads: int | None = None) -> Agreement:
    """Both models on `text`. Raises TacqError if one of them cannot evaluate it."""
    n_vocab = int(loaded.embedding.weight.shape[0])
    count = min(len(text), max(_LOGITS // n_vocab, 16))
    positions = np.unique(np.linspace(0, len(text) - 1, count).round().astype(np.int64))
    ours = _torch_logits(loaded, text, positions)
    kl, error = [], []
    done = 0
    for theirs in _llama_logits(loaded, text, positions, threads):
        n = min(ours.shape[1], theirs.shape[1])  # either may pad the vocabulary
        a, b = ours[done : done + len(theirs), :n], torch.from_numpy(theirs)[:, :n]
        done += len(theirs)
        p, q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
        both = [(x.exp() * (x - y)).sum(-1, dtype=torch.float64) for x, y in ((p, q), (q, p))]
        kl.append(torch.maximum(*both).numpy())
        spread = (b - b.mean(-1, keepdim=True)).norm(dim=-1)
        apart = a - b
        error.append(((apart - apart.mean(-1, keepdim=True)).norm(dim=-1) / spread).double().numpy())
    # Rounding can bring the KL of equal distributions to -1e-9; it is never negative.
    return Agreement(positions, np.maximum(np.concatenate(kl), 0), np.concatenate(error), len(text))


def _torch_logits(loaded: LoadedModel, text: list[int], positions: np.ndarray) -> torch.Tensor:
    """float32 [positions, vocabulary] on the CPU."""
    model, options = loaded.model, {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = torch.from_numpy(positions).to(model.device)
    try:
        logits = model(input_ids=torch.tensor([text], device=model.device), use_cache=False, **options).logits[0]
    except Exception as error:  # the model's code is transformers', and raises whatever it runs into
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TacqError(
            f"torch cannot evaluate the model as transformers loads it ({reason}); use another model."
        ) from error
    return (logits if options else logits[torch.from_numpy(positions).to(logits.device)]).float().cpu()


def _llama_logits(
    loaded: LoadedModel, text: list[int], positions: np.ndarray, threads: int | None
) -> Iterator[np.ndarray]:
    """float32 [a few positions, vocabulary], in the order of `positions`."""
    with LlamaLogits(loaded.reference_path, len(text), threads) as llama:
        for _, logits in llama.chunks(text, wanted=positions):
            rows = max(_BLOCK // logits.shape[1], 1)
            for first in range(0, len(logits), rows):
                yield logits[first : first + rows]


def _refusal(loaded: LoadedModel, agreement: Agreement, passed: list[int], robust: bool, from_gguf: bool) -> str:
    """One sentence: how far apart, why as far as it can be told, and what to do."""
    remedy = (
        "give the model's Hugging Face folder instead of the GGUF."
        if from_gguf
        else "llama.cpp does not run this model as transformers does, so use another one."
    )
    kl, error = agreement.kl, agreement.error
    if not (np.isfinite(kl).all() and np.isfinite(error).all()):
        return (
            "torch or llama.cpp gives logits that are no numbers for the float model (F16 holds up to 65504, and "
            f"activations may exceed it); {remedy}"
        )
    causes = []
    inside = [length for length in passed if not agreement.holds(robust, since=length)]
    before = agreement.positions < min(inside, default=0)
    if inside and before.any() and kl[before].mean() < KL_LIMIT and error[before].mean() < ERROR_LIMIT:
        causes.append(
            f"they agree up to token {min(inside)} and not beyond, so one of them has no window of that length"
        )
        if not from_gguf:
            remedy = f"give --seq-len {min(inside)} or less, and keep prompts shorter than that when the model runs."
    elif kl[0] < KL_LIMIT and error[0] < ERROR_LIMIT:
        causes.append("they agree on the first token and not after it, so rope or attention differ")
    causes += differences(loaded.reference, loaded.model)
    why = f": {'; '.join(causes[:5])}" if causes else ""
    return (
        f"torch and llama.cpp are not the same model: KL {kl.mean():.2g} nats a token on {agreement.n_tokens} tokens "
        f"(limit {KL_LIMIT:g}), relative error of the logits {error.mean():.2g} (limit {ERROR_LIMIT:g}){why}; {remedy}"
    )
