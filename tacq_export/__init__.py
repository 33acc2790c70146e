"""Task-Circuit Quantization (arXiv 2504.07389) to GGUF: one small task file decides which weights stay at 16 bits.

from tacq_export import ExportConfig, export
export(ExportConfig(model="model.gguf", task="task.jsonl", outfile="model-tacq.gguf"))

import tacq_export
Llama = tacq_export.llama_cpp().Llama     # llama-cpp-python, bound to the libraries that read our types
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import check_system
from .runtime.pinned_gguf import prefer_pinned_gguf

if TYPE_CHECKING:
    from .config import ExportConfig
    from .errors import TacqError
    from .pipeline import ExportResult, export
    from .runtime.run_model import llama_cpp

# Here and not where it is needed: it must come before the first `import gguf` of anybody.
prefer_pinned_gguf()

__all__ = ["ExportConfig", "ExportResult", "TacqError", "export", "llama_cpp"]

_HOME = {
    "ExportConfig": ".config",
    "ExportResult": ".pipeline",
    "TacqError": ".errors",
    "export": ".pipeline",
    "llama_cpp": ".runtime.run_model",
}


def __getattr__(name: str):
    # Imported on first use: `tacq-export --help` and `run` need neither torch nor transformers.
    if name not in _HOME:
        raise AttributeError(f"module 'tacq_export' has no attribute '{name}'")
    if name != "TacqError":
        check_system()
    return getattr(import_module(_HOME[name], __name__), name)
