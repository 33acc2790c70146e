"""Weights interleaved at load against the same file read where it is mapped: which tensors the loader takes, and the
same bits from both."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest

from tacq_export.config import ExportConfig
from tacq_export.format.inspect_gguf import inspect_gguf
from tacq_export.pipeline import export
from tacq_export.runtime.llama_logits import LlamaLogits
from tacq_export.runtime.run_model import llama_cpp

TYPES = (
    "attn_q=tacq2",
    "attn_k=tacq3",
    "attn_v=tacq4",
    "attn_output=tacq2_s16",
    "ffn_gate=tacq3_s16",
    "ffn_up=tacq4_s16",
    "ffn_down=tacq2_s8",
)


@pytest.fixture(scope="module")
def mixed(load_tiny, tiny_task, tmp_path_factory, runtime):
    """Every width, with and without kept weights; embedding and head TACQ4, the head a matrix of its own."""
    outfile = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    export(
        ExportConfig(
            str(load_tiny("llama").reference_path),
            tiny_task,
            outfile,
            tensor_types=TYPES,
            n_samples=3,
            seq_len=32,
            device="cpu",
            refine_sweeps=0,
        )
    )
    return outfile


def logits(file, texts, monkeypatch, repack: bool) -> list[np.ndarray]:
    """float32 [tokens, vocabulary] of each text."""
    lib = llama_cpp("cpu")
    default = lib.llama_model_default_params

    def params():
        p = default()
        p.use_extra_bufts = repack
        return p

    with monkeypatch.context() as patch:
        patch.setattr(lib, "llama_model_default_params", params)
        with LlamaLogits(file, 256, 1) as model:
            return [np.concatenate([chunk.copy() for _, chunk in model.chunks(text)]) for text in texts]


def test_the_same_bits_as_from_the_mapped_file(mixed, monkeypatch):
    """One token, three (packed rows), and fifty (unpacked tiles)."""
    assert {t.type for t in inspect_gguf(mixed).tensors} >= {
        "TACQ2",
        "TACQ3",
        "TACQ4",
        "TACQ2_S16",
        "TACQ3_S16",
        "TACQ4_S16",
        "TACQ2_S8",
    }
    rng = np.random.default_rng(5)
    texts = [rng.integers(3, 300, n).tolist() for n in (1, 3, 50)]
    for interleaved, mapped in zip(
        *(logits(mixed, texts, monkeypatch, repack) for repack in (True, False)), strict=True
    ):
        assert np.array_equal(interleaved, mapped) and np.isfinite(mapped).all() and np.ptp(mapped) > 0


@pytest.mark.parametrize("repack", [True, False])
def test_all_matrices_that_are_only_multiplied_are_interleaved(mixed, runtime, repack):
    """By what llama.cpp says it put into that buffer: the bytes of our matrices but for the embedding's, each
    padded."""
    command = [
        runtime / "llama-completion",
        "-m",
        mixed,
        "-p",
        "hello",
        "-n",
        "1",
        "-t",
        "1",
        "-no-cnv",
        "--no-warmup",
        "-lv",
        "4",
    ]
    done = subprocess.run(
        [*map(str, command), *([] if repack else ["--no-repack"])],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
    )
    sizes = [
        line.split("=")[-1].split()[0]
        for line in (done.stdout + done.stderr).splitlines()
        if "CPU_TACQ model buffer size" in line
    ]
    ours = [
        t.nbytes for t in inspect_gguf(mixed).tensors if t.type.startswith("TACQ") and t.name != "token_embd.weight"
    ]
    assert len(ours) == 15
    if repack and ctypes.CDLL(str(runtime / "libggml-cpu.so")).tacq_lanes():
        assert len(sizes) == 1 and abs(float(sizes[0]) - sum(ours) / 2**20) < 0.01 + 64 * len(ours) / 2**20
    else:
        assert sizes == []
