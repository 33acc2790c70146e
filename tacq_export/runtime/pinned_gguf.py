"""The gguf-py that belongs to the pinned llama.cpp, in place of the one that pip installed.

gguf-py knows what a GGUF may hold: architectures, the names of their tensors, tensor types. It comes twice: as a
package from the index, and inside llama.cpp's source tree, where it is as new as the converter and the libraries that
we build. The released one is older (0.19.0 lacks 27 of the pinned tree's 153 architectures, and Q2_0). So the package
puts the tree's folder in front of `sys.path` when it is imported, which is before anything here, in transformers or in
the tests imports `gguf`: one module for all, and no line of ours has to say which.

The tree lies in the cache and is unpacked by `tacq-export runtime build`. Where it is not there yet, `import gguf`
gives the released one, which is enough for `inspect` and `dequantize`; whatever needs the tree's calls
`require_pinned_gguf`, so that there is never a half-known architecture without a word.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import TacqError
from .source import work_dir


def pinned_gguf_dir() -> Path:
    """Folder to be on `sys.path` for the tree's gguf-py; it need not exist."""
    return work_dir() / "tree" / "gguf-py"


def prefer_pinned_gguf() -> None:
    """Make `import gguf` give the tree's gguf-py, if the tree is there and `gguf` was not imported before."""
    try:
        folder = pinned_gguf_dir()
    except TacqError:
        return  # a broken installation: whatever needs the C sources says so
    if (folder / "gguf" / "__init__.py").is_file() and "gguf" not in sys.modules and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def require_pinned_gguf() -> None:
    """Raises TacqError if `gguf` is not the tree's: then architectures that llama.cpp knows would be unknown here."""
    import gguf

    found, wanted = Path(gguf.__file__).resolve().parent, (pinned_gguf_dir() / "gguf").resolve()
    if found.parts[-4:] != wanted.parts[-4:]:  # of the same pin in whichever cache
        raise TacqError(
            f"gguf was imported from {found} and not from llama.cpp's source tree ({wanted}); "
            "run 'tacq-export runtime build' if that folder is missing, and import tacq_export before gguf."
        )
