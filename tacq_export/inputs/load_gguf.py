"""A GGUF as a torch model: config from its keys, every parameter from its tensors.

Names are matched with gguf-py's TensorNameMap, as `link_tensors` does, and what llama.cpp's converter does to some
tensors is undone: rows of q and k that its rope wants in another order, norms stored with 1 added, gate and up of
experts apart, transposed and squeezed ones. A tensor that no parameter takes and a parameter that no tensor gives are
refused by name. What cannot be proven here (that the functions are equal) is measured by `check_function`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..errors import TacqError
from ..format.gguf_file import field_value, open_gguf, tensor_values
from .gguf_config import config_from_gguf
from .gguf_header import Header
from .link_tensors import tensor_names

FOLDER = "give the model's Hugging Face folder instead"
# Architectures whose rows of q and k the converter reorders: llama.cpp's rope turns neighbours, torch's turns halves.
_REORDERED = {"llama", "granite", "granitemoe", "minicpm", "mistral3", "olmo", "smollm3", "arcee"}
# Architectures whose fused rows of q, k and v the converter sorts; torch has them head by head.
_FUSED_BY_HEAD = {"bloom", "falcon", "gptneox"}
# Norms that multiply by 1 + weight in torch are stored with the 1 added.
_SHIFTED_NORMS = {"gemma", "gemma2", "gemma3", "nemotron"}
# Tensors that are no parameters: `gguf_config` reads them.
_CONSTANTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# (in today's names of transformers, in those that gguf-py knows)
_ALIASES = (
    ("", ""),
    ("block_sparse_moe.experts.", "mlp.experts."),
    ("block_sparse_moe.router", "mlp.gate"),
    ("mlp.router", "mlp.gate"),
    ("shared_mlp.input_linear", "mlp.shared_expert.gate_up_proj"),
    ("shared_mlp.output_linear", "mlp.shared_expert.down_proj"),
)
_PREFIXES = ("", "model.", "transformer.", "model.language_model.")


def load_gguf_model(path: Path) -> PreTrainedModel:
    """The float32 torch model of a float GGUF.

    Raises TacqError for an architecture that transformers has no model of, a tensor without a parameter, a parameter
    without a tensor, or shapes that do not fit.
    """
    reference = open_gguf(path)
    header = Header(reference)
    config = config_from_gguf(reference)
    try:
        model = _empty_model(config)
    except Exception as error:  # a model's constructor raises whatever its config makes it raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TacqError(
            f"transformers cannot make a model of architecture '{header.architecture}' from the GGUF's keys "
            f"({reason}); {FOLDER}."
        ) from error
    _fill(model, header, tensor_names(reference))
    return model


def _empty_model(config: PretrainedConfig) -> PreTrainedModel:
    with no_init_weights():  # every parameter is filled, or the model refused
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return model_class(config).float()


@torch.no_grad()
def _fill(model: PreTrainedModel, header: Header, name_map: gguf.TensorNameMap) -> None:
    model.tie_weights()
    used: set[str] = set(_CONSTANTS)
    modules = dict(model.named_modules())
    filled: dict[int, str] = {}  # by address: a tied head is the embedding
    missing = []
    targets = [*model.named_parameters(), *_persistent_buffers(model)]
    for name, parameter in targets:
        if parameter.data_ptr() in filled:
            continue
        sources = next(
            (found for found in _candidates(name, name_map) if all(one in header.tensors for one in found)), None
        )
        if sources is None:
            from_key = _from_key(name, header)
            if from_key is not None:
                parameter.fill_(from_key)
            elif name.endswith(".bias") and name.removesuffix("bias") + "weight" in dict(targets):
                parameter.zero_()  # llama.cpp adds none
            else:
                missing.append(name)
            continue
        values = [_undone(one, header) for one in sources]
        used.update(sources)
        owner = modules[name.rpartition(".")[0]]
        parameter.copy_(_fitted(name, values, parameter, owner, header))
        filled[parameter.data_ptr()] = name
    _add_biases(modules, header, name_map, used)
    unused = [name for name in header.tensors if name not in used]
    for what, names in (("has no place for the GGUF's", unused), ("finds nothing in the GGUF for", missing)):
        if names:
            raise TacqError(
                f"transformers' model of architecture '{header.architecture}' {what} {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}; {FOLDER}."
            )


def _from_key(name: str, header: Header) -> float | None:
    """Value of a parameter of one number that stands in a key, a number a block: those of Apertus's activation."""
    found = re.search(r"layers\.(\d+)\.mlp\.act_fn\.(alpha_p|alpha_n|beta|eps)$", name)
    values = field_value(header.reference, f"xielu.{found[2]}") if found else None
    if found is None or values is None:
        return None
    return float(values[int(found[1])] if isinstance(values, list) else values)


def _persistent_buffers(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    saved = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            yield name, buffer


def _candidates(name: str, name_map: gguf.TensorNameMap) -> Iterator[tuple[str, ...]]:
    """GGUF tensors that a parameter may be made of: one, or gate and up of experts."""
    stem, _, suffix = name.rpartition(".")
    spellings = [(name, ".weight"), (name, "")]
    if suffix in ("weight", "bias"):
        spellings = [(stem, "." + suffix)]
    elif suffix.endswith("_bias"):
        spellings = [(name.removesuffix("_bias"), ".bias"), (name, ".bias")]
    for (base, ending), (today, known), own, other in itertools.product(spellings, _ALIASES, _PREFIXES, _PREFIXES):
        if today not in base or not base.startswith(own):
            continue
        renamed = other + base.removeprefix(own).replace(today, known, 1)
        found = name_map.get_name(renamed)
        if found is not None:
            yield (found + ending,)
        if "gate_up_proj" in renamed:
            parts = [name_map.get_name(renamed.replace("gate_up_proj", part)) for part in ("gate_proj", "up_proj")]
            if None not in parts:
                yield tuple(f"{part}{ending}" for part in parts)


def _undone(name: str, header: Header) -> np.ndarray:
    """float32 values of a tensor as torch has them, in the GGUF's shape."""
    values = tensor_values(header.tensors[name])
    if header.architecture in _SHIFTED_NORMS and name.endswith("norm.weight"):
        return values - 1
    if name.endswith(".ssm_a") and header.architecture == "mamba":
        return np.log(-values)  # stored as -exp(A_log)
    if header.architecture in _REORDERED and re.search(r"\.attn_[qk]\.(weight|bias)$", name):
        heads = header.get("attention.head_count")
        if ".attn_k." in name:
            heads = header.get("attention.head_count_kv", heads)
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    if header.architecture in _FUSED_BY_HEAD and ".attn_qkv." in name:
        heads = header.get("attention.head_count")
        groups = header.get("attention.head_count_kv", heads)
        width, rest = values.shape[0] // (heads + 2 * groups), values.shape[1:]
        parts = np.split(values, [heads * width, (heads + groups) * width])
        return np.concatenate([part.reshape(groups, -1, width, *rest) for part in parts], 1).reshape(values.shape)
    return values


def _fitted(
    name: str, values: list[np.ndarray], parameter: torch.Tensor, owner: torch.nn.Module, header: Header
) -> torch.Tensor:
    """One tensor of the parameter's shape. Raises TacqError if the shapes do not fit."""
    tensors = [torch.from_numpy(np.array(value)) for value in values]
    if header.architecture == "gpt-oss" and "experts" in name:
        # [experts, in, out], gate and up interleaved (transformers' modeling_gpt_oss.py)
        tensors = [tensor.transpose(-1, -2) if tensor.dim() == 3 else tensor for tensor in tensors]
        tensor = torch.stack(tensors, -1).flatten(-2) if len(tensors) == 2 else tensors[0]
    else:
        tensor = torch.cat(tensors, -2) if len(tensors) == 2 else tensors[0]
    if isinstance(owner, Conv1D) and tensor.dim() == 2:
        tensor = tensor.T
    squeezed = [n for n in parameter.shape if n != 1] == [n for n in tensor.shape if n != 1]
    if not squeezed:
        raise TacqError(
            f"The GGUF of architecture '{header.architecture}' gives '{name}' as {tuple(tensor.shape)} where torch has "
            f"{tuple(parameter.shape)}; {FOLDER}."
        )
    return tensor.reshape(parameter.shape)


def _add_biases(
    modules: dict[str, torch.nn.Module], header: Header, name_map: gguf.TensorNameMap, used: set[str]
) -> None:
    """Biases of linear layers that transformers' model has none of: a linear layer takes one wherever it stands."""
    for name, module in modules.items():
        if isinstance(module, torch.nn.Linear) and module.bias is None:
            for (found,) in (one for one in _candidates(name + ".bias", name_map) if len(one) == 1):
                if found in header.tensors and found not in used:
                    bias = torch.from_numpy(np.array(_undone(found, header)))
                    module.bias = torch.nn.Parameter(bias.reshape(module.out_features), requires_grad=False)
                    used.add(found)
