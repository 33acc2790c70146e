"""A model as both sides need it: a torch model to calibrate, and a float GGUF whose tensors are to be replaced.

A GGUF is dequantized to F16 first and that file is loaded with transformers; a Hugging Face folder is loaded as it is and
converted with llama.cpp's own convert_hf_to_gguf.py. Either way `link_tensors` proves, number by number, which torch
parameter each GGUF tensor is, so no architecture needs code of its own here.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .errors import TacqError
from .reporting import Reporter
from .runtime_source import need_space, source_tree
from .tensor_types import BLOCK_SIZE, TYPES_BY_ID
from .write_gguf import dequantize_gguf, field_value, numpy_shape, open_gguf, tensor_values, written_atomically

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_F16_COPY = ("the model at F16", "give --workdir on a larger disk")


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


@dataclass(frozen=True)
class LoadedModel:
    """model: float32, eval, no gradients. reference: the float GGUF, open. linear: the matrices of the blocks in file order.
    embedding, head: their own matrices; head is None where it is the embedding (tied)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: gguf.GGUFReader
    reference_path: Path
    linear: list[LinkedTensor]
    embedding: LinkedTensor
    head: LinkedTensor | None

    @property
    def n_linear(self) -> int:
        """Weights of all `linear` matrices together."""
        return sum(t.weight.numel() for t in self.linear)

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
        raise TacqError(f"--device '{name}' cannot be used here ({str(error).splitlines()[0]}); use auto or cpu.") from None
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
    model, tokenizer = _load_from_hugging_face(folder, reporter) if folder else _load_from_gguf(reference_path, reporter)
    model.eval().requires_grad_(False)
    reference = open_gguf(reference_path)
    linear, embedding, head = link_tensors(model, reference)
    return LoadedModel(model.to(target), tokenizer, reference, reference_path, linear, embedding, head)


def make_reference(source: str, reference_path: Path, reporter: Reporter) -> Path | None:
    """Write the float GGUF of a model to `reference_path`; returns the model's folder if it is a Hugging Face one.

    Raises TacqError for a source that is neither, holds no model, is a TACQ file, or cannot be converted.
    """
    path = Path(source)
    if path.is_file():
        _dequantize_to_f16(path, reference_path, reporter)
        return None
    folder = path if path.is_dir() else _fetch_from_hub(source, reporter)
    if not (folder / "config.json").is_file():
        raise TacqError(f"{folder} has no config.json; give a Hugging Face model folder, a hub id, or a GGUF file.")
    _convert_to_f16(folder, reference_path, reporter)
    return folder


def _dequantize_to_f16(path: Path, reference_path: Path, reporter: Reporter) -> None:
    reader = open_gguf(path)
    if not reader.tensors or field_value(reader, "general.architecture") is None:
        raise TacqError(f"{path} holds no model (tensors and general.architecture); give a GGUF of a language model.")
    if any(int(t.tensor_type) in TYPES_BY_ID for t in reader.tensors):
        raise TacqError(f"{path} is already a TACQ file; export from the original model, what it lost is gone.")
    architecture = field_value(reader, "general.architecture")
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        if field_value(reader, f"{architecture}.{key}") is None:  # transformers would take its default, that of a 7B model
            raise TacqError(f"{path} has no key {architecture}.{key}; it is damaged or incomplete, fetch it again.")
    reporter.say(f"Dequantizing {path.name} to F16 ...")
    need_space(reference_path.parent, 2.1e-9 * sum(int(t.n_elements) for t in reader.tensors), *_F16_COPY)
    dequantize_gguf(path, reference_path, "f16", reporter)


def _load_from_gguf(reference_path: Path, reporter: Reporter) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    reporter.say("Loading it with transformers ...")
    try:
        # The float file, not the given one: torch then has the very numbers of the reference.
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars have no switch
            tokenizer = AutoTokenizer.from_pretrained(reference_path.parent, gguf_file=reference_path.name)
            model = AutoModelForCausalLM.from_pretrained(reference_path.parent, gguf_file=reference_path.name, dtype=torch.float32)
    except (ValueError, NotImplementedError, KeyError) as error:
        architecture = field_value(open_gguf(reference_path), "general.architecture")
        raise TacqError(
            f"transformers cannot load a GGUF of architecture '{architecture}' ({str(error).splitlines()[0]}); "
            "give the model's Hugging Face folder instead."
        ) from error
    return model, tokenizer


def _load_from_hugging_face(folder: Path, reporter: Reporter) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    reporter.say(f"Loading {folder} with transformers ...")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise TacqError(f"transformers cannot load {folder} as a causal language model ({str(error).splitlines()[0]}); "
                        "use an architecture that it knows, or update it.") from error
    _check_finite(model)
    return model, tokenizer


def _fetch_from_hub(name: str, reporter: Reporter) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    missing = f"There is no file or folder {name}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise TacqError(f"{missing}; give a GGUF file, a Hugging Face folder, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct.")
    reporter.say(f"Fetching {name} from the Hugging Face hub ...")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TacqError(f"{missing}, and the hub did not give it ({str(error).splitlines()[0]}); check the name and the network.") from error


def _convert_to_f16(folder: Path, reference_path: Path, reporter: Reporter) -> None:
    """llama.cpp's own converter, from the pinned source, with the gguf-py beside it."""
    script = source_tree(reporter.say) / "convert_hf_to_gguf.py"
    reporter.say("Converting it to an F16 GGUF with llama.cpp's convert_hf_to_gguf.py ...")
    weights = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    need_space(reference_path.parent, 1.1e-9 * weights, *_F16_COPY)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NO_LOCAL_GGUF")} | {"CUDA_VISIBLE_DEVICES": ""}
    with written_atomically(reference_path) as partial:
        command = [sys.executable, str(script), str(folder), "--outtype", "f16", "--outfile", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
        if done.returncode or not partial.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
            causes = [line for line in lines if "is not supported" in line or line.split(":")[0].endswith(("Error", "Exception"))]
            raise TacqError(
                f"llama.cpp's convert_hf_to_gguf.py cannot convert {folder} ({(causes or lines)[-1].strip()[:300]}); "
                "use an architecture and tokenizer that llama.cpp knows."
            )


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TacqError(f"tensor '{name}': holds NaN or Inf; the checkpoint is damaged, fetch it again.")


def tensor_names(reference: gguf.GGUFReader) -> gguf.TensorNameMap:
    """gguf-py's names of torch modules in GGUF, for the file's architecture. Raises TacqError for one that it does not know."""
    architecture = field_value(reference, "general.architecture")
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise TacqError(f"gguf-py does not know the architecture '{architecture}'; update gguf, or use another model.")
    return gguf.get_tensor_name_map(known[architecture], int(field_value(reference, f"{architecture}.block_count") or 0))


def link_tensors(model: PreTrainedModel, reference: gguf.GGUFReader) -> tuple[list[LinkedTensor], LinkedTensor, LinkedTensor | None]:
    """(matrices of the blocks, embedding, head or None if tied) of a model and its float GGUF.

    Names are matched with gguf-py's TensorNameMap, then every value is compared: the GGUF must hold the torch weight rounded
    to F16, in some order of its rows. Raises TacqError, naming the tensor, for a pair that differs, a matrix that is no
    torch.nn.Linear, a value that is not finite, or a width that is not a multiple of 64.
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
            raise TacqError(f"{what} is no layer of the torch model that tacq-export can quantize; this architecture is not supported yet.")
        module_name, module = modules[tensor.name]
        expected = torch.nn.Embedding if tensor.name == EMBEDDING else torch.nn.Linear
        if not isinstance(module, expected) or len(shape) != 2:
            raise TacqError(f"{what} is a {type(module).__name__} in torch, expected a {expected.__name__}; this architecture is not supported yet.")
        if shape[1] % BLOCK_SIZE:
            raise TacqError(f"{what} has rows of {shape[1]} weights, expected a multiple of {BLOCK_SIZE}; the TACQ types cannot hold this model.")
        linked = LinkedTensor(tensor.name, module_name, module, _row_order(tensor_values(tensor), module.weight.detach(), what))
        if tensor.name in (EMBEDDING, HEAD):
            special[tensor.name] = linked
        else:
            linear.append(linked)
    if EMBEDDING not in special or not linear:
        raise TacqError(f"The GGUF of architecture '{architecture}' has no {EMBEDDING if linear else 'weight matrices'}; it is no language model.")
    return linear, special[EMBEDDING], special.get(HEAD)


def _row_order(values: np.ndarray, weight: torch.Tensor, what: str) -> torch.Tensor | None:
    """None if GGUF `values` equal the torch weight rounded to F16, else the order of torch rows that makes them equal."""
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
    raise TacqError(f"{what} does not hold the numbers of its torch weight, in any order of its rows; this architecture is not supported yet.")
