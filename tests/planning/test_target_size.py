"""Exports to a size: the file is never larger, and nearly as large. A model of 2.5 million weights, which takes about a
megabyte."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_hf import VOCAB, Listener, write_model_folder
from transformers import LlamaConfig, LlamaForCausalLM

from tacq_export.config import ExportConfig
from tacq_export.format.gguf_file import open_gguf
from tacq_export.inputs.load_model import load_model
from tacq_export.pipeline import export
from tacq_export.reporting import Reporter


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied"])
def larger(request, tmp_path_factory):
    """F16 GGUF of a llama of four layers of width 256."""
    import torch

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=request.param
        )
    ).eval()
    folder = tmp_path_factory.mktemp("larger")
    write_model_folder(folder / "model", "llama", model=model)
    (folder / "work").mkdir()
    return load_model(str(folder / "model"), folder / "work", "cpu", Reporter()).reference_path


@pytest.fixture(scope="module")
def workdir(larger, tmp_path_factory):
    """One for all sizes: it calibrates once."""
    return tmp_path_factory.mktemp("sizes") / "work"


def exported(model, task, workdir, outfile, **options):
    return export(
        ExportConfig(
            model=str(model),
            task=task,
            outfile=outfile,
            n_samples=3,
            seq_len=32,
            device="cpu",
            workdir=workdir,
            refine_sweeps=0,
            **options,
        )
    )


@pytest.mark.parametrize("target", [820_000, "900k", "1.0M", "1MiB", 1_200_000, "1.5M"])
def test_the_file_is_at_most_the_target_and_at_least_99_5_percent_of_it(larger, workdir, tiny_task, tmp_path, target):
    n_bytes = {"900k": 900_000, "1.0M": 1_000_000, "1MiB": 1 << 20, "1.5M": 1_500_000}.get(target, target)
    result = exported(larger, tiny_task, workdir, tmp_path / "out.gguf", target_size=target)
    assert result.file_bytes == (tmp_path / "out.gguf").stat().st_size
    assert 0.995 * n_bytes <= result.file_bytes <= n_bytes


def test_types_of_the_user_count_within_the_size(larger, workdir, tiny_task, tmp_path):
    options = {"tensor_types": ("blk.0.ffn_down=q8_0", "attn_v=tacq4_s2"), "token_embedding_type": "f16"}
    result = exported(larger, tiny_task, workdir, tmp_path / "out.gguf", target_size="1.4M", **options)
    assert 0.995 * 1_400_000 <= result.file_bytes <= 1_400_000
    types = {t.name: t.tensor_type.name for t in open_gguf(result.outfile).tensors}
    assert types["blk.0.ffn_down.weight"] == "Q8_0" and types["token_embd.weight"] == "F16"
    assert {types[f"blk.{i}.attn_v.weight"] for i in range(4)} == {"TACQ4_S2"}


def test_a_larger_target_predicts_less_loss(larger, workdir, tiny_task, tmp_path):
    listener = Listener()
    for i, target in enumerate(("900k", "1.1M", "1.4M")):
        export(
            ExportConfig(
                model=str(larger),
                task=tiny_task,
                outfile=tmp_path / f"{i}.gguf",
                n_samples=3,
                seq_len=32,
                device="cpu",
                workdir=workdir,
                refine_sweeps=0,
                target_size=target,
            ),
            listener,
        )
    losses = [
        float(line.split("predicted loss ")[1].split()[0]) for line in listener.lines if line.startswith("Allocation")
    ]
    assert len(losses) == 3 and losses[0] >= losses[1] >= losses[2] and losses[0] > losses[2]  # four digits are shown


def test_the_tiny_model_fits_its_size_too(tiny_gguf, tiny_task, tmp_path):
    """What the header may grow by (2048 bytes) is much of it, so only the upper bound."""
    for target in (60_000, 70_000, 81_234):
        result = exported(tiny_gguf, tiny_task, tmp_path / "w", tmp_path / f"{target}.gguf", target_size=target)
        assert result.file_bytes <= target


@pytest.mark.slow
def test_the_135m_model_fits_its_size(model, tmp_path):
    """Real shapes, real losses, and the header of a real vocabulary."""
    tools = Path(__file__).resolve().parents[2] / "tools"
    options = {
        "model": str(model),
        "task": tools / "data" / "gsm8k-train-128.jsonl",
        "workdir": tmp_path / "work",
        "n_samples": 4,
        "refine_sweeps": 0,
    }
    for target, n_bytes in (("50M", 50_000_000), ("56MiB", 56 << 20)):
        result = export(ExportConfig(outfile=tmp_path / f"{target}.gguf", target_size=target, **options))
        assert 0.995 * n_bytes <= result.file_bytes <= n_bytes
