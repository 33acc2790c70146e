#!/usr/bin/env python3
"""Write tests/golden/format_v2.json: floats in, the exact bytes and decoded floats out. Run once, when format version 2
was frozen.

Running it again must change nothing: files in the field hold these bytes. A new format gets a new file beside this one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tacq_export.format.block_codec import CODECS, dequantize_blocks, pack_blocks
from tacq_export.format.pack_tensor import QuantizedTensor, dequantize, pack_tensor
from tacq_export.format.quantize_ref import quantize_ref
from tacq_export.format.sparse_section import KeptWeights
from tacq_export.format.tensor_types import TYPES_BY_NAME

PATH = Path(__file__).with_name("format_v2.json")


def inputs() -> dict[str, np.ndarray]:
    """Weights made of integers and powers of two only, so that every machine has the same."""
    i = np.arange(128, dtype=np.int64)
    noise = (i * 2654435761 % 2**32 >> 12).astype(np.float64) / 2**20 - 0.5
    return {
        "noise": (noise / 8).astype(np.float32),
        "heavy tails": (noise**3 * 2).astype(np.float32),
        "skewed": ((noise + 0.4) / 16).astype(np.float32),
        "ramp": ((i - 64) / 512).astype(np.float32),
        "tiny": (noise / 4096).astype(np.float32),
        "large": (noise * 16).astype(np.float32),
        "clipped": (noise * 1024).astype(np.float32),
        "below the smallest scale": (noise / 2**27).astype(np.float32),
        "a zero group, then one weight": np.where(i == 70, -0.25, 0).astype(np.float32),
    }


def entry(bits: int, weights: np.ndarray) -> dict[str, str]:
    codes, scale_bytes = quantize_ref(bits, weights)
    values = dequantize_blocks(bits, codes, scale_bytes)
    return {
        "bytes": pack_blocks(bits, codes, scale_bytes).tobytes().hex(),
        "decoded": values.astype("<f4").tobytes().hex(),
    }


def mixed() -> dict:
    """TACQ3_S16, 4 rows of 64: row 1 keeps nothing, first and last column are kept."""
    weights = np.stack([inputs()[name][:64] for name in ("noise", "heavy tails", "skewed", "ramp")])
    kept = KeptWeights(
        np.array([0, 2, 2, 3, 6], np.uint32),
        np.array([0, 63, 17, 5, 6, 40], np.uint16),
        np.array([0.5, -0.25, 2.0**-14, -1.5, 3 * 2.0**-24, 65504], np.float16),
    )
    tensor = QuantizedTensor(TYPES_BY_NAME["TACQ3_S16"], *quantize_ref(3, weights), kept)
    return {
        "type": "TACQ3_S16",
        "rows": 4,
        "columns": 64,
        "weights": weights.astype("<f4").tobytes().hex(),
        "row_ptr": kept.row_ptr.tolist(),
        "kept columns": kept.columns.tolist(),
        "kept values": [float(v) for v in kept.values],
        "bytes": pack_tensor(tensor).tobytes().hex(),
        "decoded": dequantize(tensor).astype("<f4").tobytes().hex(),
    }


def main() -> None:
    blocks = {
        name: {"weights": weights.astype("<f4").tobytes().hex()}
        | {f"TACQ{bits}": entry(bits, weights) for bits in CODECS}
        for name, weights in inputs().items()
    }
    PATH.write_text(json.dumps({"blocks": blocks, "mixed": mixed()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
