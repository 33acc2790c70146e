"""Runs llama.cpp's convert_hf_to_gguf.py as it is, under a config that it understands. A program of its own.

    python convert_launcher.py TREE FOLDER OUTFILE [ARCHITECTURE]

ARCHITECTURE: of the language model inside a wrapper that the converter does not know as such.

The converter of the pinned tree reads what transformers 4.57 made of config.json (`AutoConfig.to_dict()`), and we run
it with transformers 5, which renames much: `rotary_pct` of GPT-NeoX is gone, layer types are called otherwise. So
`ModelBase.load_hparams` is replaced by one that takes transformers' dictionary for the defaults, lays config.json over
it, which is what the converter was written for, and adds the older names of what only has the newer ones (a folder
that transformers 5 has written). Padding behind a vocabulary (Mamba, Nemotron-H) is cut to the rows of the embedding,
as llama.cpp loads no other. Multi-token-prediction blocks are left out (`--no-mtp`): they draft, they are no part of
the model that is calibrated, and transformers does not load them. No file of llama.cpp is changed.

Nothing of this package may be imported here: the converter's process must see the tree's own modules first.
"""

from __future__ import annotations

import functools
import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

# {newer name of a layer's type: the older one that llama.cpp's converter looks for}, by model_type.
_LAYER_TYPES = {
    "granitemoehybrid": {"full_attention": "attention", "linear_attention": "mamba"},
    "bamba": {"full_attention": "attention", "linear_attention": "mamba"},
    "jamba": {"full_attention": "attention", "linear_attention": "mamba"},
}
_NEMOTRON_H = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E"}
# Their routers are sigmoids, which transformers 5 has in the code and no longer in the config.
_SIGMOID_ROUTERS = {
    "deepseek_v3", "deepseek_v32", "dots1", "exaone_moe", "glm4_moe_lite", "mimo_v2_flash", "minimax_m2",
}  # fmt: skip
# Their code rotates whole heads unless the config says otherwise.
_WHOLE_ROTATION = {"solar_open", "glm4v_text"}
_ROUTER_KEYS = (
    "score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func",
)  # fmt: skip
# Keys under which wrappers have the config of their language model, beside text_config.
_TEXT_CONFIGS = ("llm_config", "lm_config", "language_config", "lfm")


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


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the names and values that transformers 4 had for what transformers 5 writes otherwise. A name that
    is there already keeps its value."""
    config = dict(config)
    rope, model_type = config.get("rope_parameters"), str(config.get("model_type"))
    if isinstance(rope, dict) and "full_attention" not in rope and "sliding_attention" not in rope:
        for older, newer in (
            ("rotary_pct", "partial_rotary_factor"),
            ("partial_rotary_factor", "partial_rotary_factor"),
            ("rotary_emb_base", "rope_theta"),
            ("rope_theta", "rope_theta"),
        ):
            if config.get(older) is None and rope.get(newer) is not None:
                config[older] = rope[newer]
    if config.get("n_ctx") is None and config.get("n_positions") is not None:
        config["n_ctx"] = config["n_positions"]
    if model_type in _SIGMOID_ROUTERS and not any(config.get(key) for key in _ROUTER_KEYS):
        config["scoring_func"] = "sigmoid"
    if (names := _LAYER_TYPES.get(model_type)) and isinstance(config.get("layer_types"), list):
        config["layer_types"] = [names.get(kind, kind) for kind in config["layer_types"]]
    if model_type == "granitemoehybrid" and config.get("num_local_experts") == 0:
        config["num_experts_per_tok"] = 0  # llama.cpp wants none chosen of none
    if model_type == "bamba" and config.get("attn_rotary_emb") is None and isinstance(rope, dict):
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        config["attn_rotary_emb"] = int(head_dim * rope.get("partial_rotary_factor", 0.5))
    if model_type in _WHOLE_ROTATION and isinstance(rope, dict) and config.get("partial_rotary_factor") is None:
        config["partial_rotary_factor"] = 1.0  # the converter takes 0.5 for GLM-4 and its relatives
    if model_type == "mimo_v2_flash":
        _mimo_v2(config)
    if model_type == "afmoe" and config.get("route_norm") is None:
        config["route_norm"] = True  # transformers has it in the code
    if model_type in ("phi3", "phimoe") and config.get("original_max_position_embeddings") is None:
        config["original_max_position_embeddings"] = config.get("max_position_embeddings")
    if model_type == "falcon" and config.get("multi_query") and not config.get("new_decoder_architecture"):
        config["num_kv_heads"] = 1  # whatever the key says: multi-query attention has one
    if model_type == "gemma4_text" and config.get("global_head_dim") is None:
        of_layers = [layer for layer in (config.get("per_layer_config") or {}).values() if "head_dim" in layer]
        config["global_head_dim"] = None if of_layers else config.get("head_dim")
    if model_type == "nemotron_h":
        _nemotron_h(config)
    for key in ("text_config", "llm_config"):
        if isinstance(config.get(key), dict):
            config[key] = with_older_names(config[key])
    return config


def _nemotron_h(config: dict[str, Any]) -> None:
    """Layers as a string of M, *, - and E; without experts also without their keys, by which the converter goes."""
    kinds = config.get("layers_block_type")
    if not config.get("hybrid_override_pattern") and isinstance(kinds, list):
        config["hybrid_override_pattern"] = "".join(_NEMOTRON_H.get(kind, "?") for kind in kinds)
    if "E" not in str(config.get("hybrid_override_pattern")):
        for key in ("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "n_group", "topk_group"):
            config.pop(key, None)
    if isinstance(kinds, list):
        config["num_hidden_layers"] = len(kinds)


def _mimo_v2(config: dict[str, Any]) -> None:
    """What its own config.json has beside layer_types and one set of sizes for all layers."""
    windows = [int(kind == "sliding_attention") for kind in config.get("layer_types") or []]
    newer = {f"swa_{name}": config.get(name) for name in ("head_dim", "v_head_dim", "num_attention_heads")}
    newer["swa_num_key_value_heads"] = 2 * config["num_key_value_heads"]  # transformers has it in the code
    for key, value in (newer | {"hybrid_layer_pattern": windows, "topk_method": "noaux_tc"}).items():
        if config.get(key) is None:
            config[key] = value
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(whole := rope.get("full_attention"), dict):
        config["rope_parameters"] = {"partial_rotary_factor": whole.get("partial_rotary_factor", 1.0)} | rope


def cut_padding(tokens: list[Any], rows: int) -> list[Any]:
    """The first `rows` tokens if all behind them are padding, else `tokens`: then llama.cpp says what is wrong."""
    behind = [token if isinstance(token, str) else bytes(token).decode(errors="replace") for token in tokens[rows:]]
    return tokens[:rows] if all(token.startswith("[PAD") for token in behind) else tokens


def _cut_vocabularies(writer: Any) -> None:
    """Let the class `writer` (gguf.GGUFWriter) write no more tokens than its embedding has rows."""
    add_list, rest = (
        writer.add_token_list,
        {name: getattr(writer, name) for name in ("add_token_types", "add_token_scores")},
    )

    def add_token_list(self: Any, tokens: Any) -> None:
        found = [part["token_embd.weight"] for part in self.tensors if "token_embd.weight" in part]
        tokens = list(tokens)
        self.tacq_tokens = cut_padding(tokens, int(found[0].shape[0])) if found else tokens
        add_list(self, self.tacq_tokens)

    writer.add_token_list = add_token_list
    for name, add in rest.items():
        setattr(writer, name, lambda self, values, add=add: add(self, list(values)[: len(self.tacq_tokens)]))


def _transpose_packed_experts(model: Any) -> None:
    """Let the class `model` (of Qwen3-VL's experts) take packed experts as transformers 5 saves them, [experts, rows,
    columns], beside the hub's, whose matrices are transposed."""
    convert = model.modify_tensors

    def modify_tensors(self: Any, data: Any, name: str, block: int | None) -> Any:
        kind = name.removesuffix(".weight").rpartition(".")[2]
        width, inner = self.hparams["hidden_size"], self.hparams["moe_intermediate_size"]
        packed = {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}
        if ".mlp.experts." in name and tuple(data.shape[1:]) == packed.get(kind) and 2 * inner != width != inner:
            data = data.permute(0, 2, 1)
        return convert(self, data, name, block)

    model.modify_tensors = modify_tensors


def _permute_rotated_part(llama: Any, n_rotated: int) -> None:
    """Let the class `llama` put the rows of q and k of each head in llama.cpp's order for a rotation of the first
    `n_rotated` of them (Bamba), where it is made for a rotation of all."""
    permute = llama.permute

    def permute_part(weights: Any, n_head: int, n_head_kv: int | None) -> Any:
        heads = weights.reshape(n_head_kv or n_head, -1, *weights.shape[1:])
        rotated = heads[:, :n_rotated].reshape(-1, *weights.shape[1:])
        parts = permute(rotated, n_head, n_head_kv).reshape(len(heads), n_rotated, *weights.shape[1:])
        return importlib.import_module("torch").cat([parts, heads[:, n_rotated:]], dim=1).reshape(weights.shape)

    llama.permute = staticmethod(permute_part)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _with_own_splitting(auto: Any) -> None:
    """Let `auto` (transformers.AutoTokenizer) split texts as the folder's tokenizer.json says, and want BOS as its
    tokenizer_config.json does. transformers 5 puts the expression of its own class there for some model types (qwen2,
    qwen3_5), whatever tokenizer a folder has, and the converter knows tokenizers by what they make of a text."""
    original = auto.from_pretrained

    def from_pretrained(folder: Any, *args: Any, **options: Any) -> Any:
        tokenizer, path = original(folder, *args, **options), Path(folder) / "tokenizer.json"
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None and path.is_file():
            own = importlib.import_module("tokenizers").Tokenizer.from_file(str(path))
            for part in ("normalizer", "pre_tokenizer"):
                if (value := getattr(own, part)) is not None:
                    setattr(backend, part, value)
            if _json(Path(folder) / "tokenizer_config.json").get("add_bos_token"):
                # What is said, and not what the tokenizer does: the converter looks at its tokens, too.
                tokenizer._add_bos_token = True
        return tokenizer

    auto.from_pretrained = from_pretrained


def main(tree: Path, folder: Path, outfile: Path, text_architecture: str | None = None) -> None:
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    conversion = importlib.import_module("conversion")  # of the tree
    spellings = {name.lower(): name for name in conversion.TEXT_MODEL_MAP}

    def read(folder: Path) -> dict[str, Any]:
        raw = _json(folder / "config.json")
        for key in _TEXT_CONFIGS:  # the converter's own renaming
            if key in raw and "text_config" not in raw:
                raw["text_config"] = raw[key]
        return raw

    def finished(config: dict[str, Any]) -> dict[str, Any]:
        config = with_older_names(config)
        if text_architecture is not None:
            config["text_config"]["architectures"] = [text_architecture]
        for part in (config, config.get("text_config") or {}):  # MptForCausalLM is MPTForCausalLM there
            part["architectures"] = [spellings.get(n.lower(), n) for n in part.get("architectures") or []] or None
        return config

    def load_hparams(dir_model: Path, is_mistral_format: bool) -> dict[str, Any]:
        return finished(merged_config(original(dir_model, is_mistral_format), read(dir_model)))

    def get_model_class(name: str, mmproj: bool = False) -> Any:
        found = find_class(name, mmproj)
        if found.__name__ == "Qwen3VLMoeTextModel":
            _transpose_packed_experts(found)
        if name == "BambaForCausalLM":
            rotated = finished(read(folder)).get("attn_rotary_emb")
            if isinstance(rotated, int):
                _permute_rotated_part(importlib.import_module("conversion.llama").LlamaModel, rotated)
        if any(base.__module__ == "conversion.mamba" for base in found.__mro__):
            # These read config.json themselves, without transformers' defaults, if they are not given a config.
            return functools.partial(found, hparams=finished(read(folder)))
        return found

    original, find_class = conversion.ModelBase.load_hparams, conversion.get_model_class
    conversion.ModelBase.load_hparams = staticmethod(load_hparams)
    conversion.ModelBase.no_mtp = True
    vars(conversion)["get_model_class"] = get_model_class
    _with_own_splitting(importlib.import_module("transformers").AutoTokenizer)
    _cut_vocabularies(importlib.import_module("gguf").GGUFWriter)
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f16", "--outfile", str(outfile)]
    runpy.run_path(str(tree / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:5])
