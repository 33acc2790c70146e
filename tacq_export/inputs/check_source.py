"""What MODEL is, found out from names and headers alone: everything that can be refused early is refused here, before
anything is converted, copied, loaded or left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import TacqError
from ..format.gguf_file import field_value, split_parts
from ..reporting import Reporter
from ..runtime.pinned_gguf import require_pinned_gguf
from .check_folder import Checkpoint, check_config, check_folder
from .check_gguf import check_gguf
from .gguf_config import config_from_gguf

_CONFIGS = ["*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """A model that passed the checks: a GGUF (`gguf`, its first part if it is split) or a folder (`checkpoint`)."""

    gguf: Path | None = None
    checkpoint: Checkpoint | None = None


def check_source(name: str, reporter: Reporter, loads: bool = True) -> Source:
    """Look at MODEL: a GGUF file, a Hugging Face folder, or a hub id, which is fetched.

    loads: the model is to be loaded by transformers too; otherwise a GGUF only needs llama.cpp.
    Raises TacqError for whatever the headers show to be no language model that can be exported (`check_gguf`,
    `check_folder`), and for a name that is none of the three.
    """
    path = Path(name)
    if path.is_file():
        require_pinned_gguf()
        reader = check_gguf(path)
        count = int(field_value(reader, "split.count") or 1)
        first = split_parts(path, count)[0] if count > 1 else path
        if loads:
            config_from_gguf(reader)  # refuses what torch cannot run
        return Source(gguf=first)
    folder = path if path.is_dir() else fetch_from_hub(name, reporter)
    return Source(checkpoint=check_folder(folder, reporter))


def fetch_from_hub(name: str, reporter: Reporter) -> Path:
    """Folder of a hub id's files in the hub's cache: its configs and tokenizer first, and the weights, of one format
    only, if those can be exported.

    Raises TacqError for a name that is no id, or that the hub does not give, and as `check_config`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    missing = f"There is no file or folder {name}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise TacqError(
            f"{missing}; give a GGUF file, a Hugging Face folder, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct."
        )

    def fetch(patterns: list[str]) -> Path:
        try:
            # Without the folders that some have beside: original weights, ONNX, Core ML.
            return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise TacqError(
                f"{missing}, and the hub did not give it ({str(error).splitlines()[0]}); check the name and the "
                "network."
            ) from error

    reporter.say(f"Fetching {name} from the Hugging Face hub ...")
    folder = fetch(_CONFIGS)
    check_config(folder, reporter)
    # PyTorch's own files are a second copy of the weights wherever there are safetensors.
    if (folder / "model.safetensors.index.json").is_file():
        return fetch(["model*.safetensors"])
    folder = fetch(["model.safetensors", "model-*.safetensors"])
    return folder if any(folder.glob("model*.safetensors")) else fetch(["pytorch_model*.bin"])
