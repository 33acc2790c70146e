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
from tiny_hf import Listener, tiny_model, write_model_folder
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
        "tacq_export.inputs.load_model.convert_to_f16",
        lambda *arguments: shutil.copy(load_tiny("llama").reference_path, arguments[3]),
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


def linked_and_said(path, model, tensors, architecture="qwen2") -> tuple[dict, str]:
    """({name: matrix}, lines for the user) of a reference with these tensors."""
    listener = Listener()
    linear, _, _ = link_tensors(model, write_reference(path, architecture, tensors, 2), listener)
    return {t.name: t for t in linear}, "\n".join(listener.lines)


def test_other_numbers_are_copied_and_named(tmp_path):
    model = tiny_model("qwen2")
    tensors = qwen2_tensors(model)
    changed = tensors["blk.0.attn_v.weight"].clone()
    changed[2, 2] += 0.5
    twice = tensors["blk.0.attn_v.weight"].clone()
    twice[0] = twice[1]  # every row is one of torch's, but not each once
    for i, other in enumerate((changed, twice)):
        linear, said = linked_and_said(tmp_path / f"{i}.gguf", model, tensors | {"blk.0.attn_v.weight": other})
        assert "blk.0.attn_v.weight" not in linear and len(linear) == 13
        assert said == (
            "1 matrix is copied as the float file has it (0.0 MB): torch has no matrix of these numbers; "
            "blk.0.attn_v.weight."
        )


def test_a_transposed_matrix_is_copied_where_torch_multiplies_with_it_as_it_is(tmp_path):
    model = tiny_model("qwen2")
    tensors = qwen2_tensors(model)
    turned = tensors["blk.0.attn_v.weight"].t().contiguous()
    linear, said = linked_and_said(tmp_path / "r.gguf", model, tensors | {"blk.0.attn_v.weight": turned})
    assert "blk.0.attn_v.weight" not in linear
    assert "torch does not multiply with them as with a linear layer; blk.0.attn_v.weight." in said


def test_a_value_that_is_no_number_is_named(tmp_path):
    model = tiny_model("qwen2")
    tensors = qwen2_tensors(model)
    changed = tensors["blk.1.ffn_down.weight"].clone()
    changed[0, 0] = float("inf")
    assert "tensor 'blk.1.ffn_down.weight' (64 x 128) of architecture 'qwen2' holds NaN or Inf" in link_error(
        tmp_path / "r.gguf", model, tensors | {"blk.1.ffn_down.weight": changed}
    )


def test_a_width_that_is_no_multiple_of_64_is_for_stock_types(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    for width, expected in ((96, ("q4_0", "q5_1", "q8_0")), (72, ("f16",)), (128, ())):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, hidden_size=width, intermediate_size=128))
        tensors = {
            "token_embd.weight": model.model.embed_tokens.weight,
            "blk.0.attn_q.weight": model.model.layers[0].self_attn.q_proj.weight * 1.0,
        }
        linear, _ = linked_and_said(tmp_path / f"{width}.gguf", model, tensors)
        assert linear["blk.0.attn_q.weight"].stock == expected


def test_gpt2_with_its_conv1d_is_linked(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=32))
    tensors = {
        "token_embd.weight": model.transformer.wte.weight,
        "position_embd.weight": model.transformer.wpe.weight,
        "blk.0.attn_qkv.weight": model.transformer.h[0].attn.c_attn.weight.t(),
    }
    linear, said = linked_and_said(tmp_path / "r.gguf", model, tensors, "gpt2")
    found = linear["blk.0.attn_qkv.weight"]
    assert set(linear) == {"blk.0.attn_qkv.weight"} and said == ""
    assert found.transposed and found.rows is None and torch.equal(found.weight, tensors["blk.0.attn_qkv.weight"])
    found.put(torch.full((192, 64), 0.5))
    assert bool((model.transformer.h[0].attn.c_attn.weight == 0.5).all())


def test_parts_of_a_fused_matrix_are_linked_each_with_its_rows(tmp_path):
    """Torch has one matrix where the GGUF has two, side by side or in turns; and an order of rows in a part."""
    model = tiny_model("qwen2")
    tensors = qwen2_tensors(model)
    up = tensors.pop("blk.0.ffn_up.weight")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for name, rows in {
        "halves": (torch.arange(64), torch.arange(64, 128)),
        "turns": (torch.arange(0, 128, 2), torch.arange(1, 128, 2)),
        "orders": (order, 64 + order),
    }.items():
        parts = {f"blk.0.ffn_{part}.weight": up[r] for part, r in zip(("up", "gate"), rows, strict=True)}
        linear, _ = linked_and_said(tmp_path / f"{name}.gguf", model, tensors | parts)
        for (part, values), r in zip(parts.items(), rows, strict=True):
            found = linear[part]
            assert found.module is model.model.layers[0].mlp.up_proj and found.shape == (64, 64)
            assert torch.equal(found.own, r.sort().values)
            assert torch.equal(found.weight if found.rows is None else found.weight[found.rows], values)


def test_what_is_no_multiplication_is_copied(tmp_path):
    """A matrix that torch has, but does not multiply with: here a parameter that is added. F32 in a file of F16: left
    alone without a word, as the converter has left it."""
    model = tiny_model("qwen2")
    model.model.layers[0].register_parameter("extra", torch.nn.Parameter(torch.randn(64, 64)))
    tensors = qwen2_tensors(model)
    linear, said = linked_and_said(
        tmp_path / "a.gguf", model, tensors | {"blk.0.attn_gate.weight": model.model.layers[0].extra}
    )
    assert "blk.0.attn_gate.weight" not in linear and "does not multiply with them" in said
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "qwen2")
    writer.add_block_count(2)
    for name, values in tensors.items():
        kind = np.float32 if name == "blk.0.attn_q.weight" else np.float16
        writer.add_tensor(name, values.detach().numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    linear, _, _ = link_tensors(model, open_gguf(tmp_path / "b.gguf"))
    assert len(linear) == 13 and "blk.0.attn_q.weight" not in {t.name for t in linear}


def test_a_model_that_torch_cannot_run_is_refused(tmp_path, monkeypatch):
    model = tiny_model("qwen2")

    def fail(*args, **kwargs):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
    assert link_error(tmp_path / "r.gguf", model, qwen2_tensors(model)) == (
        "torch cannot run the model (RuntimeError: no such kernel); use an architecture that transformers can run here."
    )


def test_files_without_matrices_are_refused(tmp_path):
    model = tiny_model("qwen2")
    tensors = qwen2_tensors(model)
    assert "has no weight matrices that tacq-export can quantize" in link_error(
        tmp_path / "b.gguf", model, {"token_embd.weight": tensors["token_embd.weight"]}
    )
    without = {name: t for name, t in tensors.items() if name != "token_embd.weight"}
    assert "has no token_embd.weight" in link_error(tmp_path / "c.gguf", model, without)
    assert "gguf-py does not know the architecture 'frobnicate'" in link_error(
        tmp_path / "d.gguf", model, tensors, "frobnicate"
    )
