"""llama.cpp's own converter, from the pinned source tree: which architectures it knows, and a conversion with it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from ..errors import TacqError
from ..files import need_space, written_atomically
from ..reporting import Reporter
from ..runtime.source import source_tree
from . import convert_launcher

F16_COPY = ("the model at F16", "give --workdir on a larger disk")


def converter_architectures(reporter: Reporter) -> dict[str, str]:
    """{architecture as config.json names it: module of the converter} of all language models that it converts."""
    return _text_models(source_tree(reporter.say) / "conversion" / "__init__.py")


@cache
def _text_models(path: Path) -> dict[str, str]:
    # Read, not imported: the converter's modules take seconds, and bring a gguf and a torch setup of their own.
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "TEXT_MODEL_MAP":
            assert node.value is not None
            return ast.literal_eval(node.value)
    raise TacqError(f"{path} has no TEXT_MODEL_MAP; the pinned llama.cpp has changed, and convert.py must follow it.")


def convert_to_f16(
    folder: Path, weight_bytes: int, text_architecture: str | None, reference_path: Path, reporter: Reporter
) -> None:
    """Write the F16 GGUF of a Hugging Face folder.

    weight_bytes: of its files, for the check of free space. text_architecture: of the language model inside a wrapper,
    where the converter does not know the wrapper by its name.

    Raises TacqError with the converter's own reason if it cannot.
    """
    tree = source_tree(reporter.say)
    reporter.say("Converting it to an F16 GGUF with llama.cpp's convert_hf_to_gguf.py ...")
    need_space(reference_path.parent, 1.1e-9 * weight_bytes, *F16_COPY)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NO_LOCAL_GGUF")}
    env["CUDA_VISIBLE_DEVICES"] = ""
    with written_atomically(reference_path) as partial:
        command = [sys.executable, convert_launcher.__file__, str(tree), str(folder), str(partial)]
        command += [text_architecture] if text_architecture else []
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
        if done.returncode or not partial.is_file():
            raise TacqError(
                f"llama.cpp's convert_hf_to_gguf.py cannot convert {folder} ({_reason(done.stderr)}); use an "
                "architecture and tokenizer that llama.cpp knows."
            )


def _reason(log: str) -> str:
    """Why the converter gave up, in its own words and one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no output"]
    if any("pre-tokenizer was not recognized" in line for line in lines):
        return "its tokenizer is none that llama.cpp recognizes, by the tokens of a test text"
    causes = [
        line for line in lines if "is not supported" in line or line.split(":")[0].endswith(("Error", "Exception"))
    ]
    cause = (causes or lines)[-1]
    if cause == "AssertionError":  # an assertion without words: what was asserted
        asserted = [line for line in lines if line.startswith("assert ")]
        cause = " of ".join([cause, *(f"'{line}'" for line in asserted[-1:])])
    return cause[:300]
