"""A model as both sides need it: a torch model to calibrate, and a float GGUF whose tensors are to be replaced.

A GGUF is dequantized to F16 first and that file is loaded with transformers; a Hugging Face folder is loaded as it is
and converted with llama.cpp's own convert_hf_to_gguf.py. Either way `link_tensors` proves, number by number, which
torch parameter each GGUF tensor is, so no architecture needs code of its own here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..errors import TacqError
from ..format.gguf_file import field_value, open_gguf
from ..reporting import Reporter
from ..runtime.build import runtime_path
from .as_converted import fold_multipliers, restore_padding_row
from .check_source import Source, check_source
from .convert import convert_to_f16
from .link_tensors import Linked, LinkedTensor, link_tensors
from .load_gguf import load_gguf_model
from .load_torch import load_from_hugging_face
from .make_reference import check_reference_loads, dequantize_to_f16, plain_folder
from .probe_matrices import multiply_one_by_one
from .tokenizer import ModelTokenizer


@dataclass(frozen=True)
class LoadedModel:
    """model: float32, eval, no gradients. reference: the float GGUF, open. linear: the matrices of the blocks in file
    order, one for each expert where a tensor has three dimensions. embedding, head: their own matrices; head is None
    where it is the embedding (tied)."""

    model: PreTrainedModel
    tokenizer: ModelTokenizer
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


def load_model(source: str | Source, workdir: Path, device: str, reporter: Reporter) -> LoadedModel:
    """Load a Hugging Face folder or hub id, or a GGUF file. The float GGUF lies in `workdir`.

    source: MODEL, or what `check_source` made of it.
    Raises TacqError for a source that is none of these, an architecture that transformers or llama.cpp do not know, a
    checkpoint with missing tensors or others (`check_loaded`), a float GGUF that llama.cpp does not run, an embedding
    that is no torch parameter, NaN, or a model without a matrix that can be quantized.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    target = pick_device(device)
    if isinstance(source, str):
        source = check_source(source, reporter)
    runtime_path()  # the float GGUF is tried in it: say before the long work that it is missing
    reference_path = workdir / "reference-f16.gguf"
    model = _both_sides(source, reference_path, reporter)
    model.eval().requires_grad_(False)
    multiply_one_by_one(model)
    check_reference_loads(reference_path)
    give_back_memory()
    reference = open_gguf(reference_path)
    restore_padding_row(model, reference)
    tokenizer = ModelTokenizer(reference_path, reporter.say, reference)
    linear, embedding, head = link_tensors(model, reference, reporter)
    torch.nn.Module.to(model, target)
    return LoadedModel(model, tokenizer, reference, reference_path, linear, embedding, head)


def give_back_memory() -> None:
    """What the loaders have freed goes back to the system. glibc keeps it otherwise: as much as the model again where
    transformers joins the matrices of experts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _both_sides(source: Source, reference_path: Path, reporter: Reporter) -> PreTrainedModel:
    """The torch model; the float GGUF is written to `reference_path`."""
    if source.checkpoint is None:
        assert source.gguf is not None
        dequantize_to_f16(source.gguf, reference_path, reporter)
        reporter.say("Loading it into torch ...")
        return load_gguf_model(reference_path)  # the float file, not the given one: the numbers of the reference
    with plain_folder(source.checkpoint, reference_path.parent, reporter) as folder:
        # Torch first: what it refuses is refused before the float copy is written.
        model = load_from_hugging_face(folder, reporter)
        fold_multipliers(model)
        convert_to_f16(
            folder, source.checkpoint.weight_bytes, source.checkpoint.text_architecture, reference_path, reporter
        )
    return model
