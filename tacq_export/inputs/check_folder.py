"""What config.json and the headers of the weights say before anything is read, converted or loaded: whether a Hugging
Face folder is a model that can be exported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TacqError
from ..reporting import Reporter
from .checkpoint import StoredTensor, stored_tensors, weight_files
from .convert import converter_architectures

_FLOATS = {"F64", "F32", "F16", "BF16"}
_FP8 = {"F8_E4M3", "F8_E5M2"}
# Names of the parts of packed weights: what quantizers put in place of a float matrix.
_PACKED = (
    ".qweight", ".qzeros", ".weight_packed", ".weight_shape", ".absmax", ".quant_map", ".nested_absmax", ".SCB",
    ".weight_scale_2", ".W_q", ".codes", ".codebooks", "_blocks",
)  # fmt: skip
# Keys of config.json under which wrappers have the config of their language model.
_TEXT_CONFIGS = ("text_config", "llm_config", "lm_config", "language_config", "thinker_config")
_NO_DECODERS = (
    "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
    "ForNextSentencePrediction", "ForSpeechSeq2Seq", "ForCTC", "EncoderModel",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A folder that passed the checks. config: config.json as it is; tensors: of safetensors files, {} for PyTorch's
    own; quantized: FP8 or MXFP4 weights are in it, to be dequantized first. text_architecture: of the language model
    inside a wrapper that llama.cpp's converter does not know, else None."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    weight_bytes: int
    quantized: bool
    text_architecture: str | None = None


def check_folder(folder: Path, reporter: Reporter) -> Checkpoint:
    """Check a Hugging Face folder by its config and the headers of its weights.

    Raises TacqError for an adapter, a missing or damaged config.json, an architecture that transformers or llama.cpp's
    converter do not know or that is no decoder, missing weights or shards, and weights that are quantized already in a
    format other than FP8 and MXFP4.
    """
    config = check_config(folder, reporter)
    files = weight_files(folder)
    tensors = stored_tensors(files)
    quantized = _is_quantized(folder, config, tensors)
    weight_bytes = sum(file.stat().st_size for file in files)
    return Checkpoint(folder, config, tensors, weight_bytes, quantized, text_architecture(config, reporter))


def check_config(folder: Path, reporter: Reporter) -> dict[str, Any]:
    """config.json of a folder, checked without its weights (they need not be there)."""
    _check_no_adapter(folder)
    config = _read_config(folder)
    _check_method(folder, quantization_config(config))
    _check_architecture(folder, config, reporter)
    return config


def _check_no_adapter(folder: Path) -> None:
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        except (ValueError, AttributeError, OSError):
            base = None
        raise TacqError(
            f"{folder} is a LoRA adapter of {base or 'another model'} and no model; merge it into that model "
            "(merge_and_unload of peft), and give the folder of the merged one."
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f" (its GGUF would be {folder / ggufs[0]})" if ggufs else ""
        raise TacqError(
            f"{folder} has no config.json; give a Hugging Face model folder, a hub id, or a GGUF file{hint}."
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise TacqError(f"{path} is no JSON ({error}); fetch it again.") from None
    if not isinstance(config, dict):
        raise TacqError(f"{path} is no JSON object; fetch it again.")
    return config


def architecture_names(config: dict[str, Any]) -> list[str]:
    """What config.json calls the model's architecture, and that of its language model if it has one."""
    parts = [config, *(part for key in _TEXT_CONFIGS if isinstance(part := config.get(key), dict))]
    if isinstance(thinker := config.get("thinker_config"), dict) and isinstance(thinker.get("text_config"), dict):
        parts.append(thinker["text_config"])
    names = [
        part["architectures"][0]
        for part in parts
        if isinstance(part.get("architectures"), list) and part["architectures"]
    ]
    return [str(name) for name in names] or [f"model_type {config.get('model_type', 'unknown')}"]


def _check_architecture(folder: Path, config: dict[str, Any], reporter: Reporter) -> None:
    names = architecture_names(config)
    if config.get("is_encoder_decoder") or names[0].endswith(_NO_DECODERS):
        raise TacqError(
            f"{folder} holds a {names[0]}, which is no language model that writes its text token by token; give a "
            "causal language model."
        )
    known = {name.lower() for name in converter_architectures(reporter)}
    if not known & {name.lower() for name in names} and text_architecture(config, reporter) is None:
        raise TacqError(
            f"llama.cpp's convert_hf_to_gguf.py cannot convert {folder} ({names[0]} is not supported); use an "
            "architecture that llama.cpp knows."
        )
    _check_transformers(folder, names[0], config)


def text_architecture(config: dict[str, Any], reporter: Reporter) -> str | None:
    """The causal class of a wrapper's language model, where the converter needs to be told.

    It takes the architecture of text_config, which many folders do not have, or the wrapper's, which it does not know
    for all wrappers; LLaVA's it takes for a Llama, whatever the language model is.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text, names = config.get("text_config"), architecture_names(config)
    if not isinstance(text, dict) or text.get("architectures"):
        return None
    known = converter_architectures(reporter)
    if names[0] in known and names[0] != "LlavaForConditionalGeneration":
        return None
    # A config without model_type is a Llama, for all wrappers that leave it out.
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.get("model_type", "llama"))
    return name if name in known else None


def _check_transformers(folder: Path, name: str, config: dict[str, Any]) -> None:
    from .load_torch import auto_class, load_config

    torch_config = load_config(folder, name)
    if auto_class(torch_config) is None:
        own = " without code of its own, which tacq-export does not run" if "auto_map" in config else ""
        raise TacqError(
            f"transformers cannot run {folder} as a language model{own} ({name}, {type(torch_config).__name__}); use "
            "an architecture that it knows, or give the model's GGUF."
        )


def quantization_config(config: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config of config.json or of its language model; {} if there is none."""
    for part in (config, *(config.get(key) for key in _TEXT_CONFIGS)):
        if isinstance(part, dict):
            found = part.get("quantization_config") or part.get("compression_config")
            if isinstance(found, dict):
                return found
    return {}


def _already_quantized(folder: Path, what: str) -> TacqError:
    return TacqError(
        f"{folder} is quantized already ({what}), and what it lost is gone; export from the original, in BF16, F16, "
        "F32 or FP8."
    )


def _check_method(folder: Path, quantization: dict[str, Any]) -> None:
    if not quantization:
        return
    method = str(quantization.get("quant_method", "unknown method")).lower()
    if method == "compressed-tensors":
        weights = [
            g.get("weights") or {} for g in (quantization.get("config_groups") or {}).values() if isinstance(g, dict)
        ]
        kinds = {(str(w.get("type", "int")), w.get("num_bits")) for w in weights}
        if kinds - {("float", 8)}:
            raise _already_quantized(folder, ", ".join(f"{method} {kind}{n}" for kind, n in sorted(kinds, key=str)))
    elif method == "modelopt":
        if (algorithm := str(quantization.get("quant_algo"))) != "FP8":
            raise _already_quantized(folder, f"{method} {algorithm}")
    elif method not in ("fp8", "fbgemm_fp8", "mxfp4"):
        bits = quantization.get("bits") or (
            4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else ""
        )
        raise _already_quantized(folder, f"{method} {bits}".strip())


def _is_quantized(folder: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> bool:
    """Whether there are FP8 or MXFP4 weights. Judged by the tensors, as some checkpoints have no quantization_config.

    Raises TacqError for packed weights of any other kind, naming the first of them.
    """
    method = str(quantization_config(config).get("quant_method", ""))
    if quantization_config(config) and not tensors:
        raise _already_quantized(folder, f"{method}, in PyTorch's own files")
    mxfp4 = {name for name in tensors if name.endswith("_blocks") and f"{name[:-7]}_scales" in tensors}
    for name, tensor in tensors.items():
        known = tensor.dtype in _FLOATS | _FP8 or name.endswith(("_scales", "_scale", "_scale_inv")) or name in mxfp4
        if (tensor.dtype not in _FLOATS and name.endswith(_PACKED) and name not in mxfp4) or (
            not known and len(tensor.shape) > 1 and name.endswith(("weight", "_proj", "_packed"))
        ):
            raise _already_quantized(folder, f"'{name}' is {tensor.dtype}{', ' + method if method else ''}")
    return bool(mxfp4) or any(tensor.dtype in _FP8 for tensor in tensors.values())
