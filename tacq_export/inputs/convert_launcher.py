"""Runs llama.cpp's convert_hf_to_gguf.py as it is, under a config that it understands. A program of its own.

    python convert_launcher.py TREE FOLDER OUTFILE

The converter of the pinned tree reads what transformers 4.57 made of config.json (`AutoConfig.to_dict()`), and we run
it with transformers 5, which renames much: `rotary_pct` of GPT-NeoX is gone, layer types are called otherwise. So
`ModelBase.load_hparams` is replaced by one that takes transformers' dictionary for the defaults, lays config.json over
it, which is what the converter was written for, and adds the older names of what only has the newer ones (a folder that
transformers 5 has written). No file of llama.cpp is changed. Multi-token-prediction blocks are left out (`--no-mtp`):
they draft, they are no part of the model that is calibrated, and transformers does not load them.

Nothing of this package may be imported here: the converter's process must see the tree's own modules first.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

# {newer name of a layer's type: the older one that llama.cpp's converter looks for}, by model_type.
_LAYER_TYPES = {
    "granitemoehybrid": {"full_attention": "attention", "linear_attention": "mamba", "hybrid": "mamba"},
    "bamba": {"full_attention": "attention", "linear_attention": "mamba"},
    "jamba": {"full_attention": "attention", "linear_attention": "mamba"},
}
_TEXT_CONFIGS = ("llm_config", "lm_config", "language_config", "lfm")
_NEMOTRON_H = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}


def merged_config(defaults: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` (config.json) laid over `defaults` (transformers' dictionary of it), in sub-configs too. null in `raw`
    replaces nothing: there the config's class has computed a value, such as head_dim."""
    merged = dict(defaults)
    for key, value in raw.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = merged_config(below, value)
        elif value is not None or below is None:
            merged[key] = value
    return merged


def with_older_names(config: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """`config` with the names that transformers 4 had for what it holds under newer ones; none that is there is
    changed, but for layer types, whose older values replace the newer."""
    config = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "full_attention" not in rope and "sliding_attention" not in rope:
        for older, newer in (
            ("rotary_pct", "partial_rotary_factor"),
            ("partial_rotary_factor", "partial_rotary_factor"),
            ("rotary_emb_base", "rope_theta"),
            ("rope_theta", "rope_theta"),
        ):
            if config.get(older) is None and rope.get(newer) is not None:
                config[older] = rope[newer]
    model_type = config.get("model_type")
    if (names := _LAYER_TYPES.get(str(model_type))) and isinstance(config.get("layer_types"), list):
        config["layer_types"] = [names.get(kind, kind) for kind in config["layer_types"]]
    if model_type == "nemotron_h" and not config.get("hybrid_override_pattern"):
        kinds = config.get("layers_block_type") or config.get("layer_types")
        if isinstance(kinds, list) and all(kind in _NEMOTRON_H for kind in kinds):
            config["hybrid_override_pattern"] = "".join(_NEMOTRON_H[kind] for kind in kinds)
    for key in ("text_config", "llm_config"):
        if isinstance(config.get(key), dict):
            below = raw.get(key)
            config[key] = with_older_names(config[key], below if isinstance(below, dict) else {})
    return config


def main(tree: Path, folder: Path, outfile: Path) -> None:
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    import conversion

    original = conversion.ModelBase.load_hparams

    def load_hparams(dir_model: Path, is_mistral_format: bool) -> dict[str, Any]:
        defaults = original(dir_model, is_mistral_format)
        raw = json.loads((dir_model / "config.json").read_text())
        for key in _TEXT_CONFIGS:  # which the converter has renamed in `defaults`
            if key in raw and "text_config" not in raw:
                raw["text_config"] = raw[key]
        return with_older_names(merged_config(defaults, raw), raw)

    conversion.ModelBase.load_hparams = staticmethod(load_hparams)
    conversion.ModelBase.no_mtp = True
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f16", "--outfile", str(outfile)]
    runpy.run_path(str(tree / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
