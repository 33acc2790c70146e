"""CPU kernels against float64: the dot products of the base types, and mul_mat, mul_mat_id and get_rows of mixed
tensors.

Tolerances are bounds, not guesses. `ROUNDING` is float32's 2^-24 times a sum's depth; the rest is what Q8_0 does to the
activations: a group of 32 with the largest magnitude a is stored in steps of a/127, so each value is off by at most
a/254, plus the scale's rounding to fp16, a * 2^-11.
"""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ggml_api import F32, I32, Ggml
from random_tensors import alternating_codes, random_tensor

from tacq_export.format.pack_tensor import QuantizedTensor, dequantize, pack_tensor
from tacq_export.format.sparse_section import capacity
from tacq_export.format.tensor_types import TYPES, TYPES_BY_NAME, tensor_type

ROUNDING = 2.0**-24
MIXED = ["tacq2_s1", "tacq2_s16", "tacq3_s3", "tacq3_s8", "tacq4_s2", "tacq4_s12"]


@pytest.fixture(scope="module")
def ggml(runtime):
    return Ggml(runtime)


def q8_0_error(x: np.ndarray) -> np.ndarray:
    """Upper bound of |x - Q8_0(x)| for every value, float64; groups run along the last axis."""
    largest = np.abs(x.astype(np.float64)).reshape(*x.shape[:-1], -1, 32).max(axis=-1)
    return np.repeat(largest * (1 / 254 + 2.0**-11), 32, axis=-1)


def mul_mat_bound(weights: np.ndarray, base: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Upper bound of the error of x @ weights.T: Q8_0 activations for the base part, float32 sums for all."""
    weights, base, x = (np.abs(a.astype(np.float64)) for a in (weights, base, x))
    depth = weights.shape[-1] + 8
    return q8_0_error(x) @ base.swapaxes(-1, -2) + depth * ROUNDING * (x @ (weights + base).swapaxes(-1, -2))


def base_of(tensor: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(tensor.type.base, tensor.codes, tensor.scale_bytes)


def sparse_matrix(tensor: QuantizedTensor) -> np.ndarray:
    """float64 [rows, columns]: the kept weights' differences, zero elsewhere."""
    matrix = np.zeros(tensor.shape)
    matrix[tensor.kept.rows, tensor.kept.columns] = tensor.kept.values
    return matrix


# -- dot products ------------------------------------------------------------------------------------------------------


def q8_0_row(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, float64 values) of a Q8_0 row with any int8 but -128, which Q8_0 never stores."""
    d = rng.normal(0, 0.02, n // 32).astype(np.float16)
    q = rng.integers(-127, 128, (n // 32, 32)).astype(np.int8)
    q[0, ::2], q[0, 1::2] = 127, -127
    data = np.concatenate([d.view(np.uint8).reshape(-1, 2), q.view(np.uint8)], axis=1)
    return data.reshape(-1), (d.astype(np.float64)[:, None] * q).reshape(-1)


def vec_dot(ggml, name: str, x: np.ndarray, y: np.ndarray, n: int) -> float:
    result, size = ctypes.c_float(np.nan), ctypes.c_size_t(0)
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    getattr(ggml.cpu, name)(
        ctypes.c_int(n),
        ctypes.byref(result),
        size,
        ctypes.c_void_p(x.ctypes.data),
        size,
        ctypes.c_void_p(y.ctypes.data),
        size,
        ctypes.c_int(1),
    )
    return result.value


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("n", [64, 128, 576, 896, 4864])
def test_vec_dot(ggml, bits, n):
    rng = np.random.default_rng(n + bits)
    for _ in range(20):
        tensor = random_tensor(rng, TYPES_BY_NAME[f"TACQ{bits}"], 1, n)
        weights = dequantize(tensor)[0].astype(np.float64)
        y, values = q8_0_row(rng, n)
        data = pack_tensor(tensor)
        bound = (
            (n // 32 + 4) * ROUNDING * (np.abs(weights) @ np.abs(values))
        )  # the sum inside a group is exact, in integers
        exact = weights @ values
        assert abs(vec_dot(ggml, f"tacq_vec_dot_tacq{bits}_q8_0_generic", data, y, n) - exact) <= bound
        assert abs(vec_dot(ggml, f"tacq_vec_dot_tacq{bits}_q8_0", data, y, n) - exact) <= bound


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_vec_dot_does_not_saturate(ggml, bits):
    """Every level, in pairs, against the largest activations of one sign: the 16-bit sums of the SIMD code are at their
    limit."""
    for first, second in itertools.product(range(1 << bits), repeat=2):
        codes, scale_bytes = alternating_codes(bits, (1, 128), first, second), np.full((1, 4), 0x7F, np.uint8)
        tensor = QuantizedTensor(TYPES_BY_NAME[f"TACQ{bits}"], codes, scale_bytes)
        y = np.frombuffer((np.float16(1).tobytes() + b"\x7f" * 32) * 4, np.uint8)
        exact = float(dequantize(tensor)[0].astype(np.float64) @ np.full(128, 127.0))
        assert vec_dot(ggml, f"tacq_vec_dot_tacq{bits}_q8_0", pack_tensor(tensor), y, 128) == pytest.approx(
            exact, rel=1e-6
        )


# -- ops ---------------------------------------------------------------------------------------------------------------


def run_mul_mat(ggml, tensor: QuantizedTensor, x: np.ndarray, threads: int) -> np.ndarray:
    with ggml.context() as ctx:
        w = ggml.tensor(ctx, tensor.type.id, tensor.shape, pack_tensor(tensor))
        op = ggml.mul_mat(ctx, w, ggml.tensor(ctx, F32, x.shape, x))
        return ggml.compute(ctx, op, (*x.shape[:-1], tensor.shape[0]), threads)


def check_mixed(got: np.ndarray, got_base: np.ndarray, tensor: QuantizedTensor, x: np.ndarray) -> None:
    """`got` is x @ W.T; and, much more closely, what the base type alone gives plus the sparse part."""
    weights, base, sparse = dequantize(tensor), dequantize(base_of(tensor)), sparse_matrix(tensor)
    assert (np.abs(got - x.astype(np.float64) @ weights.astype(np.float64).T) <= mul_mat_bound(weights, base, x)).all()
    part = x.astype(np.float64) @ sparse.T
    depth = int(np.diff(tensor.kept.row_ptr.astype(np.int64)).max()) + 4
    bound = depth * ROUNDING * (np.abs(x.astype(np.float64)) @ np.abs(sparse).T + np.abs(got_base))
    assert (np.abs(got - got_base - part) <= bound).all()
    assert np.abs(part).max() > 0.05  # the sparse part is there to be seen


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("rows, columns", [(48, 64), (33, 576), (17, 896)])
@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_mul_mat(ggml, name, rows, columns, threads):
    t = tensor_type(name)
    while capacity(rows, rows * columns, t.p) < 20:
        columns += 64  # few bytes a block need a wider tensor to keep anything
    rng = np.random.default_rng(rows + columns)
    tensor = random_tensor(rng, t, rows, columns)
    for batch in (1, 3, 33):
        x = rng.normal(0, 1, (batch, columns)).astype(np.float32)
        got_base = run_mul_mat(ggml, base_of(tensor), x, threads)
        check_mixed(run_mul_mat(ggml, tensor, x, threads), got_base, tensor, x)


def test_mul_mat_of_every_mixed_type(ggml):
    rng = np.random.default_rng(8)
    for t in TYPES:
        if t.p:
            tensor = random_tensor(rng, t, 6, 640)
            x = rng.normal(0, 1, (2, 640)).astype(np.float32)
            check_mixed(run_mul_mat(ggml, tensor, x, 2), run_mul_mat(ggml, base_of(tensor), x, 2), tensor, x)


@pytest.mark.parametrize("name", ["tacq2_s16", "tacq3_s8", "tacq4_s12"])
@pytest.mark.parametrize("threads", [1, 5])
def test_mul_mat_batched_and_broadcast(ggml, name, threads):
    """Weights [2, 3, rows, columns], activations [4, 6, n, columns]: every plane of weights serves 2 x 2 planes."""
    rng = np.random.default_rng(9)
    rows, columns, n = 10, 128, 3
    tensor = random_tensor(rng, tensor_type(name), 6 * rows, columns)
    x = rng.normal(0, 1, (4, 6, n, columns)).astype(np.float32)
    with ggml.context() as ctx:
        w = ggml.tensor(ctx, tensor.type.id, (2, 3, rows, columns), pack_tensor(tensor))
        got = ggml.compute(ctx, ggml.mul_mat(ctx, w, ggml.tensor(ctx, F32, x.shape, x)), (4, 6, n, rows), threads)
    planes = (dequantize(tensor), dequantize(base_of(tensor)))
    weights, base = (p.reshape(2, 3, rows, columns).repeat(2, axis=0).repeat(2, axis=1) for p in planes)
    exact = x.astype(np.float64) @ weights.astype(np.float64).swapaxes(-1, -2)
    assert (np.abs(got - exact) <= mul_mat_bound(weights, base, x)).all()


@pytest.mark.parametrize("threads", [1, 5])
def test_mul_mat_with_permuted_activations(ggml, threads):
    """src1 as attention makes it: rows of a [heads, n, columns] view whose middle axes were swapped."""
    rng = np.random.default_rng(10)
    rows, columns, n, heads = 20, 192, 5, 3
    tensor = random_tensor(rng, tensor_type("tacq2_s16"), rows, columns)
    stored = rng.normal(0, 1, (n, heads, columns)).astype(np.float32)
    with ggml.context() as ctx:
        w = ggml.tensor(ctx, tensor.type.id, tensor.shape, pack_tensor(tensor))
        x = ggml.permute(ctx, ggml.tensor(ctx, F32, stored.shape, stored), 0, 2, 1, 3)
        got = ggml.compute(ctx, ggml.mul_mat(ctx, w, x), (heads, n, rows), threads)
    x = np.ascontiguousarray(stored.swapaxes(0, 1))
    weights, base = dequantize(tensor), dequantize(base_of(tensor))
    assert (np.abs(got - x.astype(np.float64) @ weights.astype(np.float64).T) <= mul_mat_bound(weights, base, x)).all()


@pytest.mark.parametrize("name", ["tacq2_s16", "tacq3_s8", "tacq4_s12"])
@pytest.mark.parametrize("threads", [1, 2, 5, 16])
@pytest.mark.parametrize("shared", [True, False])
def test_mul_mat_id(ggml, name, threads, shared):
    """4 experts, 2 used by each of 7 tokens; activations shared by a token's experts, or one row for each."""
    rng = np.random.default_rng(11)
    experts, used, tokens, rows, columns = 4, 2, 7, 13, 192
    tensor = random_tensor(rng, tensor_type(name), experts * rows, columns)
    x = rng.normal(0, 1, (tokens, 1 if shared else used, columns)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)

    def run(t: QuantizedTensor) -> np.ndarray:
        with ggml.context() as ctx:
            w = ggml.tensor(ctx, t.type.id, (experts, rows, columns), pack_tensor(t))
            op = ggml.mul_mat_id(ctx, w, ggml.tensor(ctx, F32, x.shape, x), ggml.tensor(ctx, I32, ids.shape, ids))
            return ggml.compute(ctx, op, (tokens, used, rows), threads)

    got, got_base = run(tensor), run(base_of(tensor))
    parts = (dequantize(tensor), dequantize(base_of(tensor)), sparse_matrix(tensor))
    weights, base, sparse = (p.reshape(experts, rows, columns) for p in parts)
    for token in range(tokens):
        for i in range(used):
            row, e = x[token, 0 if shared else i][None], ids[token, i]
            exact = row.astype(np.float64) @ weights[e].astype(np.float64).T
            assert (np.abs(got[token, i] - exact) <= mul_mat_bound(weights[e], base[e], row)).all()
            part = row.astype(np.float64) @ sparse[e].T
            bound = (columns + 8) * ROUNDING * (np.abs(row) @ (np.abs(base[e]) + np.abs(sparse[e])).T).max()
            assert (np.abs(got[token, i] - got_base[token, i] - part) <= bound).all()


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_get_rows_is_exact(ggml, name, threads):
    rng = np.random.default_rng(12)
    rows, columns = 40, 576
    tensor = random_tensor(rng, tensor_type(name), rows, columns)
    ids = rng.integers(0, rows, 23).astype(np.int32)
    ids[:3] = [0, rows - 1, 0]
    with ggml.context() as ctx:
        w = ggml.tensor(ctx, tensor.type.id, tensor.shape, pack_tensor(tensor))
        got = ggml.compute(
            ctx, ggml.get_rows(ctx, w, ggml.tensor(ctx, I32, ids.shape, ids)), (len(ids), columns), threads
        )
    assert (got == dequantize(tensor)[ids]).all()


def test_get_rows_of_planes_is_exact(ggml):
    rng = np.random.default_rng(13)
    planes, rows, columns = 3, 10, 128
    tensor = random_tensor(rng, tensor_type("tacq3_s16"), planes * rows, columns)
    ids = rng.integers(0, rows, (planes, 5)).astype(np.int32)
    with ggml.context() as ctx:
        w = ggml.tensor(ctx, tensor.type.id, (planes, rows, columns), pack_tensor(tensor))
        got = ggml.compute(ctx, ggml.get_rows(ctx, w, ggml.tensor(ctx, I32, ids.shape, ids)), (planes, 5, columns), 2)
    weights = dequantize(tensor).reshape(planes, rows, columns)
    assert (got == np.stack([weights[p][ids[p]] for p in range(planes)])).all()


def test_base_types_get_rows_is_exact(ggml):
    rng = np.random.default_rng(14)
    for bits in (2, 3, 4):
        tensor = random_tensor(rng, TYPES_BY_NAME[f"TACQ{bits}"], 9, 320)
        ids = np.array([8, 0, 3], np.int32)
        with ggml.context() as ctx:
            w = ggml.tensor(ctx, tensor.type.id, tensor.shape, pack_tensor(tensor))
            got = ggml.compute(ctx, ggml.get_rows(ctx, w, ggml.tensor(ctx, I32, ids.shape, ids)), (3, 320), 2)
        assert (got == dequantize(tensor)[ids]).all()


# -- what is not implemented is refused --------------------------------------------------------------------------------

REFUSED = {
    "part of a tensor": "op = g.mul_mat(ctx, g.view_2d(ctx, w, 128, 8, g.row_size(w_type, 128), 0), x)",
    "another shape": "op = g.get_rows(ctx, g.reshape_2d(ctx, w, 64, 32), ids)",
    "conversion": "op = g.cast(ctx, w, F32)",
    "conversion to a mixed type": "op = g.cast(ctx, x, w_type)",
    "sum": "op = g.add(ctx, w, x16)",
    "mixed activations": "op = g.mul_mat(ctx, x, w)",
    "damaged section": "ctypes.memset(g.get_data(w) + 16 * 2 * 18, 0, 4); op = g.mul_mat(ctx, w, x)",
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_other_uses_of_a_mixed_tensor_stop_with_a_sentence(runtime, what):
    """Run in a process of its own: ggml aborts, and must do so with our sentence, naming the tensor's type."""
    program = f"""
import ctypes, pathlib, numpy as np
from ggml_api import F32, I32, Ggml
from random_tensors import random_tensor
from tacq_export.format.pack_tensor import pack_tensor
from tacq_export.format.tensor_types import tensor_type
g, w_type = Ggml(pathlib.Path({str(runtime)!r})), tensor_type("tacq2_s16").id
with g.context() as ctx:
    tensor = random_tensor(np.random.default_rng(0), tensor_type("tacq2_s16"), 16, 128)
    w = g.tensor(ctx, w_type, (16, 128), pack_tensor(tensor))
    x = g.tensor(ctx, F32, (2, 128), np.ones((2, 128), np.float32))
    x16 = g.tensor(ctx, F32, (16, 128), np.ones((16, 128), np.float32))
    ids = g.tensor(ctx, I32, (2,), np.zeros(2, np.int32))
    {REFUSED[what]}
    g.compute(ctx, op, (1,), 2)
"""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    program = f"import sys; sys.path[:0] = {paths!r}\n" + program
    env = os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode != 0
    assert "tacq: " in done.stderr and "tacq2_s16" in done.stderr, done.stderr[-2000:]
