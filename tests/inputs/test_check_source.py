"""Everything that names, configs and headers show to be no model is refused by them alone: before a weight is read,
and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import Listener, tiny_model, write_model_folder, write_tokenizer

import tacq_export
from tacq_export import ExportConfig, export
from tacq_export.errors import TacqError
from tacq_export.inputs import check_source as module
from tacq_export.inputs.check_gguf import check_gguf
from tacq_export.inputs.check_source import check_source
from tacq_export.inputs.convert import converter_architectures
from tacq_export.reporting import Reporter


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture
def folder(llama, tmp_path):
    """A copy of the tiny llama that a test may spoil."""
    shutil.copytree(llama, tmp_path / "model")
    return tmp_path / "model"


def refused(source) -> str:
    with pytest.raises(TacqError) as error:
        check_source(str(source), Reporter())
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 600
    return message


def change_config(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_good_folder_passes(folder):
    checkpoint = check_source(str(folder), Reporter()).checkpoint
    assert checkpoint is not None and checkpoint.folder == folder and not checkpoint.quantized
    assert checkpoint.tensors["lm_head.weight"].shape == (320, 64) and checkpoint.text_architecture is None


def test_a_refusal_leaves_nothing_behind(folder, tiny_task, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(TacqError, match="holds no model weights"):
        export(ExportConfig(model=folder, task=tiny_task, outfile=tmp_path / "out.gguf", target_bpw=3))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_refusal_of_the_loader_leaves_nothing_behind_and_an_own_work_folder_as_it_was(folder, tiny_task, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "work").mkdir()
    for own in ({}, {"workdir": tmp_path / "work"}):
        with pytest.raises(TacqError, match=r"'lm_head.weight' is missing .* head is not tied to the embedding"):
            export(ExportConfig(model=folder, task=tiny_task, outfile=tmp_path / "out.gguf", target_bpw=3, **own))
        assert sorted(path.name for path in tmp_path.rglob("*") if path.parent != folder) == ["model", "work"]


def test_adapters_are_named(folder, tmp_path):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    assert "is a LoRA adapter of someone/base and no model; merge it" in refused(folder)
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    assert "lora.gguf is no model but a LoRA adapter; merge it" in refused(written(writer, tmp_path / "lora.gguf"))


def written(writer: gguf.GGUFWriter, path: Path, tensor: str | None = "token_embd.weight") -> Path:
    if tensor:
        writer.add_tensor(tensor, np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "architecture, kind, keys, words",
    [
        ("clip", "mmproj", {}, "the vision or audio part of a model (mmproj); give the GGUF of its language model"),
        ("clip", None, {}, "the vision or audio part of a model (mmproj)"),
        ("llama", "imatrix", {}, "an importance matrix; give the GGUF of a model"),
        ("frobnicate", None, {}, "has the architecture 'frobnicate', which our llama.cpp does not know"),
        ("bert", None, {}, "the architecture 'bert' of an encoder, an embedding or a diffusion model"),
        ("qwen3", None, {"qwen3.attention.causal": False}, "the architecture 'qwen3' of an encoder, an embedding"),
        ("llama", None, {}, "has no key llama.block_count; it is damaged or incomplete"),
    ],
)
def test_other_kinds_of_gguf(tmp_path, architecture, kind, keys, words):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    if kind:
        writer.add_type(kind)
    for key, value in keys.items():
        writer.add_bool(key, value)
    assert words in refused(written(writer, tmp_path / "x.gguf"))


def test_more_tokens_than_rows_of_the_embedding_are_named(tmp_path):
    for n_tokens in (4, 5):
        path = tmp_path / f"{n_tokens}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for add in (writer.add_block_count, writer.add_embedding_length, writer.add_feed_forward_length):
            add(64)
        writer.add_head_count(1)
        writer.add_token_list([f"token{i}" for i in range(n_tokens)])
        written(writer, path)
    check_gguf(tmp_path / "4.gguf")
    assert "has 5 tokens and an embedding of 4 rows, none for the token 4 ('token4'); its" in refused(path)


def test_a_gguf_of_a_vocabulary_only(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    assert "holds no model (tensors and general.architecture)" in refused(written(writer, tmp_path / "x.gguf", None))


def shards(folder: Path, count: int) -> list[str]:
    """Write the weights again as `count` files with an index; their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    weight_map = {name: names[i % count] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(folder, with_index):
    names = shards(folder, 3)
    assert check_source(str(folder), Reporter()).checkpoint is not None
    (folder / names[1]).unlink()
    if not with_index:
        (folder / "model.safetensors.index.json").unlink()
    assert f"lacks {names[1]} of its 3 weight files; fetch what is missing" in refused(folder)


def test_weights_that_are_cut_off_or_a_pointer(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert f"model.safetensors is cut off: it has {len(whole) - 10} bytes of {len(whole)}" in refused(folder)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    assert "is a Git LFS pointer and not the file itself" in refused(folder)
    path.write_bytes(b"<html>")
    assert "is no safetensors file, or is cut off (6 bytes)" in refused(folder)


def test_a_folder_with_only_a_gguf_says_which(folder, tiny_gguf):
    (folder / "model.safetensors").unlink()
    shutil.copy(tiny_gguf, folder / "m.gguf")
    assert f"holds no model weights; give its GGUF instead: {folder / 'm.gguf'}" in refused(folder)


@pytest.mark.parametrize(
    "quantization, words",
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized already (gptq 4)"),
        ({"quant_method": "awq", "bits": 4}, "quantized already (awq 4)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized already (bitsandbytes 4)"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}}},
         "quantized already (compressed-tensors int4)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized already (modelopt NVFP4)"),
    ],
)  # fmt: skip
def test_quantized_checkpoints_are_refused_from_the_config(folder, quantization, words):
    change_config(folder, quantization_config=quantization)
    (folder / "model.safetensors").unlink()  # it is not looked at
    message = refused(folder)
    assert words in message and "export from the original, in BF16, F16, F32 or FP8" in message


def test_packed_weights_without_a_quantization_config_are_found(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name.replace("weight", "qweight")] = torch.zeros(8, 128, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "'model.layers.0.mlp.up_proj.qweight' is I32" in refused(folder)


def test_architectures_that_one_side_does_not_know(folder):
    change_config(folder, architectures=["NoSuchForCausalLM"])
    assert "convert_hf_to_gguf.py cannot convert" in (message := refused(folder))
    assert "(NoSuchForCausalLM is not supported)" in message
    change_config(folder, architectures=["GrokForCausalLM"], model_type="grok-1", auto_map={"AutoModel": "x.Y"})
    assert "transformers cannot read the config" in refused(folder)
    change_config(folder, architectures=["BertForMaskedLM"], model_type="bert")
    assert "holds a BertForMaskedLM, which is no language model that writes its text token by token" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is no JSON" in refused(folder)


def test_the_converters_list_has_what_it_converts():
    known = converter_architectures(Reporter())
    assert len(known) > 150 and known["LlamaForCausalLM"] == "llama" and known["GPTNeoXForCausalLM"] == "gptneox"


def test_gguf_py_is_the_one_of_the_pinned_tree():
    """pip's knows fewer architectures than llama.cpp."""
    assert "llama.cpp-" in gguf.__file__ and len(gguf.MODEL_ARCH_NAMES) >= 153
    assert Path(tacq_export.__file__).parent.parent not in Path(gguf.__file__).parents


class Hub:
    """snapshot_download of a repository that lies in a folder."""

    def __init__(self, files: Path, cache: Path):
        self.files, self.cache, self.asked = files, cache, []

    def __call__(self, name, allow_patterns, ignore_patterns):
        self.asked.append((allow_patterns, ignore_patterns))
        for pattern in allow_patterns:
            for file in self.files.glob(pattern):
                shutil.copy(file, self.cache / file.name)
        return str(self.cache)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    hub = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    return hub


def test_the_hub_gives_weights_of_one_format_only(hub):
    (hub.files / "pytorch_model.bin").write_bytes(b"a second copy")
    listener = Listener()
    check = check_source("someone/model", listener)
    assert check.checkpoint is not None and check.checkpoint.folder == hub.cache
    assert (hub.cache / "model.safetensors").is_file() and not (hub.cache / "pytorch_model.bin").exists()
    assert (hub.cache / "tokenizer.model").is_file() and all(ignored == ["*/*"] for _, ignored in hub.asked)
    assert listener.lines == ["Fetching someone/model from the Hugging Face hub ..."]


def test_the_hub_gives_shards_and_pytorchs_own_files(hub):
    names = shards(hub.files, 2)
    assert check_source("someone/model", Reporter()).checkpoint is not None
    assert all((hub.cache / name).is_file() for name in names)
    for file in [*hub.files.glob("model*"), *hub.cache.glob("model*")]:
        file.unlink()
    model = tiny_model("llama")
    torch.save(model.state_dict(), hub.files / "pytorch_model.bin")
    checkpoint = check_source("someone/model", Reporter()).checkpoint
    assert checkpoint is not None and checkpoint.tensors == {} and (hub.cache / "pytorch_model.bin").is_file()


def test_the_hub_is_asked_for_no_weights_of_what_cannot_be_exported(hub):
    change_config(hub.files, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(TacqError, match="quantized already"):
        module.fetch_from_hub("someone/model", Reporter())
    assert len(hub.asked) == 1 and not list(hub.cache.glob("*.safetensors"))


def test_a_tokenizer_folder_is_no_model(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    assert "has no config.json" in refused(tmp_path / "tokenizer")
