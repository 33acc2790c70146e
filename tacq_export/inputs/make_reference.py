"""The float GGUF of a model: converted by llama.cpp's convert_hf_to_gguf.py, or dequantized from another GGUF."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TacqError
from ..files import need_space
from ..format.gguf_file import open_gguf
from ..format.write_gguf import dequantize_gguf
from ..reporting import Reporter
from ..runtime.run_model import last_error
from .check_folder import Checkpoint
from .check_source import Source, check_source
from .convert import F16_COPY, convert_to_f16
from .dequantize_checkpoint import dequantize_checkpoint


def make_reference(source: str, reference_path: Path, reporter: Reporter) -> None:
    """Write the float GGUF of a model that llama.cpp alone is to run to `reference_path`.

    Raises TacqError for a source that is no language model (`check_source`), is a TACQ file, or cannot be converted.
    """
    write_reference(check_source(source, reporter, loads=False), reference_path, reporter)


def write_reference(source: Source, reference_path: Path, reporter: Reporter) -> None:
    """Write the float GGUF of a source that was checked."""
    if source.gguf is not None:
        dequantize_to_f16(source.gguf, reference_path, reporter)
    elif source.checkpoint is not None:
        with plain_folder(source.checkpoint, reference_path.parent, reporter) as folder:
            convert_to_f16(
                folder, source.checkpoint.weight_bytes, source.checkpoint.text_architecture, reference_path, reporter
            )


def dequantize_to_f16(path: Path, reference_path: Path, reporter: Reporter) -> None:
    """Write the F16 copy of a GGUF, of all its parts if it is split."""
    reader = open_gguf(path)
    reporter.say(f"Dequantizing {path.name} to F16 ...")
    need_space(reference_path.parent, 2.1e-9 * sum(int(t.n_elements) for t in reader.tensors), *F16_COPY)
    dequantize_gguf(path, reference_path, "f16", reporter)


@contextmanager
def plain_folder(checkpoint: Checkpoint, workdir: Path, reporter: Reporter) -> Iterator[Path]:
    """A folder of the checkpoint's weights in floating point: its own, or a copy in BF16 for as long as the `with`
    lasts where they are FP8 or MXFP4."""
    if not checkpoint.quantized:
        yield checkpoint.folder
        return
    # Under the folder's own name: the converter makes the model's name of it where the config has none.
    copy = workdir / "checkpoint-bf16" / checkpoint.folder.resolve().name
    try:
        yield dequantize_checkpoint(checkpoint, copy, reporter)
    finally:
        shutil.rmtree(copy.parent, ignore_errors=True)


_TRY = """
import sys
from tacq_export.runtime.llama_logits import LlamaLogits
with LlamaLogits(sys.argv[1], 32, threads=1) as model:
    next(model.chunks(list(range(min(32, model.n_vocab)))))
"""


def check_reference_loads(reference_path: Path) -> None:
    """Evaluate some tokens of the float GGUF with our llama.cpp, in a process of its own: it may abort instead of
    failing, for some models only where there are several tokens to multiply with.

    Raises TacqError with llama.cpp's reason if it does not load or run the file.
    """
    package = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package)!r})\n{_TRY}", str(reference_path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        ours = [line.partition("TacqError: ")[2] for line in lines if "TacqError: " in line]
        asserts = [line for line in lines if "GGML_ASSERT" in line]
        cause = ours[-1] if ours else asserts[-1] if asserts else last_error(done.stderr)
        raise TacqError(
            f"Our llama.cpp cannot run the float copy of this model ({cause[:300].rstrip('.')}); use a model that the "
            "pinned llama.cpp runs."
        )
