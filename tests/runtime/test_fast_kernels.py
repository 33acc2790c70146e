"""The CPU kernels below the ops (cpp_ext/tacq-kernels.h): generic code against numpy in float64, each compiled variant
against it.

Variants: the one in the build (for this machine), and the same sources compiled here for AVX-512 without VBMI, for a
plain AVX2 machine and for none at all. All results of one row and token must be the same bits, however many rows and
tokens are computed together.
"""

import ctypes
import itertools
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ggml_api import F32, I32, Ggml
from random_tensors import alternating_codes, random_kept, random_tensor
from test_kernels import base_of, check_mixed, mul_mat_bound, run_mul_mat

from tacq_export.format.block_codec import CODECS
from tacq_export.format.pack_tensor import dequantize, pack_tensor
from tacq_export.format.sparse_section import pack_sparse
from tacq_export.format.tensor_types import TYPES_BY_NAME, tensor_type
from tacq_export.runtime.source import cpp_ext_dir, source_tree

ROUNDING = 2.0**-24
OFFSET, TILE, STRIPE = 64, 32, 48  # TACQ_OFFSET, TACQ_TILE, TACQ_STRIPE
KERNELS = ["tacq-activations.c", "tacq-interleave.c", "tacq-gemv.c", "tacq-gemm.c", "tacq-sparse.c"]
VARIANTS = {
    "built": None,
    "avx512": ["-march=cascadelake"],  # VNNI and no VBMI
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "none": ["-mno-avx"],
}
NEEDED = {"avx512": "avx512_vnni", "avx2": "avx2", "none": "sse2"}  # words of /proc/cpuinfo
SHAPES = [(1, 64), (7, 576), (16, 64), (33, 896), (67, 1536)]


def compiled(folder: Path, runtime: Path, flags: list[str]) -> Path:
    """A library of the kernels alone, compiled with `flags`; what else they call is in the build's libggml-base and
    libggml-cpu."""
    tree = source_tree(lambda text: None)
    includes = [f"-I{p}" for p in (cpp_ext_dir(), tree / "ggml/include", tree / "ggml/src", tree / "ggml/src/ggml-cpu")]
    library = folder / "libkernels.so"
    command = [
        "cc",
        "-O2",
        "-std=gnu11",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-function",
        "-ffp-contract=off",  # as tacq.cmake has it for tacq-sparse.c
        "-DGGML_SHARED",
        "-DGGML_BACKEND_SHARED",
        "-DGGML_BACKEND_BUILD",
        "-D_GNU_SOURCE",
        *flags,
        *includes,
    ]
    command += [str(cpp_ext_dir() / name) for name in KERNELS]
    command += [
        f"-L{runtime}",
        "-lggml-cpu",
        "-lggml-base",
        f"-Wl,-rpath,{runtime}",
        "-Wl,-Bsymbolic",
        "-lm",
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return library


class Kernels:
    """The functions of tacq-kernels.h on numpy arrays."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def call(self, name: str, *arguments) -> None:
        converted = []
        for a in arguments:
            if isinstance(a, np.ndarray):
                converted.append(ctypes.c_void_p(a.ctypes.data))
            elif isinstance(a, list):  # rows of memory
                converted.append((ctypes.c_void_p * len(a))(*[row.ctypes.data for row in a]))
            else:
                converted.append(a if isinstance(a, ctypes.Structure) or a is None else ctypes.c_int64(a))
        function = getattr(self.library, name)
        function.restype = None
        function(*converted)

    def quantize(self, x: np.ndarray, suffix: str = "") -> np.ndarray:
        n = len(x)
        act = aligned((n + n // 4 + 63) // 64 * 64, np.uint8)
        self.call(f"tacq_quantize_act{suffix}", x, act, n, 0, n // 32)
        return act


def aligned(count: int, dtype) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes, as work memory does."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype)


class Sparse(ctypes.Structure):
    """tacq_sparse"""

    _fields_ = [
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
        ("n_rows", ctypes.c_uint32),
        ("nnz", ctypes.c_uint32),
        ("row_ptr", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


def sparse_of(section: np.ndarray) -> Sparse:
    header = Sparse.from_buffer_copy(section[:16].tobytes() + bytes(ctypes.sizeof(Sparse) - 16))
    at = section.ctypes.data + 16
    header.row_ptr, header.columns = at, at + 4 * (header.n_rows + 1)
    header.values = header.columns + 2 * header.nnz
    return header


@pytest.fixture(scope="module", params=list(VARIANTS))
def kernels(request, runtime, tmp_path_factory):
    Ggml(runtime)  # fills ggml's table of fp16 values
    if request.param == "built":
        return Kernels(ctypes.CDLL(str(runtime / "libggml-cpu.so")))
    if platform.machine() != "x86_64" or not shutil.which("cc"):
        pytest.skip("variants are compiled for x86-64, with cc")
    if NEEDED[request.param] not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this machine has no {NEEDED[request.param]}")
    folder = tmp_path_factory.mktemp(request.param)
    return Kernels(ctypes.CDLL(str(compiled(folder, runtime, VARIANTS[request.param]))))


def parts_of(act: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q, d, c) of a quantized row."""
    return act[:n].view(np.int8), act[n : n + n // 8].view(np.float32), act[n + n // 8 : n + n // 4].view(np.int32)


def activations(kernels: Kernels, rng: np.random.Generator, tokens: int, n: int) -> tuple[list[np.ndarray], np.ndarray]:
    """(quantized rows, their values in float64)."""
    acts = [kernels.quantize(rng.normal(0, 1, n).astype(np.float32)) for _ in range(tokens)]
    values = []
    for act in acts:
        q, d, _ = parts_of(act, n)
        values.append((q.reshape(-1, 32) * d.astype(np.float64)[:, None]).reshape(-1))
    return acts, np.stack(values)


def test_quantized_activations(kernels):
    rng = np.random.default_rng(1)
    x = rng.normal(0, 3, 576).astype(np.float32)
    x[32:64], x[64:96], x[96:128], x[128], x[129] = 0, 1e-30, 1e-43, 127, -0.5
    act, plain = kernels.quantize(x), kernels.quantize(x, "_generic")
    assert (act == plain).all()
    q, d, c = parts_of(act, len(x))
    groups = x.reshape(-1, 32).astype(np.float64)
    largest = np.abs(groups).max(axis=1)
    assert d == pytest.approx(largest / 127, rel=1e-6, abs=1e-40)
    assert (
        np.abs(groups - q.reshape(-1, 32) * d.astype(np.float64)[:, None]).max(axis=1)
        <= largest / 254 * (1 + 1e-4) + 1e-35
    ).all()
    assert (c == -OFFSET * q.reshape(-1, 32).astype(int).sum(axis=1)).all()
    assert q.min() >= -127


def test_transposed_activations(kernels):
    rng = np.random.default_rng(2)
    x = [rng.normal(0, 1, 192).astype(np.float32) for _ in range(STRIPE)]
    for suffix in ("", "_generic"):
        out = aligned(192 * STRIPE, np.float32)
        kernels.call(f"tacq_transpose_stripe{suffix}", x, out, 192)
        assert (out.reshape(192, STRIPE) == np.stack(x).T).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows, n", SHAPES)
def test_few_tokens(kernels, bits, rows, n):
    rng = np.random.default_rng(rows + n + bits)
    tensor = random_tensor(rng, TYPES_BY_NAME[f"TACQ{bits}"], rows, n)
    weights, data = dequantize(tensor).astype(np.float64), pack_tensor(tensor).copy()
    acts, values = activations(kernels, rng, 7, n)
    exact = values @ weights.T
    bound = (
        (n // 32 + 8) * ROUNDING * (np.abs(values) @ np.abs(weights).T)
    )  # sums within a group are exact, in integers
    one_by_one = None
    for tokens in (1, 2, 3, 4, 7):
        for suffix in ("", "_generic"):
            y = np.full((7, rows + 1), np.nan, np.float32)
            kernels.call(f"tacq_gemv{suffix}", bits, n, rows, tokens, data, len(data) // rows, None, acts, list(y))
            assert (np.abs(y[:tokens, :rows] - exact[:tokens]) <= bound[:tokens]).all()
            assert np.isnan(y[tokens:]).all() and np.isnan(y[:, rows]).all()
            if suffix == "":
                one_by_one = y if tokens == 1 else one_by_one
                assert (y[0, :rows] == one_by_one[0, :rows]).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows, n", [(1, 64), (5, 576), (16, 896), (17, 64), (31, 1536), (32, 128)])
def test_many_tokens(kernels, bits, rows, n):
    rng = np.random.default_rng(rows + n + bits)
    tensor = random_tensor(rng, TYPES_BY_NAME[f"TACQ{bits}"], rows, n)
    weights, data = dequantize(tensor).astype(np.float64), pack_tensor(tensor).copy()
    tiles = []
    for suffix in ("", "_generic"):
        tile = aligned(n * TILE + n // 32 * TILE * 4, np.uint8)
        kernels.call(f"tacq_unpack{suffix}", bits, n, rows, data, len(data) // rows, tile)
        levels, scales = (
            tile[: n * TILE].reshape(n // 4, TILE, 4),
            tile[n * TILE :].view(np.float32).reshape(n // 32, TILE),
        )
        assert set(np.unique(levels[:, :rows])) <= {v + OFFSET for v in CODECS[bits].levels}
        signed = levels[:, :rows].astype(np.float64).transpose(1, 0, 2).reshape(rows, n) - OFFSET
        assert (signed * np.repeat(scales[:, :rows].T, 32, axis=1) == weights).all()
        tiles.append(tile)
    acts, values = activations(kernels, rng, 50, n)
    exact = values @ weights.T
    bound = (n // 32 + 8) * ROUNDING * (np.abs(values) @ np.abs(weights).T)
    few = np.zeros((50, rows), np.float32)
    kernels.call("tacq_gemv", bits, n, rows, 50, data, len(data) // rows, None, acts, list(few))
    for tokens in (1, 2, 3, 4, 5, 6, 8, 13, 48, 50):
        for suffix, tile in zip(("", "_generic"), tiles, strict=False):
            y = np.full((50, rows + 1), np.nan, np.float32)
            kernels.call(f"tacq_gemm{suffix}", n, rows, tokens, tile, acts, list(y))
            assert (np.abs(y[:tokens, :rows] - exact[:tokens]) <= bound[:tokens]).all()
            assert np.isnan(y[tokens:]).all() and np.isnan(y[:, rows]).all()
            if suffix == "":
                assert (y[:tokens, :rows] == few[:tokens]).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows, n", [*SHAPES, (32, 576)])
def test_interleaved_rows(kernels, bits, rows, n):
    """The layout of tacq-kernels.h; and from it the very same results as from rows as the file has them."""
    rng = np.random.default_rng(rows + n + bits)
    data = pack_tensor(random_tensor(rng, TYPES_BY_NAME[f"TACQ{bits}"], rows, n)).copy()
    lanes = kernels.library.tacq_lanes()
    assert lanes in (0, 4, 8, 16)
    whole = rows // lanes * lanes if lanes else 0
    blocks = data.reshape(rows, n // 64, 2 + 8 * bits)
    parts = []
    for first in range(0, whole, lanes or 1):
        group = blocks[first : first + lanes]
        parts.append(group[:, :, :2].transpose(1, 0, 2).reshape(-1))
        parts.append(group[:, :, 2:].reshape(lanes, n // 64, 2 * bits, 4).transpose(1, 2, 0, 3).reshape(-1))
    expected = np.concatenate([*parts, blocks[whole:].reshape(-1)])
    out, back = np.zeros_like(data), np.zeros_like(data)
    kernels.call("tacq_interleave", bits, n, rows, data, out)
    kernels.call("tacq_deinterleave", bits, n, rows, out, back)
    assert (out == expected).all() and (back == data).all()

    acts, _ = activations(kernels, rng, 7, n)
    for tokens in (1, 2, 3, 4, 7):
        plain, interleaved = (np.full((7, rows + 1), np.nan, np.float32) for _ in range(2))
        kernels.call("tacq_gemv", bits, n, rows, tokens, data, len(data) // rows, None, acts, list(plain))
        kernels.call(
            "tacq_gemv_interleaved", bits, n, rows, tokens, out, len(data) // rows, None, acts, list(interleaved)
        )
        assert np.array_equal(plain, interleaved, equal_nan=True)
    if rows <= TILE:
        tiles = [aligned(n * TILE + n // 32 * TILE * 4, np.uint8) for _ in range(2)]
        kernels.call("tacq_unpack", bits, n, rows, data, len(data) // rows, tiles[0])
        kernels.call("tacq_unpack_interleaved", bits, n, rows, out, len(data) // rows, tiles[1])
        plain, interleaved = (tile[: n * TILE].reshape(n // 4, TILE, 4)[:, :rows] for tile in tiles)
        assert (plain == interleaved).all()
        plain, interleaved = (tile[n * TILE :].view(np.float32).reshape(n // 32, TILE)[:, :rows] for tile in tiles)
        assert (plain == interleaved).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_largest_sums_do_not_saturate(kernels, bits):
    """Every level, in pairs, against activations of +-127: pairs of products are at the limit of 16 bits."""
    n = 128
    tensor = random_tensor(np.random.default_rng(0), TYPES_BY_NAME[f"TACQ{bits}"], 16, n)
    tensor.scale_bytes[:] = 0x7F
    for first, second in itertools.product(range(1 << bits), repeat=2):
        for sign in (1, -1):
            tensor.codes[:] = alternating_codes(bits, (16, n), first, second)
            act = kernels.quantize(np.full(n, 127.0 * sign, np.float32))
            exact = dequantize(tensor).astype(np.float64).sum(axis=1) * 127 * sign
            y, tile = np.zeros((1, 16), np.float32), aligned(n * TILE + n // 32 * TILE * 4, np.uint8)
            data = pack_tensor(tensor).copy()
            kernels.call("tacq_gemv", bits, n, 16, 1, data, len(data) // 16, None, [act], list(y))
            assert y[0] == pytest.approx(exact, rel=1e-6)
            kernels.call("tacq_unpack", bits, n, 16, data, len(data) // 16, tile)
            kernels.call("tacq_gemm", n, 16, 1, tile, [act], list(y))
            assert y[0] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_scale_byte(kernels, bits):
    """Exactly, in a tile; 0 and no small number for k = 0."""
    tensor = random_tensor(np.random.default_rng(1), TYPES_BY_NAME[f"TACQ{bits}"], TILE, 256)
    tensor.scale_bytes[:] = np.arange(TILE * 8).reshape(TILE, 8)
    data, tile = pack_tensor(tensor).copy(), aligned(256 * TILE + 8 * TILE * 4, np.uint8)
    kernels.call("tacq_unpack", bits, 256, TILE, data, len(data) // TILE, tile)
    scales = tile[256 * TILE :].view(np.float32).reshape(8, TILE).T
    assert scales.tobytes() == CODECS[bits].scale_of_byte[tensor.scale_bytes].tobytes()


@pytest.mark.parametrize(
    "rows, n, p",
    [(1, 512, 16), (9, 576, 16), (40, 896, 4), (67, 1536, 2), (5, 8960, 16), (32, 4096, 12), (2, 65536, 12)],
)
def test_kept_weights(kernels, rows, n, p):
    """Rows without entries, short ones and long ones (random_kept puts all into half of the rows), one of more than a
    buffer of products."""
    rng = np.random.default_rng(rows + n)
    kept = random_kept(rng, rows, n, p)
    section = pack_sparse(kept, rows * n, p)
    matrix = np.zeros((rows, n))
    matrix[kept.rows, kept.columns] = kept.values
    x = rng.normal(0, 1, (STRIPE, n)).astype(np.float32)
    before = rng.normal(0, 1, (STRIPE, rows + 1)).astype(np.float32)
    exact = before[:, :rows] + x.astype(np.float64) @ matrix.T
    depth = int(np.diff(kept.row_ptr.astype(np.int64)).max()) + 4
    bound = depth * ROUNDING * (np.abs(before[:, :rows]) + np.abs(x.astype(np.float64)) @ np.abs(matrix).T)
    s, xt = sparse_of(section), aligned(n * STRIPE, np.float32)
    kernels.call("tacq_transpose_stripe", list(x), xt, n)
    for suffix in ("", "_generic"):
        for first in sorted({0, rows // 3}):
            y = before.copy()
            for t in range(3):
                kernels.call(f"tacq_sparse_gemv{suffix}", Ref(s), first, rows - first, x[t], y[t, first:])
            assert (np.abs(y[:3, first:rows] - exact[:3, first:]) <= bound[:3, first:]).all()
            assert (y[:, :first] == before[:, :first]).all() and (y[:, rows] == before[:, rows]).all()
        for tokens in (5, 8, 33, 48):
            y = before.copy()
            for first in range(0, rows, 32):
                part = [row[first:] for row in y]
                kernels.call(f"tacq_sparse_gemm{suffix}", Ref(s), first, min(32, rows - first), tokens, xt, part)
            assert (np.abs(y[:tokens, :rows] - exact[:tokens]) <= bound[:tokens]).all()
            assert (y[tokens:] == before[tokens:]).all() and (y[:, rows] == before[:, rows]).all()


@pytest.mark.parametrize(
    "rows, n, p",
    [(1, 512, 16), (9, 576, 16), (40, 896, 4), (67, 1536, 2), (5, 8960, 16), (32, 4096, 12), (2, 65536, 12)],
)
def test_kept_weights_are_summed_in_one_order(kernels, rows, n, p):
    """The same bits for one token and for a stripe of tokens, and wherever a chunk of rows begins and ends."""
    rng = np.random.default_rng(rows + n)
    section = pack_sparse(random_kept(rng, rows, n, p), rows * n, p)  # s points into it
    s = sparse_of(section)
    x = rng.normal(0, 1, (STRIPE, n)).astype(np.float32)
    before = rng.normal(0, 1, (STRIPE, rows)).astype(np.float32)
    xt = aligned(n * STRIPE, np.float32)
    kernels.call("tacq_transpose_stripe", list(x), xt, n)
    for suffix in ("", "_generic"):
        together = before.copy()
        for first in range(0, rows, 32):
            part = [row[first:] for row in together]
            kernels.call(f"tacq_sparse_gemm{suffix}", Ref(s), first, min(32, rows - first), STRIPE, xt, part)
        for size in (rows, 16, 5, 1):
            alone = before.copy()
            for t in (0, 1, STRIPE - 1):
                for first in range(0, rows, size):
                    n_rows = min(size, rows - first)
                    kernels.call(f"tacq_sparse_gemv{suffix}", Ref(s), first, n_rows, x[t], alone[t, first:])
                assert (alone[t] == together[t]).all(), (suffix, size, t)


def Ref(s: Sparse) -> np.ndarray:
    """The structure as an array, so that its address is passed."""
    return np.frombuffer(s, np.uint8)


CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"


@pytest.mark.skipif(not (shutil.which(CROSS) and shutil.which(EMULATOR)), reason=f"needs {CROSS} and {EMULATOR}")
@pytest.mark.parametrize("march", ["armv8.2-a+dotprod", "armv8-a"])
def test_neon_in_an_emulator(tmp_path, march):
    tree = source_tree(lambda text: None)
    includes = [f"-I{p}" for p in (cpp_ext_dir(), tree / "ggml/include", tree / "ggml/src", tree / "ggml/src/ggml-cpu")]
    sources = [str(cpp_ext_dir() / name) for name in KERNELS[:4]] + [str(Path(__file__).parents[1] / "check_kernels.c")]
    command = [
        CROSS,
        "-O2",
        "-std=gnu11",
        "-static",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-function",
        "-ffp-contract=off",  # as tacq.cmake has it for tacq-sparse.c
        f"-march={march}",
    ]
    subprocess.run([*command, *includes, *sources, "-lm", "-o", str(tmp_path / "check")], check=True)
    done = subprocess.run([EMULATOR, str(tmp_path / "check")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("ok: ") == 18, done.stdout


# -- the ops: shapes and threads that the tests of test_kernels.py do not have
# -------------------------------------------------


@pytest.fixture(scope="module")
def ggml(runtime):
    return Ggml(runtime)


@pytest.mark.parametrize("name", ["tacq2_s2", "tacq3_s4", "tacq4_s8"])
@pytest.mark.parametrize("rows, n", [(5, 576), (100, 576), (67, 896), (1000, 256)])
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_mul_mat_of_all_batch_sizes(ggml, name, rows, n, threads):
    rng = np.random.default_rng(rows + n)
    t = tensor_type(name)
    tensor = random_tensor(rng, t if rows > 5 else t.with_density(16), rows, n)
    for tokens in (1, 2, 3, 8, 33, 100):
        x = rng.normal(0, 1, (tokens, n)).astype(np.float32)
        got_base = run_mul_mat(ggml, base_of(tensor), x, threads)
        got = run_mul_mat(ggml, tensor, x, threads)
        check_mixed(got, got_base, tensor, x)
        assert (got == run_mul_mat(ggml, tensor, x, threads)).all()  # the same bits again


@pytest.mark.parametrize("name", ["tacq2", "tacq2_s1", "tacq3_s4", "tacq4_s16"])
@pytest.mark.parametrize("rows, n", [(37, 576), (100, 896), (300, 1024)])
def test_a_token_has_the_same_bits_alone_and_in_a_batch(ggml, name, rows, n):
    rng = np.random.default_rng(rows + n)
    tensor = random_tensor(rng, tensor_type(name), rows, n)
    x = rng.normal(0, 1, (600, n)).astype(np.float32)
    alone = np.concatenate([run_mul_mat(ggml, tensor, x[t : t + 1], 1) for t in range(64)])
    for threads in (1, 2, 5):
        assert (run_mul_mat(ggml, tensor, x[:1], threads) == alone[:1]).all()
        for tokens in (2, 3, 4, 5, 8, 33, 48, 49, 64, 600):
            assert (run_mul_mat(ggml, tensor, x[:tokens], threads)[:64] == alone[:tokens]).all(), (threads, tokens)


@pytest.mark.parametrize("name", ["tacq2_s2", "tacq4_s8"])
def test_an_expert_gives_a_token_the_same_bits_in_every_batch(ggml, name):
    rng = np.random.default_rng(5)
    experts, used, rows, n, most = 3, 2, 45, 192, 100
    tensor = random_tensor(rng, tensor_type(name), experts * rows, n)
    x = rng.normal(0, 1, (most, 1, n)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:used] for _ in range(most)]).astype(np.int32)

    def run(tokens: slice, threads: int) -> np.ndarray:
        with ggml.context() as ctx:
            w = ggml.tensor(ctx, tensor.type.id, (experts, rows, n), pack_tensor(tensor))
            a, i = np.ascontiguousarray(x[tokens]), np.ascontiguousarray(ids[tokens])
            op = ggml.mul_mat_id(ctx, w, ggml.tensor(ctx, F32, a.shape, a), ggml.tensor(ctx, I32, i.shape, i))
            return ggml.compute(ctx, op, (len(a), used, rows), threads)

    alone = np.concatenate([run(slice(t, t + 1), 1) for t in range(most)])
    for threads in (1, 3):
        for tokens in (2, 4, 5, 40, most):
            assert (run(slice(0, tokens), threads) == alone[:tokens]).all(), (threads, tokens)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_prompt_of_512(ggml, bits):
    rng = np.random.default_rng(bits)
    tensor = random_tensor(rng, TYPES_BY_NAME[f"TACQ{bits}_S4"], 96, 576)
    x = rng.normal(0, 1, (512, 576)).astype(np.float32)
    for threads in (1, 2, 16):
        check_mixed(run_mul_mat(ggml, tensor, x, threads), run_mul_mat(ggml, base_of(tensor), x, threads), tensor, x)


@pytest.mark.parametrize("name", ["tacq2", "tacq3_s16", "tacq4"])
@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("threads", [1, 5])
def test_mul_mat_id_of_few_and_many_tokens(ggml, name, tokens, threads):
    rng = np.random.default_rng(tokens)
    experts, used, rows, n = 4, 2, 45, 192
    tensor = random_tensor(rng, tensor_type(name), experts * rows, n)
    x = rng.normal(0, 1, (tokens, used, n)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)
    with ggml.context() as ctx:
        w = ggml.tensor(ctx, tensor.type.id, (experts, rows, n), pack_tensor(tensor))
        op = ggml.mul_mat_id(ctx, w, ggml.tensor(ctx, F32, x.shape, x), ggml.tensor(ctx, I32, ids.shape, ids))
        got = ggml.compute(ctx, op, (tokens, used, rows), threads)
    weights, base = (p.reshape(experts, rows, n) for p in (dequantize(tensor), dequantize(base_of(tensor))))
    for token in range(tokens):
        for i in range(used):
            e, row = ids[token, i], x[token, i][None]
            exact = row.astype(np.float64) @ weights[e].astype(np.float64).T
            assert (np.abs(got[token, i] - exact) <= mul_mat_bound(weights[e], base[e], row)).all()


def test_rows_of_a_view(ggml):
    """Every second row of a base tensor, as a view: row strides are not the rows' size."""
    rng = np.random.default_rng(3)
    tensor = random_tensor(rng, TYPES_BY_NAME["TACQ3"], 40, 256)
    x = rng.normal(0, 1, (3, 256)).astype(np.float32)
    with ggml.context() as ctx:
        w = ggml.tensor(ctx, tensor.type.id, tensor.shape, pack_tensor(tensor))
        view = ggml.view_2d(ctx, w, 256, 20, 2 * ggml.row_size(tensor.type.id, 256), 0)
        got = ggml.compute(ctx, ggml.mul_mat(ctx, view, ggml.tensor(ctx, F32, x.shape, x)), (3, 20), 2)
    weights = dequantize(tensor)[::2]
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    assert (np.abs(got - exact) <= mul_mat_bound(weights, weights, x)).all()
