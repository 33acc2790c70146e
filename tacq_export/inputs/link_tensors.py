"""Which torch module each matrix of the float GGUF is: proven number by number, so no architecture needs code here."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import TacqError
from ..format.gguf_file import field_value, numpy_shape, tensor_values
from ..format.tensor_types import BLOCK_SIZE

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class LinkedTensor:
    """One matrix: its GGUF tensor and the torch module whose `weight` it is.

    rows: int64 [n_rows] or None: GGUF row i is torch row rows[i] (Llama's q and k are stored in another order).
    """

    name: str
    module_name: str
    module: torch.nn.Module
    rows: torch.Tensor | None

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight.detach()

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.module.weight.shape)


def tensor_names(reference: gguf.GGUFReader) -> gguf.TensorNameMap:
    """gguf-py's names of torch modules in GGUF, for the file's architecture. Raises TacqError for one that it does not
    know."""
    architecture = field_value(reference, "general.architecture")
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise TacqError(f"gguf-py does not know the architecture '{architecture}'; update gguf, or use another model.")
    return gguf.get_tensor_name_map(
        known[architecture], int(field_value(reference, f"{architecture}.block_count") or 0)
    )


def link_tensors(
    model: PreTrainedModel, reference: gguf.GGUFReader
) -> tuple[list[LinkedTensor], LinkedTensor, LinkedTensor | None]:
    """(matrices of the blocks, embedding, head or None if tied) of a model and its float GGUF.

    Names are matched with gguf-py's TensorNameMap, then every value is compared: the GGUF must hold the torch weight
    rounded to F16, in some order of its rows. Raises TacqError, naming the tensor, for a pair that differs, a matrix
    that is no torch.nn.Linear, a value that is not finite, or a width that is not a multiple of 64.
    """
    architecture, name_map = field_value(reference, "general.architecture"), tensor_names(reference)
    modules = {}
    for module_name, module in model.named_modules():
        gguf_name = name_map.get_name(module_name)
        if gguf_name is not None and isinstance(getattr(module, "weight", None), torch.Tensor):
            modules[gguf_name + ".weight"] = (module_name, module)
    linear, special = [], {}
    for tensor in reference.tensors:
        shape = numpy_shape(tensor)
        if len(shape) < 2:
            continue
        what = f"tensor '{tensor.name}' ({' x '.join(map(str, shape))}) of architecture '{architecture}'"
        if tensor.name not in modules:
            raise TacqError(
                f"{what} is no layer of the torch model that tacq-export can quantize; this architecture is not "
                "supported yet."
            )
        module_name, module = modules[tensor.name]
        expected = torch.nn.Embedding if tensor.name == EMBEDDING else torch.nn.Linear
        if not isinstance(module, expected) or len(shape) != 2:
            raise TacqError(
                f"{what} is a {type(module).__name__} in torch, expected a {expected.__name__}; this architecture is "
                "not supported yet."
            )
        if shape[1] % BLOCK_SIZE:
            raise TacqError(
                f"{what} has rows of {shape[1]} weights, expected a multiple of {BLOCK_SIZE}; the TACQ types cannot "
                "hold this model."
            )
        linked = LinkedTensor(
            tensor.name, module_name, module, _row_order(tensor_values(tensor), module.weight.detach(), what)
        )
        if tensor.name in (EMBEDDING, HEAD):
            special[tensor.name] = linked
        else:
            linear.append(linked)
    if EMBEDDING not in special or not linear:
        raise TacqError(
            f"The GGUF of architecture '{architecture}' has no {EMBEDDING if linear else 'weight matrices'}; it is no "
            "language model."
        )
    return linear, special[EMBEDDING], special.get(HEAD)


def _row_order(values: np.ndarray, weight: torch.Tensor, what: str) -> torch.Tensor | None:
    """None if GGUF `values` equal the torch weight rounded to F16, else the order of torch rows that makes them
    equal."""
    if not np.isfinite(values).all():
        raise TacqError(f"{what} holds NaN or Inf; the model is damaged, fetch it again.")
    stored = values.astype(np.float16)
    own = weight.to(torch.float16).cpu().numpy()
    if stored.shape == own.shape:
        if np.array_equal(stored, own):
            return None
        rows_of: dict[bytes, list[int]] = {}
        for i, row in enumerate(own + np.float16(0)):  # -0.0 becomes 0.0: equal numbers, equal bytes
            rows_of.setdefault(row.tobytes(), []).append(i)
        order = [rows_of.get(row.tobytes(), []) for row in stored + np.float16(0)]
        if all(order):
            found = torch.tensor([same.pop(0) if same else -1 for same in order])
            if (found >= 0).all():
                return found
    raise TacqError(
        f"{what} does not hold the numbers of its torch weight, in any order of its rows; this architecture is not "
        "supported yet."
    )
