"""Format version 2 is frozen: the bytes in tests/golden/format_v2.json, and blocks worked out by hand, must never
change."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tacq_export.format.block_codec import dequantize_blocks, pack_blocks, unpack_blocks
from tacq_export.format.pack_tensor import QuantizedTensor, dequantize, dequantize_tensor, pack_tensor
from tacq_export.format.quantize_ref import quantize_ref
from tacq_export.format.sparse_section import KeptWeights
from tacq_export.format.tensor_types import FORMAT_VERSION, TYPES_BY_NAME

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "format_v2.json").read_text())
CASES = [(name, bits) for name in GOLDEN["blocks"] for bits in (2, 3, 4)]


def floats(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), "<f4")


def test_the_golden_file_is_of_this_format_version():
    assert FORMAT_VERSION == 2


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
    """Scale bytes 0x20 (k = 32: 32 * 7/32 = 7 octaves above 2^-28) and 0xA4 (k = 36, 7 + 7/8 octaves; negative).

    Codes are 0 but for: byte 2 = 0xE4, weights 0, 4, 8, 12 have 0, 1, 2, 3; byte 13 = 0x02, weight 35 has 2; byte 17 =
    0xC0, weight 63 has 3. In the ring of the first group weight 1 follows 12; in that of the second, 32 follows 63, and
    39 follows 35. The level is number 4 * code + code before: 0 is -52, 1 * 4 + 0 is -14, 2 * 4 + 1 is -6, 3 * 4 + 2 is
    -35, 0 + 3 is 13; 2 * 4 + 0 is 6, 0 + 2 is -12; 3 * 4 + 0 is 30, 0 + 3 is 13.
    """
    block = np.frombuffer(bytes([0x20, 0xA4, 0xE4] + [0x00] * 10 + [0x02] + [0x00] * 3 + [0xC0]), np.uint8)
    values = dequantize_blocks(2, *unpack_blocks(2, block))
    first, second = 2**-21, -(1 + 7 / 8) * 2**-21
    expected = [-52 * first] * 32 + [-52 * second] * 32
    expected[4], expected[8], expected[12], expected[1] = -14 * first, -6 * first, -35 * first, 13 * first
    expected[35], expected[39], expected[63], expected[32] = 6 * second, -12 * second, 30 * second, 13 * second
    assert values.tolist() == expected


def test_a_tacq3_block_by_hand():
    """Scale bytes 0x20 (k = 32: 2^-21) and 0x80 (k = 0: all zero).

    Low bits 0x01 in byte 2: weight 0 has 1. High bits 0x83 in byte 18: weights 0, 4 and 28 have 4 more, so codes 5, 4
    and 4. The index is 4 * code + the low two bits of the code before: 20 for weight 0 (it follows 31), 17 for 4, 16
    for 28, 0 for the others: 8 follows 4, and 17 follows 28, whose low bits are 0.
    """
    block = np.frombuffer(bytes([0x20, 0x80, 0x01] + [0] * 15 + [0x83] + [0] * 7), np.uint8)
    values = dequantize_blocks(3, *unpack_blocks(3, block))
    scale = 2**-21
    expected = [-63 * scale] * 32 + [0.0] * 32
    expected[0], expected[4], expected[28] = 6 * scale, 21 * scale, -1 * scale
    assert values.tolist() == expected


def test_a_tacq4_block_by_hand():
    """Scale bytes 0x10 (k = 16: 16 * 7/32 = 3.5 octaves, 1.5 * 2^-25) and 0x90 (the same, negative).

    Code byte j < 16: weight j low, weight 16+j high; byte 16+j: weights 32+j and 48+j. Level 7 is -2, level 15 is 63,
    level 0 is -61.
    """
    block = np.frombuffer(bytes([0x10, 0x90] + [0xF7] + [0x77] * 15 + [0x77] * 15 + [0x0F]), np.uint8)
    values = dequantize_blocks(4, *unpack_blocks(4, block))
    scale = 1.5 * 2**-25
    expected = [-2 * scale] * 32 + [2 * scale] * 32
    expected[16], expected[47], expected[63] = 63 * scale, -63 * scale, 61 * scale
    assert values.tolist() == expected


def test_a_mixed_tensor_by_hand():
    """TACQ2_S16, 2 rows of 64: 36 bytes of base, then 32 bytes: header 16, row_ptr 12, one kept weight 4.

    The kept weight is row 1, column 33, 0.5 more than its base value. Codes 0 after 0 have the level -52, 3 after 3 -5.
    """
    base = bytes([0x20, 0x00] + [0x00] * 16) + bytes([0x00, 0x24] + [0xFF] * 16)
    section = struct.pack("<IHHII", 0x53514354, 1, 0, 2, 1) + struct.pack("<III", 0, 0, 1) + struct.pack("<He", 33, 0.5)
    values = dequantize_tensor(TYPES_BY_NAME["TACQ2_S16"], np.frombuffer(base + section, np.uint8), 2, 64, "t")
    first, second = 2**-21, (1 + 7 / 8) * 2**-21
    expected = np.zeros((2, 64))
    expected[0, :32] = -52 * first
    expected[1, 32:] = -5 * second
    expected[1, 33] += 0.5
    assert section[:4] == b"TCQS"
    assert np.array_equal(values, expected.astype(np.float32))
