"""What transformers reports of a checkpoint that it has loaded: tensors that were missing, left over, or of another
shape. It only warns of them, and puts random numbers where there are none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ..errors import TacqError

# Blocks that draft tokens ahead (multi-token prediction): no part of the function, and not in the GGUF either.
_DRAFT = re.compile(r"(^|\.)(mtp|mtp_layers|mtp_block|nextn)(\.|$)")
_DRAFT_KEYS = (
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "num_mtp_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)


def check_loaded(folder: Path, model: PreTrainedModel, info: dict[str, Any], decoder: str | None) -> None:
    """Refuse a checkpoint that is not this model's.

    info: the loading info of `from_pretrained`, from which transformers has taken what the model's class declares as
    no loss (buffers such as rotary_emb.inv_freq). decoder: name of the language model inside a wrapper, None if
    `model` is no wrapper; then what belongs to the other parts is not looked at. A head that config.json ties to the
    embedding is not reported as missing by transformers; one that it does not tie, is.
    Raises TacqError, naming the tensors.
    """
    mismatched = sorted(
        (name, list(stored), list(expected))
        for name, stored, expected in info["mismatched_keys"]
        if _counts(name, model, decoder)
    )
    if mismatched:
        name, stored, expected = mismatched[0]
        raise TacqError(
            f"tensor '{name}' of {folder} is {stored} in the checkpoint and {expected} by config.json"
            f"{_more(len(mismatched))}; fetch both again, they do not belong together."
        )
    missing = sorted(name for name in info["missing_keys"] if _counts(name, model, decoder))
    if missing:
        tied = " (config.json says that the head is not tied to the embedding)" if _is_head(missing[0], model) else ""
        raise TacqError(
            f"tensor '{missing[0]}' is missing in the checkpoint {folder}{tied}{_more(len(missing))}; fetch it again, "
            "or correct config.json."
        )
    left = sorted(name for name in info["unexpected_keys"] if _is_left_over(name, model, decoder))
    if left:
        raise TacqError(
            f"tensor '{left[0]}' of the checkpoint {folder} has no place in the model that config.json describes, "
            f"{type(model).__name__}{_more(len(left))}; without it the model would be another one."
        )


def _more(count: int) -> str:
    return f", and so are {count - 1} others" if count > 1 else ""


def _is_head(name: str, model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return any(module is head and name.startswith(path + ".") for path, module in model.named_modules())


def _counts(name: str, model: PreTrainedModel, decoder: str | None) -> bool:
    """Whether a tensor of the model belongs to its language model."""
    return decoder is None or name.startswith(decoder + ".") or _is_head(name, model)


def _is_left_over(name: str, model: PreTrainedModel, decoder: str | None) -> bool:
    """Whether a stored tensor that nothing took would have belonged to the language model."""
    if decoder is not None:
        parts = {child for owner in (model, model.base_model) for child, _ in owner.named_children()}
        parts -= {*decoder.split("."), "model", "lm_head"}
        if parts & set(name.split(".")):
            return False
    config = model.config.get_text_config()
    return not (_DRAFT.search(name) or _is_draft_block(name, config))


def _is_draft_block(name: str, config: PretrainedConfig) -> bool:
    """Whether a tensor is of a block behind the last one, as many of which draft as the config says (DeepSeek-V3)."""
    drafting = next((int(n) for key in _DRAFT_KEYS if (n := getattr(config, key, None))), 0)
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return match is not None and 0 <= int(match[1]) - int(config.num_hidden_layers) < drafting
