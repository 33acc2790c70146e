"""The float GGUF of a model: converted by llama.cpp's convert_hf_to_gguf.py, or dequantized from another GGUF."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..errors import TacqError
from ..files import need_space, written_atomically
from ..format.gguf_file import field_value, open_gguf
from ..format.tensor_types import TYPES_BY_ID
from ..format.write_gguf import dequantize_gguf
from ..reporting import Reporter
from ..runtime.source import source_tree

_F16_COPY = ("the model at F16", "give --workdir on a larger disk")


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
        if (
            field_value(reader, f"{architecture}.{key}") is None
        ):  # transformers would take its default, that of a 7B model
            raise TacqError(f"{path} has no key {architecture}.{key}; it is damaged or incomplete, fetch it again.")
    reporter.say(f"Dequantizing {path.name} to F16 ...")
    need_space(reference_path.parent, 2.1e-9 * sum(int(t.n_elements) for t in reader.tensors), *_F16_COPY)
    dequantize_gguf(path, reference_path, "f16", reporter)


def _fetch_from_hub(name: str, reporter: Reporter) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    missing = f"There is no file or folder {name}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise TacqError(
            f"{missing}; give a GGUF file, a Hugging Face folder, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct."
        )
    reporter.say(f"Fetching {name} from the Hugging Face hub ...")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TacqError(
            f"{missing}, and the hub did not give it ({str(error).splitlines()[0]}); check the name and the network."
        ) from error


def _convert_to_f16(folder: Path, reference_path: Path, reporter: Reporter) -> None:
    """llama.cpp's own converter, from the pinned source, with the gguf-py beside it."""
    script = source_tree(reporter.say) / "convert_hf_to_gguf.py"
    reporter.say("Converting it to an F16 GGUF with llama.cpp's convert_hf_to_gguf.py ...")
    weights = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    need_space(reference_path.parent, 1.1e-9 * weights, *_F16_COPY)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NO_LOCAL_GGUF")} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    with written_atomically(reference_path) as partial:
        command = [sys.executable, str(script), str(folder), "--outtype", "f16", "--outfile", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
        if done.returncode or not partial.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
            causes = [
                line
                for line in lines
                if "is not supported" in line or line.split(":")[0].endswith(("Error", "Exception"))
            ]
            raise TacqError(
                f"llama.cpp's convert_hf_to_gguf.py cannot convert {folder} ({(causes or lines)[-1].strip()[:300]}); "
                "use an architecture and tokenizer that llama.cpp knows."
            )
