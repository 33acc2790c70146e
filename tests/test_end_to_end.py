"""The whole way on the real 135M model, few examples: task file in, GGUF out, run by llama.cpp's programs and by
Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tacq_export.evaluation.verify import compare_models, summarize, token_statistics
from tacq_export.format.gguf_file import field_value, open_gguf, tensor_values
from tacq_export.format.inspect_gguf import density_picture, inspect_gguf
from tacq_export.format.tensor_types import TYPES_BY_NAME
from tacq_export.inputs.load_task import load_task
from tacq_export.inputs.tokenize_task import tokenize_task
from tacq_export.inputs.tokenizer import ModelTokenizer
from tacq_export.runtime.llama_logits import CHUNK, LlamaLogits

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION = ROOT / "tools" / "data" / "gsm8k-train-128.jsonl"
HELD_OUT = ROOT / "tools" / "data" / "gsm8k-test-24.jsonl"


def command(*arguments: object) -> subprocess.CompletedProcess:
    """Run `tacq-export`; fail with its message if it does."""
    done = subprocess.run(
        [sys.executable, "-m", "tacq_export", *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> Path:
    """Exported with 12 of the 128 examples, to be quick, and the embedding left at F16."""
    folder = tmp_path_factory.mktemp("export")
    command(
        model,
        "--task",
        CALIBRATION,
        "--outfile",
        folder / "small.gguf",
        "--n-samples",
        12,
        "--token-embedding-type",
        "f16",
        "-w",
        folder / "work",
    )
    return folder / "small.gguf"


@pytest.fixture(scope="module")
def reference(exported) -> Path:
    return exported.parent / "work" / "reference-f16.gguf"


@pytest.fixture(scope="module")
def texts(reference) -> list[list[int]]:
    return tokenize_task(load_task(HELD_OUT), ModelTokenizer(reference), 6, 2048)


@pytest.fixture(scope="module")
def quality(exported, reference, texts):
    return compare_models(reference, exported, texts)


def test_size_and_metadata(exported):
    facts = inspect_gguf(exported)
    linear = [t for t in facts.tensors if t.is_linear]
    assert len(linear) == 210 and {t.type[:5] for t in linear} >= {"TACQ2", "TACQ3"}, (
        "the allocation gives every matrix the same width"
    )
    # The limit of the default options, and the allocator's reach; counted from the file's own tensor sizes.
    assert 2.44 < 8 * sum(t.nbytes for t in linear) / sum(t.n_weights for t in linear) == facts.bpw_linear <= 2.45
    assert (
        0 < sum(t.kept for t in linear) / sum(t.n_weights for t in linear) < 0.00625
    )  # 0.2 bits a weight at 32 bits for each kept one
    assert len(density_picture(facts)) == 1 + 7
    reader = open_gguf(exported)
    keys = {k: field_value(reader, f"tacq.{k}") for k in ("format_version", "score", "task", "n_samples", "seq_len")}
    assert keys == {"format_version": 2, "score": "obs", "task": CALIBRATION.stem, "n_samples": 12, "seq_len": 2048}
    assert field_value(reader, "general.quantized_by") == "tacq-export"


def test_everything_else_is_the_reference(exported, reference):
    ours, full = ({t.name: t for t in open_gguf(path).tensors} for path in (exported, reference))
    assert list(ours) == list(full)
    for name, tensor in full.items():
        if not name.startswith("blk.") or tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            assert np.array_equal(ours[name].data, tensor.data), name
    assert {k: f.contents() for k, f in open_gguf(reference).fields.items() if k.startswith("tokenizer.")} == {
        k: f.contents() for k, f in open_gguf(exported).fields.items() if k.startswith("tokenizer.")
    }


def test_quality_is_far_better_than_rounding(quality):
    # Measured with these 12 examples: KL .285 +- .013, top-1 .779, perplexity 1.16 times the reference's; without
    # --shrinkage and --compensation .466, .708, 1.36. Plain 2-bit rounding at 2.5 bits has KL 3.55 (DESIGN's table),
    # the stock IQ2_XS at 2.31 bits 2.12; a broken scale, row order or kernel gives more than that.
    assert 0.2 < quality.kl < 0.37
    assert quality.top1 > 0.74
    assert quality.ref_ppl < quality.ppl < 1.3 * quality.ref_ppl


def test_only_tokens_from_where_an_answer_begins_count(exported, reference, texts):
    """The logits of the whole texts, cut here; where a text has a second chunk of logits its answer begins in it, else
    halfway."""
    begins = [CHUNK + 3 if len(text) > CHUNK + 5 else len(text) // 2 for text in texts]
    assert {begin > CHUNK for begin in begins} == {True, False}
    longest, stats = max(map(len, texts)), []
    with LlamaLogits(reference, longest) as full, LlamaLogits(exported, longest) as small:
        for text, begin in zip(texts, begins, strict=False):
            p, q = (
                np.concatenate([logits.copy() for _, logits in model.chunks(text)])[begin - 1 : -1]
                for model in (full, small)
            )
            stats.append(token_statistics(p, q, np.array(text[begin:])))
    found = compare_models(reference, exported, texts, begins=begins)
    assert asdict(found) == pytest.approx(asdict(summarize(np.concatenate(stats))), rel=1e-9)
    assert found.n_tokens == sum(map(len, texts)) - sum(begins)


def test_llama_cpp_and_torch_agree_on_the_quality(exported, reference, texts, quality):
    """KL through llama.cpp (8-bit activations) within 3 % of KL in torch with the decoded weights (the issue's
    bound)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reference.parent, gguf_file=reference.name, dtype=torch.float32).eval()
    with torch.no_grad():
        full = [model(input_ids=torch.tensor([t])).logits[0, :-1].numpy() for t in texts]
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
        decoded = {t.name: t for t in open_gguf(exported).tensors}
        replaced = 0
        for module_name, module in model.model.layers.named_modules(prefix="model.layers"):
            name = f"{names.get_name(module_name)}.weight"
            if isinstance(module, torch.nn.Linear):
                weight = torch.from_numpy(tensor_values(decoded[name]))
                if name.endswith(
                    ("attn_q.weight", "attn_k.weight")
                ):  # llama.cpp's order of rotary pairs, undone by hand
                    heads = weight.shape[0] // model.config.head_dim
                    weight = weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
                module.weight.copy_(weight)
                replaced += 1
        assert replaced == 210
        quantized = [model(input_ids=torch.tensor([t])).logits[0, :-1].numpy() for t in texts]
    stats = np.concatenate(
        [token_statistics(p, q, np.array(t[1:])) for p, q, t in zip(full, quantized, texts, strict=False)]
    )
    assert len(stats) == quality.n_tokens
    assert quality.kl == pytest.approx(stats[:, 0].mean(), rel=0.03)


def test_llama_cli_answers(exported, runtime):
    done = subprocess.run(
        [
            runtime / "llama-cli",
            "-m",
            exported,
            "-p",
            "What is 2 + 2?",
            "--single-turn",
            "--temp",
            "0",
            "-n",
            "24",
            "--simple-io",
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    answer = done.stdout.split("What is 2 + 2?")[-1]
    assert len([word for word in answer.split() if word.isascii()]) > 4, done.stdout


def test_run_command_answers(exported):
    assert len(command("run", exported, "-p", "What is 2 + 2?", "-n", 16).stdout.split()) > 3


def test_unmodified_llama_cpp_python_runs_the_file(exported, runtime):
    """Through LLAMA_CPP_LIB_PATH, and through tacq_export.llama_cpp(): the same greedy tokens."""
    ask = "; print(repr(llm('Once upon a time', max_tokens=12, temperature=0)['choices'][0]['text']))"
    by_path = f"import llama_cpp; llm = llama_cpp.Llama({str(exported)!r}, n_ctx=128, verbose=False)" + ask
    by_us = (
        f"import tacq_export; llm = tacq_export.llama_cpp().Llama({str(exported)!r}, n_ctx=128, verbose=False)" + ask
    )
    answers = []
    for code, env in ((by_path, {"LLAMA_CPP_LIB_PATH": str(runtime)}), (by_us, {})):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)
        assert done.returncode == 0, done.stderr[-1000:]
        answers.append(done.stdout)
    assert answers[0] == answers[1] and len(answers[0]) > 20


def test_verify_command(exported, reference):
    done = command("verify", exported, "--against", reference, "--task", HELD_OUT, "--n-samples", 2, "--json")
    result = json.loads(done.stdout)
    assert result["tensors_decoded_alike"] == 210 and 0.2 < result["kl"] < 0.4  # two of the examples above


def test_dequantized_file_is_stock_and_equal(exported, texts, tmp_path):
    command("dequantize", exported, "--outfile", tmp_path / "f16.gguf")
    tensors = gguf.GGUFReader(tmp_path / "f16.gguf").tensors
    assert {t.tensor_type.name for t in tensors} == {"F16", "F32"}
    assert not any(f.startswith("tacq.") for f in gguf.GGUFReader(tmp_path / "f16.gguf").fields)
    # What differs is F16 rounding of the weights and 8-bit activations in our kernels: a hundredth of the
    # quantization's KL.
    assert compare_models(tmp_path / "f16.gguf", exported, texts[:2]).kl < 0.01


def test_kept_values_are_exact(exported):
    """Every mixed tensor keeps as many weights as its section holds, to the brim."""
    for t in inspect_gguf(exported).tensors:
        if "_S" in t.type:
            room = t.nbytes - t.n_weights // 64 * TYPES_BY_NAME[t.type].base_bytes - 16 - 4 * (t.shape[0] + 1)
            assert t.kept == room // 4, t.name
            assert t.nbytes == TYPES_BY_NAME[t.type].nbytes(t.n_weights)
