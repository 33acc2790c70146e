"""Loading: Hugging Face folders through llama.cpp's converter, GGUF files, and each kind of model that cannot be
exported."""

from __future__ import annotations

import json
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from tiny_hf import tiny_model, write_model_folder
from tiny_model import write_tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import open_gguf
from tacq_export.format.tensor_types import tensor_type
from tacq_export.format.write_gguf import copied, write_gguf
from tacq_export.inputs.link_tensors import link_tensors
from tacq_export.inputs.load_model import load_model
from tacq_export.reporting import Reporter

MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EXPECTED = {
    f"blk.{i}.{ours}.weight": f"model.layers.{i}.{theirs}" for i in range(2) for ours, theirs in MATRICES.items()
}


def gguf_values(loaded, name: str) -> torch.Tensor:
    tensor = next(t for t in loaded.reference.tensors if t.name == name)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_every_matrix_is_linked_and_its_rows_are_those_of_the_gguf(load_tiny, architecture):
    loaded = load_tiny(architecture)
    assert {t.name: t.module_name for t in loaded.linear} == EXPECTED
    original = dict(tiny_model(architecture).named_parameters())
    for tensor in [*loaded.linear, loaded.embedding, *([loaded.head] if loaded.head else [])]:
        assert torch.equal(tensor.weight, original[tensor.module_name + ".weight"]), "not the weights of the folder"
        rows = tensor.weight if tensor.rows is None else tensor.weight[tensor.rows]
        assert torch.equal(gguf_values(loaded, tensor.name), rows.half().float()), tensor.name
    assert loaded.embedding.name == "token_embd.weight"
    assert (loaded.head is not None) == (architecture == "llama"), "tied: the head is the embedding"
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())


def test_llama_q_and_k_are_permuted_and_nothing_else(load_tiny):
    """llama.cpp's rope pairs neighbours where torch pairs halves: row (head, half, i) becomes row (head, i, half).
    Four heads of q, two of k (GQA), 16 rows each."""
    loaded = load_tiny("llama")
    for tensor in [*loaded.linear, loaded.embedding, loaded.head]:
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[2] if tensor.name.startswith("blk.") else "")
        if heads is None:
            assert tensor.rows is None, tensor.name
        else:
            assert (
                tensor.rows.tolist()
                == torch.arange(16 * heads).reshape(heads, 2, 8).transpose(1, 2).reshape(-1).tolist()
            )


def test_qwen2_and_gemma3_are_in_torch_order(load_tiny):
    for architecture in ("qwen2", "gemma3"):
        assert all(t.rows is None for t in load_tiny(architecture).linear)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_a_gguf_gives_the_model_of_the_folder(load_tiny, tmp_path, architecture):
    """The weights are those of the folder rounded to F16, so the logits agree to some 1e-3 of their spread."""
    folder = load_tiny(architecture)
    loaded = load_model(str(folder.reference_path), tmp_path, "cpu", Reporter())
    assert [(t.name, t.rows is None) for t in loaded.linear] == [(t.name, t.rows is None) for t in folder.linear]
    for ours, theirs in zip(loaded.linear, folder.linear, strict=True):
        assert torch.equal(ours.weight, theirs.weight.half().float()), ours.name
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        a, b = loaded.model(input_ids=tokens).logits, folder.model(input_ids=tokens).logits
    assert (a - b).abs().max() < 0.01 * b.std()


def test_the_tokenizer_of_a_gguf_is_that_of_the_folder(load_tiny, tmp_path):
    folder = load_tiny("llama")
    loaded = load_model(str(folder.reference_path), tmp_path, "cpu", Reporter())
    text, turns = "the quick fox, 9 apples", [{"role": "user", "content": "how many"}]
    assert loaded.tokenizer.encode(text) == folder.tokenizer.encode(text)
    assert loaded.tokenizer.render(turns) == folder.tokenizer.render(turns) == "<user>how many\n"
    assert loaded.tokenizer.vocabulary == folder.tokenizer.vocabulary


def fails(source, workdir, device="cpu") -> str:
    with pytest.raises(TacqError) as error:
        load_model(str(source), workdir, device, Reporter())
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    assert not list(workdir.glob("*.partial")) and not list(workdir.glob(".*")), "a half-written file is left"
    return message


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(load_tiny, tmp_path, work, monkeypatch, bad):
    """The converter is left out (the GGUF is that of the good folder): this is about the torch side."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    write_model_folder(tmp_path / "model", "llama", model=model)
    monkeypatch.setattr(
        "tacq_export.inputs.make_reference._convert_to_f16",
        lambda folder, path, _: shutil.copy(load_tiny("llama").reference_path, path),
    )
    assert "tensor 'model.layers.1.mlp.up_proj.weight': holds NaN or Inf" in fails(tmp_path / "model", work)


def test_an_architecture_that_llama_cpp_does_not_know_is_named(tmp_path, work):
    folder = write_model_folder(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    message = fails(folder, work)
    assert "convert_hf_to_gguf.py cannot convert" in message and "NoSuchForCausalLM is not supported" in message


def test_folders_and_names_that_are_no_model(tmp_path, work, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert fails(tmp_path / "empty", work).endswith(
        "has no config.json; give a Hugging Face model folder, a hub id, or a GGUF file."
    )
    for name in (str(tmp_path / "gone.gguf"), "gone", "./gone/model", "a/b/c"):
        assert f"There is no file or folder {name}; give a GGUF file" in fails(name, work)

    def offline(*_, **__):
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("cannot reach the hub\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "There is no file or folder someone/model, and the hub did not give it (cannot reach the hub)" in fails(
        "someone/model", work
    )


def test_files_that_are_no_model(tmp_path, work):
    (tmp_path / "text.gguf").write_text("this is no GGUF" * 10)
    assert "text.gguf is not a GGUF file, or is damaged" in fails(tmp_path / "text.gguf", work)
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "empty.gguf is not a GGUF file, or is damaged" in fails(tmp_path / "empty.gguf", work)
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "holds no model (tensors and general.architecture)" in fails(tmp_path / "vocabulary.gguf", work)


@pytest.mark.parametrize("name", ["tacq2", "tacq3_s4"])
def test_a_tacq_file_is_refused_as_a_source(tmp_path, work, name):
    write_tiny_model(tmp_path / "ours.gguf", tensor_type(name))
    assert "ours.gguf is already a TACQ file; export from the original model" in fails(tmp_path / "ours.gguf", work)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_named(tiny_gguf, work, device):
    assert re.search(
        rf"--device '{device}' cannot be used here \(.+\); use auto or cpu\.$", fails(tiny_gguf, work, device)
    )


def test_a_gguf_architecture_that_transformers_cannot_load_is_named(tmp_path, work):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "rwkv6")
    for add in (
        writer.add_block_count,
        writer.add_embedding_length,
        writer.add_feed_forward_length,
        writer.add_head_count,
    ):
        add(1)
    writer.add_tensor("token_embd.weight", np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = fails(tmp_path / "other.gguf", work)
    assert (
        "transformers cannot load a GGUF of architecture 'rwkv6'" in message
        and "give the model's Hugging Face folder instead" in message
    )


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"])
def test_a_gguf_without_its_sizes_is_refused_by_key(tiny_gguf, tmp_path, work, key):
    """transformers would build a model of its default sizes, and be killed for the memory."""
    reader = open_gguf(tiny_gguf)
    write_gguf(
        tmp_path / "less.gguf",
        reader,
        [copied(t) for t in reader.tensors],
        {},
        Reporter(),
        dropped_prefixes=(f"llama.{key}",),
    )
    assert f"less.gguf has no key llama.{key}; it is damaged or incomplete" in fails(tmp_path / "less.gguf", work)


# -- link_tensors alone: a torch model and a GGUF written here by hand
# ----------------------------------------------------


def write_reference(path, architecture: str, tensors: dict[str, torch.Tensor], n_blocks: int = 1) -> gguf.GGUFReader:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(n_blocks)
    for name, values in tensors.items():
        writer.add_tensor(name, values.detach().numpy().astype(np.float16 if values.dim() > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(path)


def qwen2_tensors(model) -> dict[str, torch.Tensor]:
    """Qwen2: no rows are permuted."""
    parameters = dict(model.named_parameters())
    tensors = {ours: parameters[theirs + ".weight"] for ours, theirs in EXPECTED.items()}
    return {"token_embd.weight": parameters["model.embed_tokens.weight"], **tensors}


def link_error(path, model, tensors, architecture="qwen2") -> str:
    with pytest.raises(TacqError) as error:
        link_tensors(model, write_reference(path, architecture, tensors, 2))
    return str(error.value)


def test_any_order_of_rows_is_found(tmp_path):
    model = tiny_model("qwen2")
    tensors = qwen2_tensors(model)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"][order]
    linear, embedding, head = link_tensors(model, write_reference(tmp_path / "r.gguf", "qwen2", tensors, 2))
    found = {t.name: t.rows for t in linear}
    assert found.pop("blk.1.ffn_up.weight").tolist() == order.tolist()
    assert all(rows is None for rows in found.values()) and head is None and embedding.rows is None


def test_equal_rows_are_each_used_once(tmp_path):
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[10] = model.model.layers[0].mlp.up_proj.weight[20]
        model.model.layers[0].mlp.up_proj.weight[30] = 0.0
        model.model.layers[0].mlp.up_proj.weight[31] = -0.0
    tensors = qwen2_tensors(model)
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].flip(0)
    linear, _, _ = link_tensors(model, write_reference(tmp_path / "r.gguf", "qwen2", tensors, 2))
    up = next(t for t in linear if t.name == "blk.0.ffn_up.weight")
    assert sorted(up.rows.tolist()) == list(range(128))
    assert torch.equal(up.weight[up.rows], up.weight.flip(0))


def test_other_numbers_are_refused_by_name(tmp_path):
    model = tiny_model("qwen2")
    tensors = qwen2_tensors(model)
    changed = tensors["blk.0.attn_v.weight"].clone()
    changed[2, 2] += 0.5
    message = link_error(tmp_path / "a.gguf", model, tensors | {"blk.0.attn_v.weight": changed})
    assert message.startswith(
        "tensor 'blk.0.attn_v.weight' (32 x 64) of architecture 'qwen2' does not hold the numbers of its torch weight"
    )
    twice = tensors["blk.0.attn_v.weight"].clone()
    twice[0] = twice[1]  # every row is one of torch's, but not each once
    assert "'blk.0.attn_v.weight'" in link_error(tmp_path / "b.gguf", model, tensors | {"blk.0.attn_v.weight": twice})
    assert "'blk.0.attn_v.weight' (64 x 32)" in link_error(
        tmp_path / "c.gguf", model, tensors | {"blk.0.attn_v.weight": tensors["blk.0.attn_v.weight"].t().contiguous()}
    )


def test_a_value_that_is_no_number_is_named(tmp_path):
    model = tiny_model("qwen2")
    tensors = qwen2_tensors(model)
    changed = tensors["blk.1.ffn_down.weight"].clone()
    changed[0, 0] = float("inf")
    assert "tensor 'blk.1.ffn_down.weight' (64 x 128) of architecture 'qwen2' holds NaN or Inf" in link_error(
        tmp_path / "r.gguf", model, tensors | {"blk.1.ffn_down.weight": changed}
    )


def test_a_width_that_is_no_multiple_of_64_is_named(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    message = link_error(
        tmp_path / "r.gguf", model, {"blk.0.attn_q.weight": model.model.layers[0].self_attn.q_proj.weight}
    )
    assert (
        message == "tensor 'blk.0.attn_q.weight' (96 x 96) of architecture 'qwen2' has rows of 96 weights, expected a "
        "multiple of 64; the TACQ types cannot hold this model."
    )


def test_gpt2_with_its_conv1d_is_refused_by_name(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=32))
    tensors = {
        "token_embd.weight": model.transformer.wte.weight,
        "blk.0.attn_qkv.weight": model.transformer.h[0].attn.c_attn.weight.t(),
    }
    message = link_error(tmp_path / "r.gguf", model, tensors, "gpt2")
    assert (
        "tensor 'blk.0.attn_qkv.weight'" in message
        and "is a Conv1D in torch, expected a Linear; this architecture is not supported yet." in message
    )


def test_tensors_that_are_no_layer_and_files_without_matrices_are_refused(tmp_path):
    model = tiny_model("qwen2")
    tensors = qwen2_tensors(model)
    assert (
        "tensor 'blk.0.ffn_gate_exps.weight' (4 x 64) of architecture 'qwen2' is no layer of the torch model"
        in link_error(tmp_path / "a.gguf", model, tensors | {"blk.0.ffn_gate_exps.weight": torch.ones(4, 64)})
    )
    assert "has no weight matrices" in link_error(
        tmp_path / "b.gguf", model, {"token_embd.weight": tensors["token_embd.weight"]}
    )
    without = {name: t for name, t in tensors.items() if name != "token_embd.weight"}
    assert "has no token_embd.weight" in link_error(tmp_path / "c.gguf", model, without)
    assert "gguf-py does not know the architecture 'frobnicate'" in link_error(
        tmp_path / "d.gguf", model, tensors, "frobnicate"
    )
