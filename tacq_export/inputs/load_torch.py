"""The torch model to calibrate, as transformers loads them from a folder or from the float GGUF."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import TacqError
from ..format.gguf_file import field_value, open_gguf
from ..reporting import Reporter


def load_from_gguf(reference_path: Path, reporter: Reporter) -> PreTrainedModel:
    reporter.say("Loading it with transformers ...")
    try:
        # The float file, not the given one: torch then has the very numbers of the reference.
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars have no switch
            model = AutoModelForCausalLM.from_pretrained(
                reference_path.parent, gguf_file=reference_path.name, dtype=torch.float32
            )
    except (ValueError, NotImplementedError, KeyError) as error:
        architecture = field_value(open_gguf(reference_path), "general.architecture")
        raise TacqError(
            f"transformers cannot load a GGUF of architecture '{architecture}' ({str(error).splitlines()[0]}); "
            "give the model's Hugging Face folder instead."
        ) from error
    return model


def load_from_hugging_face(folder: Path, reporter: Reporter) -> PreTrainedModel:
    reporter.say(f"Loading {folder} with transformers ...")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise TacqError(
            f"transformers cannot load {folder} as a causal language model ({str(error).splitlines()[0]}); "
            "use an architecture that it knows, or update it."
        ) from error
    _check_finite(model)
    return model


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TacqError(f"tensor '{name}': holds NaN or Inf; the checkpoint is damaged, fetch it again.")
