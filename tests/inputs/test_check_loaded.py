"""What transformers only warns of: missing, left over and mismatched tensors, each refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_hf import tiny_model, write_model_folder

from tacq_export.errors import TacqError
from tacq_export.inputs.load_model import load_model
from tacq_export.inputs.load_torch import load_from_hugging_face
from tacq_export.reporting import Reporter

UP = "model.layers.1.mlp.up_proj.weight"


def changed(tmp_path, architecture: str, change, **config):
    """A folder whose tensors and config were changed."""
    folder = write_model_folder(tmp_path / "model", architecture)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def refused(folder) -> str:
    with pytest.raises(TacqError) as error:
        load_from_hugging_face(folder, Reporter())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_head_that_is_neither_there_nor_tied(tmp_path):
    folder = changed(tmp_path, "llama", lambda tensors: tensors.pop("lm_head.weight"))
    message = refused(folder)
    assert message.startswith(f"tensor 'lm_head.weight' is missing in the checkpoint {folder} (config.json says that")


def test_a_tied_model_whose_config_says_untied(tmp_path):
    assert "tensor 'lm_head.weight' is missing" in refused(
        changed(tmp_path, "qwen2", lambda tensors: None, tie_word_embeddings=False)
    )


def test_a_tied_head_is_not_missing(tmp_path):
    folder = changed(tmp_path, "qwen2", lambda tensors: tensors.pop("lm_head.weight", None))
    model = load_from_hugging_face(folder, Reporter())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_missing_matrices_are_named_and_counted(tmp_path):
    def change(tensors):
        for name in (UP, "model.norm.weight"):
            del tensors[name]

    message = refused(changed(tmp_path, "llama", change))
    assert f"tensor '{UP}' is missing in the checkpoint" in message and "and so are 1 others; fetch it again" in message


def test_another_shape_is_named(tmp_path):
    def change(tensors):
        tensors[UP] = torch.zeros(96, 64)

    message = refused(changed(tmp_path, "llama", change))
    assert f"tensor '{UP}' of" in message and "is [96, 64] in the checkpoint and [128, 64] by config.json" in message


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate_proj.bias", "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.sinks"]
)
def test_a_tensor_that_nothing_takes_is_named(tmp_path, name):
    message = refused(changed(tmp_path, "llama", lambda tensors: tensors.update({name: torch.zeros(64)})))
    assert f"tensor '{name}' of the checkpoint" in message and "has no place in the model" in message


def test_buffers_and_drafting_blocks_are_no_loss(runtime, tmp_path):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(128, 64)
        tensors["mtp.fc.weight"] = torch.zeros(64, 128)

    folder = changed(tmp_path, "llama", change, num_nextn_predict_layers=1)
    model = load_from_hugging_face(folder, Reporter())
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)


def test_a_checkpoint_of_another_size_is_refused_before_it_is_converted(tmp_path):
    (tmp_path / "work").mkdir()
    folder = changed(tmp_path, "llama", lambda tensors: None, num_hidden_layers=3)
    with pytest.raises(TacqError, match="tensor 'model.layers.2.* is missing"):
        load_model(str(folder), tmp_path / "work", "cpu", Reporter())
    assert not list((tmp_path / "work").iterdir())


def test_an_error_of_any_kind_becomes_a_sentence(tmp_path, monkeypatch):
    folder = write_model_folder(tmp_path / "model", "llama")
    for error in (RuntimeError("size mismatch\nmore"), TypeError("no argument x"), AttributeError("'a' has no b")):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr("tacq_export.inputs.load_torch.AutoModelForCausalLM.from_pretrained", fails)
        message = refused(folder)
        assert f"({type(error).__name__}: {str(error).splitlines()[0]})" in message and str(folder) in message
