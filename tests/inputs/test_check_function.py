"""torch and llama.cpp on the same float model: they agree, or the export stops with how far they are apart, and why."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from sharp_models import TEXT, both_sides, converted, sharp_model
from tiny_hf import Listener, own_copy

from tacq_export.errors import TacqError
from tacq_export.format.gguf_file import open_gguf
from tacq_export.format.write_gguf import copied, write_gguf
from tacq_export.inputs import check_function as module
from tacq_export.inputs import gguf_differences
from tacq_export.inputs.check_function import ERROR_LIMIT, KL_LIMIT, Agreement, check_function, measure
from tacq_export.reporting import Reporter


def refused(loaded, texts=(TEXT,), from_gguf=True) -> str:
    with pytest.raises(TacqError) as error:
        check_function(loaded, texts, from_gguf, 1, Reporter())
    message = str(error.value)
    assert "\n" not in message and len(message) < 900
    return message


@pytest.fixture(scope="module")
def sharp(runtime, tmp_path_factory):
    """(torch model, GGUF) of a tiny Llama with biases."""
    return converted(tmp_path_factory.mktemp("sharp"), "llama", attention_bias=True)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_the_tiny_models_agree(load_tiny, architecture):
    listener = Listener()
    agreement = check_function(load_tiny(architecture), [TEXT[:40], TEXT[:90]], False, 1, listener)
    assert agreement.n_tokens == 90, "the longest text"
    assert agreement.kl.mean() < 1e-5 and agreement.error.mean() < 5e-3, "far below the limits"
    line = listener.lines[-1]
    assert line.startswith("torch and llama.cpp agree on the float model: KL ") and "on 90 tokens" in line


def test_a_sharp_model_agrees_and_gives_the_same_numbers_again(sharp):
    one, other = (measure(both_sides(*sharp), TEXT, threads=1) for _ in range(2))
    assert np.array_equal(one.kl, other.kl) and np.array_equal(one.error, other.error)
    assert one.kl.mean() < 2e-5 and one.kl.mean() > 0


def test_a_changed_norm_is_refused_with_the_numbers(load_tiny):
    loaded = own_copy(load_tiny, "llama")
    with torch.no_grad():
        loaded.model.model.norm.weight *= 1.5
    message = refused(loaded)
    found = re.search(r"KL ([\d.e+-]+) nats a token on 256 tokens \(limit 0\.001\).* logits ([\d.e+-]+) \(", message)
    agreement = measure(loaded, TEXT[:256], threads=1)
    assert float(found[1]) == pytest.approx(agreement.kl.mean(), rel=0.1)
    assert float(found[2]) == pytest.approx(agreement.error.mean(), rel=0.1) == pytest.approx(0.5, abs=0.01)
    assert "first token" not in message, "they differ from the first on"
    assert message.endswith("give the model's Hugging Face folder instead of the GGUF.")


def test_a_dropped_bias_and_a_changed_rope_are_refused(sharp):
    model, path = sharp
    loaded = both_sides(sharp_model("llama", attention_bias=True), path)
    with torch.no_grad():
        loaded.model.model.layers[1].self_attn.k_proj.bias.zero_()
    assert "rope or attention differ" in refused(loaded), "keys of one token alone change nothing"
    loaded = both_sides(sharp_model("llama", attention_bias=True, rope_parameters={"rope_type": "linear",
                        "factor": 4.0, "rope_theta": 10000.0}), path)  # fmt: skip
    message = refused(loaded)
    assert "they agree on the first token and not after it, so rope or attention differ" in message
    assert "rope_parameters is {'rope_theta': 10000.0, 'scaled': True" in message


def test_flat_logits_hide_nothing(load_tiny):
    """The KL of a flat model is small whatever is wrong; the relative error is not."""
    loaded = own_copy(load_tiny, "llama")
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.down_proj.weight *= 0.93
    agreement = measure(loaded, TEXT, threads=1)
    assert agreement.kl.mean() < KL_LIMIT, "otherwise this model is not flat"
    assert agreement.error.mean() > ERROR_LIMIT
    refused(loaded)


def test_a_window_that_llama_cpp_does_not_apply(runtime, tmp_path):
    """llama.cpp runs Mistral as Llama: without a window."""
    loaded = both_sides(*converted(tmp_path, "mistral", sliding_window=64))
    check_function(loaded, [TEXT[:64]], False, 1, Reporter())
    short = [TEXT[:20]] * 8
    message = refused(loaded, [*short, TEXT[:300]], from_gguf=False)
    assert "they agree up to token 64 and not beyond" in message
    assert "on 256 tokens" in message and "sliding_window is 64 in torch and None in the GGUF" in message
    assert message.endswith("give --seq-len 64 or less, and keep prompts shorter than that when the model runs.")


def test_long_rope_factors_hold_beyond_the_original_context(runtime, tmp_path):
    """Phi-3's: llama.cpp takes its long factors for a context, and torch for a text, that is longer than 256."""
    short, long = [1 + 0.1 * i for i in range(8)], [1 + 0.5 * i for i in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    rope["original_max_position_embeddings"] = 256
    settings = {"rope_parameters": rope, "original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    loaded = both_sides(*converted(tmp_path, "phi3", **settings))
    listener = Listener()
    for text in (TEXT[:200], TEXT):
        agreement = check_function(loaded, [text], False, 1, listener)
        assert agreement.n_tokens == len(text) and agreement.kl.mean() < 5e-5
    rotary = loaded.model.model.rotary_emb
    rotary.long_inv_freq = rotary.original_inv_freq.detach().clone()  # as if it had no long factors
    assert check_function(loaded, [TEXT[:200]], False, 1, Reporter()).kl.mean() < 5e-5
    assert "torch and llama.cpp are not the same model" in refused(loaded, [TEXT], from_gguf=False)
    assert [line for line in listener.lines if "rope factors" in line] == [
        "This model has other rope factors in llama.cpp for a context of more than 256 tokens, whatever the length of "
        "the text; all texts here are shorter, so run the file with -c 256 or less."
    ]


def test_a_text_reaches_beyond_the_window():
    choose = module._choose_text
    assert choose([TEXT[:30], TEXT[:50]], []) == (TEXT[:50], [])
    assert choose([list(range(600))], [])[0] == list(range(256)), "seconds, not minutes"
    long = list(range(2000))
    assert choose([TEXT[:30], long], [512]) == (long[: 512 + 64], [512])
    assert choose([TEXT[:30]] * 8 + [long], [512, 4096]) == (long[: 512 + 64], [512]), "not among the first"
    assert choose([TEXT[:30]] * 8 + [long], [])[0] == TEXT[:30]


def test_only_a_few_logits_of_a_large_vocabulary_are_held(sharp, monkeypatch):
    everywhere = measure(both_sides(*sharp), TEXT, threads=1)
    monkeypatch.setattr(module, "_LOGITS", 20 * 320)
    some = measure(both_sides(*sharp), TEXT, threads=1)
    assert len(some.positions) == 20 and some.positions[0] == 0 and some.positions[-1] == len(TEXT) - 1
    assert np.allclose(some.kl, everywhere.kl[some.positions], atol=1e-9)


def test_logits_that_are_no_numbers(load_tiny):
    loaded = own_copy(load_tiny, "llama")
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("inf"))
    assert "logits that are no numbers" in refused(loaded)


def test_torch_that_cannot_evaluate_is_a_sentence(load_tiny, monkeypatch):
    loaded = own_copy(load_tiny, "llama")
    monkeypatch.setattr(loaded.model.model, "forward", lambda *_, **__: {}["no kernel"])
    assert refused(loaded).startswith("torch cannot evaluate the model as transformers loads it ('no kernel')")


def test_a_key_that_nobody_reads_is_named(load_tiny, tmp_path):
    loaded = load_tiny("llama")
    reader = open_gguf(loaded.reference_path)
    write_gguf(tmp_path / "a.gguf", reader, [copied(t) for t in reader.tensors], {"llama.wobble": 3}, Reporter())
    from dataclasses import replace

    loaded = replace(own_copy(load_tiny, "llama"), reference=open_gguf(tmp_path / "a.gguf"))
    with torch.no_grad():
        loaded.model.model.norm.weight *= 1.5
    assert "llama.wobble, of which tacq-export knows no counterpart" in refused(loaded)


def test_what_llama_cpp_computes_otherwise_in_its_code_is_said_first(load_tiny, monkeypatch):
    assert "SparseMixer" in gguf_differences._IN_THE_CODE["phimoe"]
    monkeypatch.setitem(gguf_differences._IN_THE_CODE, "llama", "llama.cpp has another sum")
    loaded = own_copy(load_tiny, "llama")
    with torch.no_grad():
        loaded.model.model.norm.weight *= 1.5
    assert re.search(r"\(limit 0.05\): .*llama.cpp has another sum", refused(loaded))


def test_experts_that_flip_are_judged_by_the_median():
    """A router's choice between two experts that are nearly as likely turns on rounding."""
    kl = np.full(100, 1e-6)
    kl[::20] = 0.1
    agreement = Agreement(np.arange(100), kl, np.full(100, 1e-3), 100)
    assert agreement.holds(robust=True) and not agreement.holds(robust=False)
    assert not Agreement(np.arange(100), kl + 2e-3, np.full(100, 1e-3), 100).holds(robust=True)
