"""A model as both sides need it: a torch model to calibrate, and a float GGUF whose tensors are to be replaced.

A GGUF is dequantized to F16 first and that file is loaded with transformers; a Hugging Face folder is loaded as it is
and converted with llama.cpp's own convert_hf_to_gguf.py. Either way `link_tensors` proves, number by number, which
torch parameter each GGUF tensor is, so no architecture needs code of its own here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import TacqError
from ..format.gguf_file import field_value, open_gguf
from ..reporting import Reporter
from .link_tensors import Linked, LinkedTensor, link_tensors
from .load_torch import load_from_gguf, load_from_hugging_face
from .make_reference import make_reference
from .probe_matrices import multiply_one_by_one


@dataclass(frozen=True)
class LoadedModel:
    """model: float32, eval, no gradients. reference: the float GGUF, open. linear: the matrices of the blocks in file
    order, one for each expert where a tensor has three dimensions. embedding, head: their own matrices; head is None where it is the embedding (tied)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: gguf.GGUFReader
    reference_path: Path
    linear: list[Linked]
    embedding: LinkedTensor
    head: LinkedTensor | None

    @property
    def n_linear(self) -> int:
        """Weights of all `linear` matrices together."""
        return sum(t.n_weights for t in self.linear)

    @property
    def name(self) -> str:
        return str(field_value(self.reference, "general.name") or self.reference_path.stem)


def pick_device(name: str) -> torch.device:
    """torch device of --device. Raises TacqError for one that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor a CUDA device")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TacqError(
            f"--device '{name}' cannot be used here ({str(error).splitlines()[0]}); use auto or cpu."
        ) from None
    return device


def load_model(source: str, workdir: Path, device: str, reporter: Reporter) -> LoadedModel:
    """Load a Hugging Face folder or hub id, or a GGUF file. The float GGUF lies in `workdir`.

    Raises TacqError for a source that is none of these, an architecture that transformers or llama.cpp do not know, a
    tensor that is no torch parameter, has NaN, or has a width that is not a multiple of 64.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    target = pick_device(device)
    reference_path = workdir / "reference-f16.gguf"
    folder = make_reference(source, reference_path, reporter)
    model, tokenizer = load_from_hugging_face(folder, reporter) if folder else load_from_gguf(reference_path, reporter)
    model.eval().requires_grad_(False)
    multiply_one_by_one(model)
    reference = open_gguf(reference_path)
    linear, embedding, head = link_tensors(model, reference, reporter)
    return LoadedModel(model.to(target), tokenizer, reference, reference_path, linear, embedding, head)
