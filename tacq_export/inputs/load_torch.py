"""The torch model to calibrate, as transformers loads them from a folder or from the float GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ..errors import TacqError
from ..reporting import Reporter
from .check_loaded import check_loaded
from .text_model import text_model


def reason(error: BaseException) -> str:
    """What a library's exception says, in one line, with its kind where that says more than the text."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    plain = isinstance(error, (ValueError, OSError, ImportError, NotImplementedError)) and text
    return (text if plain else f"{type(error).__name__}: {text}".rstrip(": "))[:300]


def load_config(folder: Path, name: str) -> PretrainedConfig:
    """transformers' config of a folder. name: of the architecture, for the error. Raises TacqError if there is none."""
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # an invalid value raises whatever its class raises
        raise TacqError(
            f"transformers cannot read the config of {folder}, a {name} ({reason(error)}); use an architecture that it "
            "knows, update it, or give the model's GGUF."
        ) from error


def auto_class(config: PretrainedConfig) -> Any | None:
    """transformers' class that loads a language model of that config; None if there is none.

    Some wrappers are in two of its lists, once as the language model alone: that class is for a folder that says so,
    as it has no place for the wrapper's other tensors.
    """
    name = config.architectures[0] if config.architectures else None
    found: list[Any] = []
    lists: tuple[tuple[Any, Any], ...] = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
        (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
    )
    for mapping, auto in lists:
        if type(config) in mapping:
            if mapping[type(config)].__name__ == name:
                return auto
            found.append(auto)
    return found[0] if found else None


def load_from_hugging_face(folder: Path, reporter: Reporter) -> PreTrainedModel:
    """The model of a folder in float32; of a wrapper with a vision or audio part, its language model.

    Raises TacqError, naming the tensor, for what is missing in the checkpoint, left over, or of another shape, and for
    NaN and infinity; and for whatever transformers cannot load.
    """
    reporter.say(f"Loading {folder} with transformers ...")
    try:
        auto: Any = auto_class(AutoConfig.from_pretrained(folder)) or AutoModelForCausalLM
        model, info = auto.from_pretrained(
            # Other shapes are refused by name below, where this switch's error would name none.
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )  # fmt: skip
    except Exception as error:  # the loaders raise RuntimeError, TypeError, KeyError ...
        raise TacqError(
            f"transformers cannot load {folder} as a causal language model ({reason(error)}); "
            "use an architecture that it knows, or update it."
        ) from error
    text, path = text_model(model)
    check_loaded(folder, model, info, path)
    if text is not model:
        reporter.say(
            f"{type(model).__name__} is a language model and more: the language model alone is exported, its vision "
            "or audio part is not in the file."
        )
    _check_finite(text)
    return text


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TacqError(f"tensor '{name}': holds NaN or Inf; the checkpoint is damaged, fetch it again.")
