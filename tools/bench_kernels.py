#!/usr/bin/env python3
"""Speed of matrix products of each type through ggml, on one machine: ours beside the stock types.

    bench_kernels.py [--rows 8960] [--columns 1536] [--tokens 1 4 512] [--threads 1 2] [--types ...] [--rounds 5]
    [--json]

Weights are random bytes for ours and rounded random numbers for stock types, as many copies of the matrix as exceed the
caches (--megabytes), so that one token reads memory. The result of every type is compared with float64 before it is
timed. Types take turns; the best round counts. The bandwidth of memory is that of one token of F32 weights.
Weights lie in the buffer type that llama.cpp's loader takes for them: CPU_TACQ (ours, rows interleaved), CPU_REPACK
(stock types that upstream repacks) or CPU; --mapped has all of them in CPU, as --no-repack reads them from the file.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ggml_api import F32, I32, Ggml, InitParams  # noqa: E402
from random_tensors import random_tensor  # noqa: E402

from tacq_export.console import guarded  # noqa: E402
from tacq_export.errors import TacqError  # noqa: E402
from tacq_export.format.pack_tensor import dequantize, pack_tensor  # noqa: E402
from tacq_export.format.tensor_types import TYPES_BY_NAME  # noqa: E402
from tacq_export.runtime.build import runtime_path  # noqa: E402

STOCK = {
    "Q4_0": 2,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "IQ2_XXS": 16,
    "IQ2_XS": 17,
    "IQ3_XXS": 18,
    "IQ4_NL": 20,
    "IQ2_S": 22,
    "IQ4_XS": 23,
}
DEFAULT_TYPES = [
    "TACQ2",
    "TACQ2_S1",
    "TACQ2_S4",
    "Q2_K",
    "IQ2_XS",
    "IQ2_S",
    "TACQ3",
    "TACQ3_S1",
    "Q3_K",
    "IQ3_XXS",
    "TACQ4",
    "TACQ4_S1",
    "Q4_0",
    "Q4_K",
]


def weights_of(ggml: Ggml, name: str, rows: int, columns: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(type id, uint8 bytes, float32 values of the first 16 rows) of a random matrix."""
    rng = np.random.default_rng(1)
    if name == "F32":
        values = rng.normal(0, 1, (rows, columns)).astype(np.float32)
        return F32, values, values[:16]
    if name in TYPES_BY_NAME:
        tensor = random_tensor(rng, TYPES_BY_NAME[name], rows, columns)
        tensor.scale_bytes[:] &= ~np.uint8(
            8
        )  # smaller scales: sums stay in a range where errors can be told from rounding
        return tensor.type.id, pack_tensor(tensor), dequantize(tensor)[:16]
    type_id = STOCK[name]
    values = rng.normal(0, 1, (16, columns)).astype(np.float32)
    data = np.empty(16 * ggml.row_size(type_id, columns), np.uint8)
    ones = np.ones(columns, np.float32)  # some types demand an importance matrix
    ggml.quantize_chunk(type_id, values.ctypes.data, data.ctypes.data, 0, 16, columns, ones.ctypes.data)
    decoded = np.empty((16, columns), np.float32)
    ggml.to_float(type_id, data, decoded)
    return type_id, np.tile(data, -(-rows // 16))[: rows * ggml.row_size(type_id, columns)], decoded


class _Plan(ctypes.Structure):
    """ggml_cplan"""

    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    ]


class BenchGgml(Ggml):
    """ggml with what the benchmark needs beside the tests' functions."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        p, i64 = ctypes.c_void_p, ctypes.c_int64
        size = ctypes.c_size_t
        self.bind("ggml_", [("quantize_chunk", size, [ctypes.c_int, p, p, i64, i64, i64, p])])
        self.plan = self.cpu.ggml_graph_plan
        self.plan.restype, self.plan.argtypes = _Plan, [p, ctypes.c_int, p]
        self.graph_compute = self.cpu.ggml_graph_compute
        self.graph_compute.argtypes = [p, p]
        self.bind(
            "ggml_backend_",
            [
                ("reg_get_proc_address", p, [p, ctypes.c_char_p]),
                ("reg_dev_get", p, [p, size]),
                ("dev_supports_op", ctypes.c_bool, [p, p]),
                ("buft_alloc_buffer", p, [p, size]),
                ("buft_name", ctypes.c_char_p, [p]),
                ("buffer_free", None, [p]),
                ("cpu_buffer_type", p, []),
                ("alloc_ctx_tensors_from_buft", p, [p, p]),
                ("tensor_set", None, [p, p, size, size]),
            ],
        )
        self.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, p, p)(
            lambda level, text, data: None
        )  # upstream says each tensor it repacks
        self.base.ggml_log_set(self.quiet, None)
        self.cpu.ggml_backend_cpu_reg.restype = p
        registry = self.cpu.ggml_backend_cpu_reg()
        self.device = self.reg_dev_get(registry, 0)
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(p), p)(
            self.reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        )
        self.extra_buffer_types = list(itertools.takewhile(bool, extra(self.device)))

    def buffer_type(self, product: int, weights: int, mapped: bool) -> int:
        """Where the loader puts `weights` for the op `product`: the first extra buffer type that takes it, else plain
        memory."""
        for buffer_type in () if mapped else self.extra_buffer_types:
            buffer = self.buft_alloc_buffer(buffer_type, 0)
            of_tensor = ctypes.c_void_p.from_address(weights + 8)  # ggml_tensor.buffer
            of_tensor.value = buffer
            takes = self.dev_supports_op(self.device, product)
            of_tensor.value = None
            self.buffer_free(buffer)
            if takes:
                return buffer_type
        return self.cpu_buffer_type()

    def to_float(self, type_id: int, data: np.ndarray, out: np.ndarray) -> None:
        """Decode rows by get_rows, which all types have."""
        with self.context() as ctx:
            w = self.tensor(ctx, type_id, out.shape, data)
            ids = self.tensor(ctx, I32, (len(out),), np.arange(len(out), dtype=np.int32))
            out[:] = self.compute(ctx, self.get_rows(ctx, w, ids), out.shape, 1)


class Case:
    """One type at one size: a graph with a product for every copy of the matrix."""

    def __init__(self, ggml: BenchGgml, name: str, rows: int, columns: int, tokens: int, args: argparse.Namespace):
        self.ggml, self.name, self.cpu_time = ggml, name, args.cpu_time
        type_id, data, first_rows = weights_of(ggml, name, rows, columns)
        megabytes = args.megabytes if tokens < 32 else 1
        self.bytes, self.copies = data.nbytes, max(1, (megabytes << 20) // data.nbytes)
        room = (self.copies * (4 * rows * tokens + 1024) + 4 * columns * tokens >> 20) + 8
        self.ctx, self.weights_ctx = (
            ggml.init(InitParams(room << 20, None, False)),
            ggml.init(InitParams(1024 * self.copies, None, True)),
        )
        x = np.random.default_rng(2).normal(0, 1, (tokens, columns)).astype(np.float32)
        activations = ggml.tensor(self.ctx, F32, x.shape, x)
        self.graph = ggml.new_graph(self.ctx)
        shape = (ctypes.c_int64 * 2)(columns, rows)
        weights = [ggml.new_tensor(self.weights_ctx, type_id, 2, shape) for _ in range(self.copies)]
        products = [ggml.mul_mat(self.ctx, w, activations) for w in weights]
        buffer_type = ggml.buffer_type(products[0], weights[0], args.mapped)
        self.buffer_name = ggml.buft_name(buffer_type).decode()
        self.buffer = ggml.alloc_ctx_tensors_from_buft(self.weights_ctx, buffer_type)
        for w, product in zip(weights, products, strict=False):
            ggml.tensor_set(w, data.ctypes.data, 0, data.nbytes)
            ggml.build_forward_expand(self.graph, product)
        self.run(2)
        got = np.ctypeslib.as_array(
            ctypes.cast(ggml.get_data(product), ctypes.POINTER(ctypes.c_float)), (tokens, rows)
        )[:, :16]
        exact = x.astype(np.float64) @ first_rows.astype(np.float64).T
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        if not error < 0.02:
            raise TacqError(
                f"{name}: the product is off by {error:.3g} of its size, where 8-bit activations allow 0.01; not timed."
            )

    def run(self, threads: int) -> float:
        """Seconds of one product, from all copies one after the other."""
        plan = self.ggml.plan(self.graph, threads, None)
        work = np.empty(max(plan.work_size, 1), np.uint8)
        plan.work_data = work.ctypes.data
        clock = time.process_time if self.cpu_time else time.perf_counter
        start = clock()
        self.ggml.graph_compute(self.graph, ctypes.byref(plan))
        return (clock() - start) / self.copies

    def free(self) -> None:
        self.ggml.buffer_free(self.buffer)
        self.ggml.free(self.weights_ctx)
        self.ggml.free(self.ctx)


def bench(ggml: BenchGgml, args: argparse.Namespace, tokens: int) -> list[dict]:
    """One line for every type and number of threads."""
    cases, lines = [Case(ggml, name, args.rows, args.columns, tokens, args) for name in args.types], []
    memory = Case(ggml, "F32", args.rows, args.columns, 1, args)  # one token of floats does nothing but read
    for threads in args.threads:
        seconds = {case.name: [] for case in [*cases, memory]}
        for _ in range(args.rounds):
            for case in [*cases, memory]:
                seconds[case.name].append(case.run(threads))
        bandwidth = memory.bytes / min(seconds["F32"]) / 1e9
        for case in cases:
            best = min(seconds[case.name])
            rate = case.bytes / best / 1e9
            lines.append(
                {
                    "type": case.name,
                    "buffer": case.buffer_name,
                    "rows": args.rows,
                    "columns": args.columns,
                    "tokens": tokens,
                    "threads": threads,
                    "us": round(best * 1e6, 1),
                    "GB/s": round(rate, 2),
                    "share_of_bandwidth": round(rate / bandwidth, 3),
                    "GFLOP/s": round(2e-9 * args.rows * args.columns * tokens / best, 1),
                    "slowest_us": round(max(seconds[case.name]) * 1e6, 1),
                }
            )
        lines.append({"type": "memory", "threads": threads, "tokens": tokens, "GB/s": round(bandwidth, 2)})
    for case in [*cases, memory]:
        case.free()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8960)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--types", nargs="+", default=DEFAULT_TYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--megabytes", type=int, default=96, help="of weights that one round of one token reads (default: 96)"
    )
    parser.add_argument(
        "--mapped", action="store_true", help="weights as they lie in the file, not interleaved or repacked"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the time of the processor, not of the clock: for a busy machine; 1 thread only",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        raise TacqError("--cpu-time adds the threads' times up; give --threads 1 with it.")
    args.types = [name.upper() for name in args.types]
    unknown = [name for name in args.types if name not in STOCK and name not in TYPES_BY_NAME]
    if unknown:
        raise TacqError(f"unknown type '{unknown[0]}': use types of ours or {', '.join(STOCK)}.")
    ggml = BenchGgml(runtime_path())
    lines = [line for tokens in args.tokens for line in bench(ggml, args, tokens)]
    if args.json:
        print(json.dumps(lines))
        return
    print(f"{args.rows} x {args.columns}, best of {args.rounds} rounds")
    for line in lines:
        if line["type"] == "memory":
            print(f"memory, {line['threads']} threads: {line['GB/s']} GB/s (one token of F32)")
        else:
            print(
                f"{line['type']:<9} {line['buffer']:<10} {line['tokens']:>4} tokens {line['threads']:>2} threads "
                f"{line['us']:>10.1f} us {line['GB/s']:>7.2f} GB/s "
                f"{line['share_of_bandwidth']:>6.1%} of memory {line['GFLOP/s']:>7.1f} GFLOP/s"
            )


if __name__ == "__main__":
    sys.exit(guarded(main, "interrupted"))
