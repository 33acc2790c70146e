"""The Python codec and the C codec are the same: every byte when quantizing, every bit when dequantizing."""

import ctypes

import numpy as np
import pytest
from random_tensors import random_kept

from tacq_export.errors import TacqError
from tacq_export.format.block_codec import CODECS, dequantize_blocks, level_indices, pack_blocks, unpack_blocks
from tacq_export.format.quantize_ref import quantize_ref
from tacq_export.format.sparse_section import KeptWeights, pack_sparse, unpack_sparse
from tacq_export.format.tensor_types import TYPES


@pytest.fixture(scope="module")
def base(runtime):
    lib = ctypes.CDLL(str(runtime / "libggml-base.so"))
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    return lib


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def c_quantize(base, bits: int, x: np.ndarray) -> np.ndarray:
    out = np.full(x.size // 64 * CODECS[bits].block_bytes + 16, 0xA5, dtype=np.uint8)
    getattr(base, f"quantize_row_tacq{bits}_ref")(pointer(x), pointer(out), ctypes.c_int64(x.size))
    assert (out[-16:] == 0xA5).all(), "wrote past the end"
    return out[:-16]


def c_dequantize(base, bits: int, data: np.ndarray, n: int) -> np.ndarray:
    out = np.full(n + 4, 7.0, dtype=np.float32)
    getattr(base, f"dequantize_row_tacq{bits}")(pointer(data), pointer(out), ctypes.c_int64(n))
    assert (out[-4:] == 7.0).all(), "wrote past the end"
    return out[:-4]


def c_quantize_chunk(base, bits: int, x: np.ndarray, out: np.ndarray, imatrix: ctypes.c_void_p | None) -> int:
    """Bytes written to `out` for the matrix x [rows, columns], as llama-quantize asks for it."""
    rows, columns = map(ctypes.c_int64, x.shape)
    return base.ggml_quantize_chunk(510 + bits, pointer(x), pointer(out), ctypes.c_int64(0), rows, columns, imatrix)


def edge_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    normal = rng.normal(0, 0.02, 256).astype(np.float32)
    huge, alone, mixed = normal.copy(), np.zeros(128, np.float32), normal.copy()
    huge[40] = 1e30  # beyond the largest scale: clipped
    alone[77] = -0.031
    mixed[::3] = -0.0
    lattice = np.concatenate(
        [np.float32(2.0**-9) * np.resize(codec.table, 64) for codec in CODECS.values()]
        + [np.float32(2.0**-9) * (np.resize(codec.table, 64) + np.float32(0.5)) for codec in CODECS.values()]
    )
    return {
        "zeros": np.zeros(64, np.float32),
        "negative zeros": np.full(64, -0.0, np.float32),
        "some negative zeros": mixed,
        "one huge weight": huge,
        "one weight": alone,
        "all clipped": rng.normal(0, 1e6, 128).astype(np.float32),
        "largest float": np.full(64, np.finfo(np.float32).max, np.float32),
        "denormals": (rng.normal(0, 1, 128) * 1e-41).astype(np.float32),
        "smallest denormal": np.full(64, 1e-45, np.float32),
        "below the smallest scale": rng.normal(0, 1e-10, 128).astype(np.float32),
        "constant": np.full(64, 0.0173, np.float32),
        "ties": lattice.astype(np.float32),
        "long tails": (rng.standard_t(2, 1024) * 0.02).astype(np.float32),
        "powers of two": np.ldexp(np.float32(1), rng.integers(-20, 4, 256)).astype(np.float32),
    }


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", list(edge_data()))
def test_quantize_edge_data(base, bits, name):
    x = edge_data()[name]
    assert c_quantize(base, bits, x).tobytes() == pack_blocks(bits, *quantize_ref(bits, x)).tobytes()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 0.02, 1.0, 30.0])
def test_quantize_random_data(base, bits, scale):
    rng = np.random.default_rng(int(scale * 1e9) + bits)
    x = np.concatenate(
        [rng.normal(0, scale, 64 * 24), rng.laplace(0, scale, 64 * 24), rng.uniform(-scale, scale, 64 * 16)]
    )
    x = x.astype(np.float32)
    assert c_quantize(base, bits, x).tobytes() == pack_blocks(bits, *quantize_ref(bits, x)).tobytes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dequantize_every_scale_byte_and_every_level(base, bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (1024, 64), dtype=np.uint8)
    for place in level_indices(bits, codes).T:  # every level in every place of the layout
        assert set(place) == set(range(len(CODECS[bits].levels)))
    scale_bytes = np.repeat(np.arange(1024).astype(np.uint8)[:, None], 2, axis=1)
    scale_bytes[:, 1] = scale_bytes[::-1, 1]
    data = pack_blocks(bits, codes, scale_bytes).reshape(-1)
    expected = dequantize_blocks(bits, codes, scale_bytes).reshape(-1)
    assert c_dequantize(base, bits, data, codes.size).tobytes() == expected.tobytes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dequantize_random_bytes(base, bits):
    data = np.random.default_rng(bits).integers(0, 256, 300 * CODECS[bits].block_bytes, dtype=np.uint8)
    expected = dequantize_blocks(bits, *unpack_blocks(bits, data))
    assert c_dequantize(base, bits, data, 300 * 64).tobytes() == expected.tobytes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quantize_chunk_without_imatrix_is_the_reference(base, bits):
    x = np.random.default_rng(5).normal(0, 0.02, (6, 192)).astype(np.float32)
    out = np.zeros((6, 192 // 64 * CODECS[bits].block_bytes), dtype=np.uint8)
    size = c_quantize_chunk(base, bits, x, out, None)
    assert size == out.nbytes
    assert out.tobytes() == pack_blocks(bits, *quantize_ref(bits, x)).tobytes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_imatrix_lowers_the_weighted_error(base, bits):
    rng = np.random.default_rng(6)
    x = rng.normal(0, 0.02, (16, 256)).astype(np.float32)
    imatrix = (rng.pareto(1.0, 256) + 0.01).astype(np.float32)
    imatrix[:32] = 0  # no activation at all: still a sane group
    errors = []
    for importance in (None, pointer(imatrix)):
        out = np.zeros((16, 256 // 64 * CODECS[bits].block_bytes), dtype=np.uint8)
        c_quantize_chunk(base, bits, x, out, importance)
        diff = c_dequantize(base, bits, out.reshape(-1), x.size).reshape(x.shape) - x
        errors.append((imatrix * diff**2).sum())
        assert (diff[:, :32] ** 2).mean() < 0.25 * (x[:, :32] ** 2).mean()
    assert errors[1] < errors[0]


def test_types_have_the_same_names_and_sizes(base):
    for t in TYPES:
        assert base.ggml_type_name(t.id).decode() == t.name.lower()
        assert base.ggml_type_size(t.id) == t.type_size
        assert base.ggml_blck_size(t.id) == 64


def test_ids_between_are_holes(base):
    for i in [*range(43, 512), *range(515, 520)]:
        assert base.ggml_blck_size(i) == 0 and base.ggml_type_size(i) == 0


def c_validate(base, section: np.ndarray, rows: int, columns: int) -> str | None:
    message = ctypes.create_string_buffer(512)
    section = np.ascontiguousarray(section)
    base.tacq_validate_section.restype = ctypes.c_bool
    shape = ctypes.c_size_t(len(section)), ctypes.c_int64(rows), ctypes.c_int64(columns)
    ok = base.tacq_validate_section(pointer(section), *shape, b"blk.0.x", message, ctypes.c_size_t(512))
    return None if ok else message.value.decode()


def py_validate(section: np.ndarray, rows: int, columns: int) -> str | None:
    try:
        unpack_sparse(section, rows, columns, "blk.0.x")
    except TacqError as error:
        return str(error)
    return None


ROWS, COLUMNS, P = 24, 128, 16


def good_section() -> np.ndarray:
    kept = random_kept(np.random.default_rng(2), ROWS, COLUMNS, P)
    return pack_sparse(kept, ROWS * COLUMNS, P)


def test_good_sections_pass_both(base):
    nothing = KeptWeights(np.zeros(ROWS + 1, np.uint32), np.zeros(0, np.uint16), np.zeros(0, np.float16))
    for section in (good_section(), pack_sparse(nothing, ROWS * COLUMNS, P)):
        assert c_validate(base, section, ROWS, COLUMNS) is None
        assert py_validate(section, ROWS, COLUMNS) is None


def test_c_and_python_reject_the_same_sections(base):
    """Single bytes changed, all over the section: both accept, or both reject and name the tensor."""
    rng = np.random.default_rng(3)
    section = good_section()
    used = 16 + 4 * (ROWS + 1) + 4 * int(section[12:16].view("<u4")[0])
    rejected = 0
    for at in [*range(16 + 4 * (ROWS + 1)), *rng.integers(16, used, 600)]:
        hostile = section.copy()
        hostile[at] ^= rng.integers(1, 256)
        c, py = c_validate(base, hostile, ROWS, COLUMNS), py_validate(hostile, ROWS, COLUMNS)
        assert (c is None) == (py is None), (at, c, py)
        if c is not None:
            rejected += 1
            assert "'blk.0.x'" in c and "'blk.0.x'" in py
    assert rejected > 200


def test_truncated_sections_are_rejected(base):
    section = good_section()
    used = 16 + 4 * (ROWS + 1) + 4 * int(section[12:16].view("<u4")[0])
    for size in range(0, used, 7):
        # a copy of exactly that size, so that a read past the end is one past the allocation
        assert c_validate(base, section[:size].copy(), ROWS, COLUMNS) is not None
    assert c_validate(base, section[:used].copy(), ROWS, COLUMNS) is None
    assert "too small" in c_validate(base, section, 1 << 40, COLUMNS)
    assert "too small" in c_validate(base, section, -1, COLUMNS)
