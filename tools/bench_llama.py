#!/usr/bin/env python3
"""Speed of whole models: files of one model in our types and in stock types, measured by llama-bench in turns.

    bench_llama.py MODEL.gguf [--types TACQ2_S1 Q2_K ...] [--threads 1 2] [--rounds 3] [--prompt 512] [--generate 64]
    [--json]

Makes what is missing in --workdir: all matrices in one type (as `llama-quantize --pure`), or in those that
llama-quantize gives them in a mix such as Q4_K_M; embedding and output in the same type (--ends) in all files. Only the
first block is quantized, by ggml's own plain rounding, and stands in for all blocks: speed does not depend on the
content, and minutes become seconds. Ours keep the largest rounding errors.

Every round runs every file once; figures are medians over the rounds, ratios are medians of the ratios within a round,
with the least and the largest behind them. `--json` prints a list of {"type", "threads", "pp512", "tg64", "file_bytes"}
and the ratios.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tacq_export.console import guarded  # noqa: E402
from tacq_export.errors import TacqError  # noqa: E402
from tacq_export.evaluation.emulate_stock import EMULATED_MIXES, emulated_types, ggml_quantize  # noqa: E402
from tacq_export.format.block_codec import unpack_blocks  # noqa: E402
from tacq_export.format.gguf_file import numpy_shape, open_gguf, tensor_values, type_named  # noqa: E402
from tacq_export.format.pack_tensor import QuantizedTensor, dequantize  # noqa: E402
from tacq_export.format.sparse_section import KeptWeights, capacity, pack_sparse  # noqa: E402
from tacq_export.format.tensor_types import FORMAT_VERSION, TYPES_BY_NAME  # noqa: E402
from tacq_export.format.write_gguf import PlannedTensor, copied, write_gguf  # noqa: E402
from tacq_export.reporting import Reporter  # noqa: E402
from tacq_export.runtime.build import tool  # noqa: E402
from tacq_export.runtime.source import cache_dir  # noqa: E402

DEFAULT_TYPES = ["TACQ2_S1", "Q2_K", "IQ2_XS", "TACQ3_S1", "Q3_K", "TACQ4", "Q4_0", "Q4_K"]
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
}
RATIOS = [
    ("TACQ2_S1", "Q2_K"),
    ("TACQ2_S1", "IQ2_XS"),
    ("TACQ2_S1", "IQ2_S"),
    ("TACQ2_S4", "TACQ2"),
    ("TACQ2_S1", "TACQ2"),
    ("TACQ3_S1", "Q3_K"),
    ("TACQ3_S1", "IQ3_XXS"),
    ("TACQ4", "Q4_0"),
    ("TACQ2_S1", "Q4_0"),
    ("TACQ3_S1", "Q4_0"),
    ("TACQ3_S1", "Q2_K"),
    ("TACQ4", "Q2_K"),
]
RATIOS += [(ours, stock) for stock in ("Q4_K", "Q4_K_M") for ours in ("TACQ2_S1", "TACQ3_S1", "TACQ4")]


def run(command: list) -> str:
    """Standard output of a program; TacqError with its last lines if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise TacqError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def gguf_type(name: str) -> gguf.GGMLQuantizationType:
    """gguf-py's type of a name of ours or of a stock type."""
    if name not in TYPES_BY_NAME and name not in gguf.GGMLQuantizationType.__members__:
        raise TacqError(f"unknown type '{name}': use a tensor type, such as TACQ2_S1 or Q2_K.")
    return type_named(name)


def quantize(type_name: str, weights: np.ndarray) -> np.ndarray:
    """uint8 bytes of a tensor. For a mixed type of ours the largest rounding errors are kept, as many as fit."""
    t = TYPES_BY_NAME.get(type_name)
    alike = np.ones(weights.shape[1], np.float32)  # IQ2 types demand an importance
    data = ggml_quantize(weights, gguf_type(type_name if t is None else t.base.name), alike)
    if t is None or t.p == 0:
        return data.reshape(-1)
    rows, columns = weights.shape
    error = weights - dequantize(QuantizedTensor(t.base, *unpack_blocks(t.bits, data)))
    n = max(capacity(rows, weights.size, t.p), 0)
    chosen = np.sort(np.argpartition(np.abs(error), weights.size - n, axis=None)[weights.size - n :])
    row_ptr = np.concatenate([[0], np.cumsum(np.bincount(chosen // columns, minlength=rows))]).astype(np.uint32)
    kept = KeptWeights(row_ptr, (chosen % columns).astype(np.uint16), error.reshape(-1)[chosen].astype(np.float16))
    return np.concatenate([data.reshape(-1), pack_sparse(kept, weights.size, t.p)])


def make_file(model: Path, type_name: str, ends: str, workdir: Path, reporter: Reporter) -> Path:
    """The file of `model` in `type_name`, with embedding and output of type `ends`; made if it is not in `workdir`."""
    path = workdir / f"{model.stem}-{type_name.lower()}-{ends.lower()}.gguf"
    if path.is_file():
        return path
    workdir.mkdir(parents=True, exist_ok=True)
    print(f"making {path.name}", file=sys.stderr, flush=True)
    reader, planned, done = open_gguf(model), [], {}
    of_mix = emulated_types(type_name, model, None, ends, ends) if type_name in EMULATED_MIXES else {}
    for tensor in reader.tensors:
        shape = numpy_shape(tensor)
        if len(shape) < 2:
            planned.append(copied(tensor))
            continue
        wanted = (
            ends
            if tensor.name in ("token_embd.weight", "output.weight")
            else of_mix[tensor.name].name
            if of_mix
            else type_name
        )
        if shape[-1] % gguf.GGML_QUANT_SIZES[gguf_type(wanted)][0]:
            wanted = FALLBACKS.get(wanted, "Q8_0")  # as llama-quantize does

        def data(tensor=tensor, shape=shape, wanted=wanted) -> np.ndarray:
            key = (re.sub(r"^blk\.\d+\.", "", tensor.name), shape, wanted)
            if key not in done:
                done[key] = quantize(wanted, np.ascontiguousarray(tensor_values(tensor).reshape(-1, shape[-1])))
            return done[key]

        planned.append(PlannedTensor(tensor.name, shape, gguf_type(wanted), data))
    write_gguf(path, reader, planned, {"general.file_type": 0, "tacq.format_version": FORMAT_VERSION}, reporter)
    return path


def measure(path: Path, threads: int, prompt: int, generate: int) -> tuple[float, float]:
    """(prompt, generation) tokens a second of one run of llama-bench."""
    output = run([tool("llama-bench"), "-m", path, "-t", threads, "-p", prompt, "-n", generate, "-r", 1, "-o", "json"])
    tests = json.loads(output)
    return (next(t["avg_ts"] for t in tests if t["n_gen"] == 0), next(t["avg_ts"] for t in tests if t["n_gen"]))


def ratio_of(ours: list[float], stock: list[float]) -> list[float]:
    """[median, least, largest] of the ratios within a round."""
    ratios = [a / b for a, b in zip(ours, stock, strict=False)]
    return [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", default=DEFAULT_TYPES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--ends", default="Q4_0", help="type of embedding and output in all files (default: Q4_0)")
    parser.add_argument("--workdir", type=Path, default=cache_dir() / "bench")
    parser.add_argument("--only-make", action="store_true", help="make the files and stop")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    names = [name.upper() for name in args.types]
    files = {n: make_file(args.model, n, args.ends.upper(), args.workdir, Reporter()) for n in names}
    if args.only_make:
        return
    rows, ratios = [], []
    for threads in args.threads:
        speed: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                speed[name].append(measure(files[name], threads, args.prompt, args.generate))
        for name in names:
            pp, tg = (statistics.median(values) for values in zip(*speed[name], strict=False))
            rows.append(
                {
                    "type": name,
                    "threads": threads,
                    f"pp{args.prompt}": round(pp, 2),
                    f"tg{args.generate}": round(tg, 2),
                    "file_bytes": files[name].stat().st_size,
                }
            )
        for ours, stock in RATIOS:
            if ours in names and stock in names:
                pp, tg = [
                    ratio_of(*pair)
                    for pair in zip(zip(*speed[ours], strict=False), zip(*speed[stock], strict=False), strict=False)
                ]
                ratios.append(
                    {"ours": ours, "stock": stock, "threads": threads, f"pp{args.prompt}": pp, f"tg{args.generate}": tg}
                )
    if args.json:
        print(
            json.dumps(
                {"model": args.model.name, "ends": args.ends, "rounds": args.rounds, "speed": rows, "ratios": ratios}
            )
        )
        return
    print(f"{args.model.name}, embedding and output {args.ends}, medians of {args.rounds} rounds, tokens/s")
    for row in rows:
        print("  ".join(f"{value:>10}" for value in row.values()))
    for row in ratios:
        print(
            f"{row['ours']} / {row['stock']}, {row['threads']} threads: "
            f"prompt {row[f'pp{args.prompt}']}, generation {row[f'tg{args.generate}']}"
        )


if __name__ == "__main__":
    sys.exit(guarded(main, "interrupted"))
