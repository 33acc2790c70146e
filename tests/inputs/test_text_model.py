"""Wrappers: the language model alone, under the names that it has without its wrapper, and with the same logits."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load_model import EXPECTED
from tiny_hf import VOCAB, Listener, write_bpe_tokenizer, write_tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from tacq_export import ExportConfig, export
from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import field_value, open_gguf
from tacq_export.inputs.load_model import load_model
from tacq_export.inputs.load_torch import load_from_hugging_face
from tacq_export.inputs.text_model import TextModel, text_model
from tacq_export.reporting import Reporter

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_EYE = {"depth": 1, "hidden_size": 64, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
GEMMA = TEXT | {"model_type": "gemma3_text", "sliding_window": 64, "query_pre_attn_scalar": 16}
# {name: (text config, vision config, others, class of the language model)}
WRAPPERS = {
    "gemma3": (GEMMA, EYE | {"model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4}, Gemma3ForCausalLM),
    "llava": (TEXT | {"model_type": "qwen2"}, EYE | {"model_type": "clip_vision_model"}, {}, Qwen2ForCausalLM),
    "mistral3": (TEXT | {"model_type": "mistral"}, EYE | {"model_type": "pixtral"}, {}, MistralForCausalLM),
    "smolvlm": (TEXT | {"model_type": "llama"}, EYE | {"model_type": "smolvlm_vision"}, {}, LlamaForCausalLM),
    "internvl": (
        TEXT | {"model_type": "qwen2"},
        EYE | {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
        {},
        Qwen2ForCausalLM,
    ),
    "qwen2_5_vl": (
        TEXT | {"rope_parameters": MROPE, "vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256},
        QWEN_EYE,
        {},
        TextModel,
    ),
}


def tiny_wrapper(name: str) -> PreTrainedModel:
    text, vision, others, _ = WRAPPERS[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](text_config=text, vision_config=vision, **others)
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    return model


def write_wrapper(folder, name: str) -> PreTrainedModel:
    model = tiny_wrapper(name)
    model.save_pretrained(folder)
    (write_bpe_tokenizer if name.startswith("qwen") else write_tokenizer)(folder)
    return model


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_language_model_of_a_wrapper(runtime, tmp_path, name):
    wrapper = write_wrapper(tmp_path / "model", name)
    (tmp_path / "work").mkdir()
    listener = Listener()
    loaded = load_model(str(tmp_path / "model"), tmp_path / "work", "cpu", listener)
    assert type(loaded.model) is WRAPPERS[name][3]
    assert {t.name: t.module_name for t in loaded.linear} == EXPECTED
    assert any(f"{type(wrapper).__name__} is a language model and more" in line for line in listener.lines)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(
            loaded.model(input_ids=tokens, use_cache=False).logits, wrapper(input_ids=tokens, use_cache=False).logits
        )
    assert not any("vision" in t.name or t.name.startswith("v.") for t in loaded.reference.tensors)


def test_a_model_that_is_no_wrapper_is_itself(load_tiny):
    model = load_tiny("gemma3").model
    assert text_model(model) == (model, None)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma") / "model"
    write_wrapper(folder, "gemma3")
    return folder


def test_a_gemma_3_wrapper_is_exported(runtime, gemma, tiny_task, tmp_path):
    outfile = tmp_path / "out.gguf"
    export(ExportConfig(model=gemma, task=tiny_task, outfile=outfile, base_type="tacq4", no_kept=True, n_samples=2))
    reader = open_gguf(outfile)
    assert field_value(reader, "general.architecture") == "gemma3"
    assert {t.name for t in reader.tensors if t.tensor_type.name == "TACQ4"} - {"token_embd.weight"} == set(EXPECTED)


def test_what_a_wrapper_lacks_of_its_language_model_is_refused_and_of_its_eyes_is_not(gemma, tmp_path):
    for lacking, refused in (
        ("language_model.model.layers.1.mlp.up_proj.weight", True),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", False),
    ):
        folder = tmp_path / lacking
        shutil.copytree(gemma, folder)
        tensors = load_file(folder / "model.safetensors")
        name = next(n for n in tensors if n.endswith(lacking.split(".", 3)[-1]) and lacking.split("_")[0] in n)
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if refused:
            with pytest.raises(TacqError, match=r"layers.1.mlp.up_proj.weight' is missing in the checkpoint"):
                load_from_hugging_face(folder, Reporter())
        else:
            load_from_hugging_face(folder, Reporter())
