"""Binding of group_descent.c and group_trellis.c: compiled once into the cache, with the C compiler that also builds
the runtime.

The inner loop of the quantizer takes a few hundred dependent operations a group of 32 weights, for which torch would
start one kernel each.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ..errors import TacqError
from ..format.block_codec import CODECS
from ..format.tensor_types import GROUP_SIZE
from ..runtime.build import machine_identity
from ..runtime.source import cache_dir

_SOURCES = [Path(__file__).with_name(name) for name in ("group_descent.c", "group_trellis.c")]
_HEADERS = [Path(__file__).with_name(name) for name in ("group_descent.h", "trellis_search.h")]
# How many scale steps around the one that a group's size asks for are tried, below and above: for 4 bits around the
# first that does not clip the largest weight, which may be clipped to half; else around the one under which the table
# has the group's mean square (measured in tools/LOG.md).
SEARCH_WINDOW = {2: (2, 2), 3: (2, 2), 4: (4, 3)}
CLOSED = 2  # scales whose paths are closed from every state, those of least cost (group_trellis.c)
# No fused multiply-add where the source has two operations: a file then has the same bytes whatever machine wrote it.
_FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-shared", "-fPIC"]
# For speed alone. A compiler of another architecture, or an older one, has not all of them.
_SPEED_FLAGS = ["-march=native", "-mprefer-vector-width=512"]


class _Descent(ctypes.Structure):
    """struct tacq_descent."""

    _fields_ = (
        [(name, ctypes.c_int32) for name in ("bits", "passes", "below", "above", "fresh", "closed")]
        + [(name, ctypes.c_void_p) for name in ("scale_of_byte", "levels")]
        + [(name, ctypes.c_void_p) for name in ("h", "kept", "gradient", "values", "base", "change", "codes", "bytes")]
    )


@cache
def _library() -> ctypes.CDLL:
    """The compiled library. Raises TacqError if there is no C compiler, or it fails."""
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        raise TacqError(
            "There is no C compiler for the quantizer; install one (on Debian and Ubuntu: sudo apt-get install gcc)."
        )
    decisive = [
        *(path.read_text() for path in [*_SOURCES, *_HEADERS]),
        *_FLAGS,
        *_SPEED_FLAGS,
        compiler,
        machine_identity(),
    ]
    key = hashlib.sha256("\n".join(decisive).encode()).hexdigest()[:16]
    target = cache_dir() / "quantizer" / f"group_descent-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        command = [*compiler.split(), *_FLAGS, *accepted_flags(compiler, _SPEED_FLAGS)]
        try:
            done = subprocess.run(
                [*command, "-o", str(partial), *map(str, _SOURCES), "-lm"], capture_output=True, text=True
            )
            said = done.stderr.splitlines()
            lines = ([line for line in said if "error" in line] or said or ["no output"]) if done.returncode else []
        except OSError as error:  # what CC names is not there
            lines = [error.strerror or str(error)]
        if lines:
            raise TacqError(
                f"{compiler} could not compile {_SOURCES[0].name} ({lines[0].strip()}); set CC to another C compiler."
            )
        os.replace(partial, target)
    library = ctypes.CDLL(str(target))
    library.tacq_descend.argtypes, library.tacq_descend.restype = (
        [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64],
        None,
    )
    return library


def accepted_flags(compiler: str, flags: list[str]) -> list[str]:
    """Those of `flags` that `compiler` (a command, with arguments if need be) takes without a word, each asked alone:
    gcc refuses a flag of another architecture, clang warns that it has no use for it."""
    taken = []
    for flag in flags:
        command = [*compiler.split(), flag, "-Werror", "-S", "-x", "c", "-", "-o", os.devnull]
        try:
            asked = subprocess.run(command, input="int nothing;", capture_output=True, text=True)
        except OSError:
            break  # there is no such compiler, which compiling says in words
        if asked.returncode == 0:
            taken.append(flag)
    return taken


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)


class PanelDescent:
    """Descends panel by panel (groups of the same 32 columns in all rows) over one matrix.

    bits: of the codec.  passes: over a group's codes once its byte is chosen.  scales, levels: float32 [256] and as
    many as the codec has, to try others than the codec's (tools/fit_tables.py).
    """

    def __init__(
        self,
        bits: int,
        n_rows: int,
        passes: int = 2,
        scales: torch.Tensor | None = None,
        levels: torch.Tensor | None = None,
    ):
        self._library = _library()
        codec = CODECS[bits]
        self._scales = torch.from_numpy(codec.scale_of_byte) if scales is None else scales
        self._levels = torch.from_numpy(codec.table) if levels is None else levels
        self._n_rows = n_rows
        self._task = _Descent(
            bits=bits,
            passes=passes,
            closed=CLOSED,
            scale_of_byte=self._scales.data_ptr(),
            levels=self._levels.data_ptr(),
        )
        self._task.below, self._task.above = SEARCH_WINDOW[bits]

    def __call__(
        self,
        h: torch.Tensor,
        gradient: torch.Tensor,
        values: torch.Tensor,
        base: torch.Tensor,
        codes: torch.Tensor,
        scale_bytes: torch.Tensor,
        kept: torch.Tensor | None,
        fresh: bool,
    ) -> torch.Tensor:
        """One panel; everything is contiguous and on the CPU. Returns float32 [rows, 32]: the change of `values`.

        h: float32 [32, 32], H of the panel's columns; gradient: float32 [rows, 32], D H there; kept: bool [rows, 32] or
        None; fresh: True if there are no codes yet. Changed in place: values and base, float32 [rows, 32]; codes, uint8
        [rows, 32]; scale_bytes, uint8 [rows].
        """
        n = self._n_rows
        h, change = h.float().contiguous(), torch.empty(n, GROUP_SIZE)
        expected = {
            "h": (h, (GROUP_SIZE, GROUP_SIZE), torch.float32),
            "gradient": (gradient, (n, GROUP_SIZE), torch.float32),
            "values": (values, (n, GROUP_SIZE), torch.float32),
            "base": (base, (n, GROUP_SIZE), torch.float32),
            "codes": (codes, (n, GROUP_SIZE), torch.uint8),
            "bytes": (scale_bytes, (n,), torch.uint8),
        }
        self._task.kept = None
        if kept is not None:
            expected["kept"] = (kept, (n, GROUP_SIZE), torch.bool)
        for name, (tensor, shape, dtype) in expected.items():
            if (
                tensor.shape != shape
                or tensor.dtype != dtype
                or not tensor.is_contiguous()
                or tensor.device.type != "cpu"
            ):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected contiguous {dtype} {shape} on the CPU"
                )
            setattr(self._task, name, tensor.data_ptr())
        self._task.change, self._task.fresh = change.data_ptr(), int(fresh)
        n_threads = torch.get_num_threads()
        share = max(-(-n // n_threads), 16)
        pieces = [(start, min(start + share, n)) for start in range(0, n, share)]
        call = lambda piece: self._library.tacq_descend(ctypes.addressof(self._task), *piece)  # noqa: E731
        if len(pieces) == 1:
            call(pieces[0])
        else:
            list(_pool(n_threads).map(call, pieces))  # ctypes lets go of the interpreter's lock
        return change
