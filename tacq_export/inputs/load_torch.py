"""The torch model to calibrate, and its tokenizer, as transformers loads them from a folder or from the float GGUF."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import TacqError
from ..format.gguf_file import field_value, open_gguf
from ..reporting import Reporter
from .load_gguf import load_gguf_model


def load_from_gguf(reference_path: Path, reporter: Reporter) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of the float file, not the given one: torch then has the very numbers of the reference.

    Raises TacqError as `load_gguf_model` does, and if transformers cannot read the tokenizer.
    """
    reporter.say("Loading it into torch ...")
    model = load_gguf_model(reference_path)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars have no switch
            tokenizer = AutoTokenizer.from_pretrained(reference_path.parent, gguf_file=reference_path.name)
    except Exception as error:  # its loaders raise KeyError, TypeError, AttributeError, RuntimeError ...
        architecture = field_value(open_gguf(reference_path), "general.architecture")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TacqError(
            f"transformers cannot read the tokenizer of a GGUF of architecture '{architecture}' ({reason}); "
            "give the model's Hugging Face folder instead."
        ) from error
    return model, tokenizer


def load_from_hugging_face(folder: Path, reporter: Reporter) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    reporter.say(f"Loading {folder} with transformers ...")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise TacqError(
            f"transformers cannot load {folder} as a causal language model ({str(error).splitlines()[0]}); "
            "use an architecture that it knows, or update it."
        ) from error
    _check_finite(model)
    return model, tokenizer


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TacqError(f"tensor '{name}': holds NaN or Inf; the checkpoint is damaged, fetch it again.")
