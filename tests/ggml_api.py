"""ggml's C API for the tests: a context, tensors filled from numpy, one op computed, the result as numpy."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from pathlib import Path

import numpy as np

F32, I32, Q8_0 = 0, 26, 8
_MAX_DIMS = 4


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Ggml:
    """The libraries of a build. Tensors are ctypes pointers; shapes are numpy's, so reversed against ggml's ne."""

    def __init__(self, folder: Path):
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        p, i, i64, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
        self.bind(
            "ggml_",
            [
                ("init", p, [InitParams]),
                ("free", None, [p]),
                ("get_data", p, [p]),
                ("new_tensor", p, [p, i, i, ctypes.POINTER(i64)]),
                ("nbytes", size, [p]),
                ("mul_mat", p, [p, p, p]),
                ("mul_mat_id", p, [p, p, p, p]),
                ("get_rows", p, [p, p, p]),
                ("permute", p, [p, p, i, i, i, i]),
                ("view_2d", p, [p, p, i64, i64, size, size]),
                ("reshape_2d", p, [p, p, i64, i64]),
                ("cast", p, [p, p, i]),
                ("add", p, [p, p, p]),
                ("new_graph", p, [p]),
                ("build_forward_expand", None, [p, p]),
                ("type_name", ctypes.c_char_p, [i]),
                ("type_size", size, [i]),
                ("blck_size", i64, [i]),
                ("row_size", size, [i, i64]),
            ],
        )
        self.cpu.ggml_cpu_init()
        self.cpu.ggml_graph_compute_with_ctx.argtypes = [p, p, i]

    def bind(self, prefix: str, functions: list[tuple]) -> None:
        """Make functions of libggml-base, (name without prefix, result, arguments), methods of this object."""
        for name, result, arguments in functions:
            function = getattr(self.base, prefix + name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    @contextmanager
    def context(self, megabytes: int = 64):
        ctx = self.init(InitParams(megabytes << 20, None, False))
        try:
            yield ctx
        finally:
            self.free(ctx)

    def tensor(self, ctx, ggml_type: int, shape: tuple[int, ...], data: np.ndarray):
        """A tensor of numpy `shape` with the bytes of `data`, which must be as many as the tensor has."""
        t = self.new_tensor(ctx, ggml_type, len(shape), (ctypes.c_int64 * len(shape))(*reversed(shape)))
        data = np.ascontiguousarray(data)
        assert self.nbytes(t) == data.nbytes
        ctypes.memmove(self.get_data(t), data.ctypes.data, data.nbytes)
        return t

    def compute(self, ctx, op, shape: tuple[int, ...], threads: int) -> np.ndarray:
        """float32 result, of numpy `shape`, of the op tensor `op`."""
        graph = self.new_graph(ctx)
        self.build_forward_expand(graph, op)
        assert self.cpu.ggml_graph_compute_with_ctx(ctx, graph, threads) == 0
        n = int(np.prod(shape))
        assert self.nbytes(op) == 4 * n
        return (
            np.ctypeslib.as_array(ctypes.cast(self.get_data(op), ctypes.POINTER(ctypes.c_float)), (n,))
            .reshape(shape)
            .copy()
        )
