"""Format version 1 is frozen: the bytes in tests/golden/format_v1.json, and blocks worked out by hand, must never
change."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tacq_export.format.block_codec import dequantize_blocks, pack_blocks, quantize_ref, unpack_blocks
from tacq_export.format.pack_tensor import QuantizedTensor, dequantize, dequantize_tensor, pack_tensor
from tacq_export.format.sparse_section import KeptWeights
from tacq_export.format.tensor_types import FORMAT_VERSION, TYPES_BY_NAME

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "format_v1.json").read_text())
CASES = [(name, bits) for name in GOLDEN["blocks"] for bits in (2, 3, 4)]


def floats(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), "<f4")


def test_the_golden_file_is_of_this_format_version():
    assert FORMAT_VERSION == 1


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_same_floats_give_the_same_bytes(name, bits):
    case = GOLDEN["blocks"][name]
    assert (
        pack_blocks(bits, *quantize_ref(bits, floats(case["weights"]))).tobytes().hex() == case[f"TACQ{bits}"]["bytes"]
    )


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_same_bytes_give_the_same_floats(name, bits):
    case = GOLDEN["blocks"][name][f"TACQ{bits}"]
    data = np.frombuffer(bytes.fromhex(case["bytes"]), np.uint8)
    assert dequantize_blocks(bits, *unpack_blocks(bits, data)).astype("<f4").tobytes().hex() == case["decoded"]


def test_a_mixed_tensor_has_the_same_bytes_and_floats():
    case = GOLDEN["mixed"]
    kept = KeptWeights(
        np.array(case["row_ptr"], np.uint32),
        np.array(case["kept columns"], np.uint16),
        np.array(case["kept values"], np.float16),
    )
    codes, scale_bytes = quantize_ref(3, floats(case["weights"]).reshape(case["rows"], case["columns"]))
    tensor = QuantizedTensor(TYPES_BY_NAME[case["type"]], codes, scale_bytes, kept)
    assert pack_tensor(tensor).tobytes().hex() == case["bytes"]
    assert dequantize(tensor).astype("<f4").tobytes().hex() == case["decoded"]
    data = np.frombuffer(bytes.fromhex(case["bytes"]), np.uint8)
    assert (
        dequantize_tensor(tensor.type, data, case["rows"], case["columns"], "t").astype("<f4").tobytes().hex()
        == case["decoded"]
    )


def test_a_tacq2_block_by_hand():
    """Scale bytes 0x21 (codebook 1, k = 1) and 0xC0 | 0x02 (sign, codebook 2, k = 2).

    F(0) = 2^-14, one step is 3/8 octave: F(1) = 1.375 * 2^-14, F(2) = 1.75 * 2^-14.
    Codebook 1 is -14 -2 8 22, codebook 2 is -10 0 10 26. Code byte j holds weights j, 16+j, 32+j, 48+j, two bits each
    from the lowest: 0xE4 is 0, 1, 2, 3.
    """
    block = np.frombuffer(bytes([0x21, 0xC2, 0xE4] + [0x00] * 14 + [0x1B]), np.uint8)
    values = dequantize_blocks(2, *unpack_blocks(2, block))
    first, second = 0.375 * 2**-14, -0.75 * 2**-14
    expected = [-14 * first] * 32 + [-10 * second] * 32
    expected[0], expected[16], expected[32], expected[48] = -14 * first, -2 * first, 10 * second, 26 * second
    expected[15], expected[31], expected[47], expected[63] = 22 * first, 8 * first, 0 * second, -10 * second
    assert values.tolist() == expected


def test_a_tacq3_block_by_hand():
    """Scale bytes 0x40 | 0x04 (codebook 1, k = 4) and 0x80 (k = 0: all zero).

    One step is 3/16 octave from 2^-15: F(4) = 1.75 * 2^-15, the scale 0.75 * 2^-15. Codebook 1: -40 -21 -8 1 12 25 42
    63. Low bits 0x01 in byte 0: weight 0 has 1. High bits 0x03 in byte 0: weights 0 and 8 have 4 more.
    """
    block = np.frombuffer(bytes([0x44, 0x80, 0x01] + [0] * 15 + [0x03] + [0] * 7), np.uint8)
    values = dequantize_blocks(3, *unpack_blocks(3, block))
    scale = 0.75 * 2**-15
    expected = [-40 * scale] * 32 + [0.0] * 32
    expected[0], expected[8] = 25 * scale, 12 * scale  # codes 5 and 4
    assert values.tolist() == expected


def test_a_tacq4_block_by_hand():
    """Scale bytes 0x10 (k = 16: 16 * 3/32 = 1.5 octaves, F = 2^-14 * 1.5) and 0x90 (the same, negative).

    Code byte j < 16: weight j low, weight 16+j high; byte 16+j: weights 32+j and 48+j. Level 7 is 0, level 15 is 63.
    """
    block = np.frombuffer(bytes([0x10, 0x90] + [0xF7] + [0x77] * 15 + [0x77] * 15 + [0x0F]), np.uint8)
    values = dequantize_blocks(4, *unpack_blocks(4, block))
    scale = 1.5 * 2**-14 - 2**-15
    expected = [0.0] * 64
    expected[16], expected[47], expected[63] = 63 * scale, -63 * scale, 57 * scale
    assert values.tolist() == expected


def test_a_mixed_tensor_by_hand():
    """TACQ2_S16, 2 rows of 64: 36 bytes of base, then 32 bytes: header 16, row_ptr 12, one kept weight 4.

    The kept weight is row 1, column 33, 0.5 more than its base value.
    """
    base = bytes([0x21, 0x00] + [0x00] * 16) + bytes([0x00, 0x22] + [0xFF] * 16)
    section = struct.pack("<IHHII", 0x53514354, 1, 0, 2, 1) + struct.pack("<III", 0, 0, 1) + struct.pack("<He", 33, 0.5)
    values = dequantize_tensor(TYPES_BY_NAME["TACQ2_S16"], np.frombuffer(base + section, np.uint8), 2, 64, "t")
    first, second = 0.375 * 2**-14, 0.75 * 2**-14
    expected = np.zeros((2, 64))
    expected[0, :32] = -14 * first
    expected[1, 32:] = 22 * second
    expected[1, 33] += 0.5
    assert section[:4] == b"TCQS"
    assert np.array_equal(values, expected.astype(np.float32))
