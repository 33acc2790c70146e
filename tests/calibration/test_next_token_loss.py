"""The loss in pieces against the loss of the whole text."""

import pytest
import torch
from tiny_hf import ARCHITECTURES, TEXTS, VOCAB, linked_modules, tiny_model

from tacq_export.calibration.gradients import accumulate_gradients
from tacq_export.calibration.next_token_loss import backward_loss
from tacq_export.reporting import Reporter

TEXT = [1, 5, 9, 20, 33, 270, 4, 91, 12, 300, 7]


def gradients(model, begin: int, logits: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = backward_loss(model, torch.tensor(TEXT), begin, False, logits)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("begin", [1, 7, 10])
@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_pieces_give_the_loss_and_the_gradients_of_the_whole(architecture, begin, tokens):
    model = tiny_model(architecture).double()
    whole, expected = gradients(model, begin, 1 << 30)
    loss, found = gradients(model, begin, tokens * VOCAB)
    assert loss == pytest.approx(whole, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7 * float(gradient.abs().max())), name


def test_the_blocks_run_once_and_few_logits_are_in_memory():
    model, calls, sizes = tiny_model("llama"), [], []
    model.requires_grad_(True)
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    backward_loss(model, torch.tensor(TEXT), 1, False, 4 * VOCAB)
    assert len(calls) == 1 and sizes == [4, 4, 3]


def test_statistics_at_the_outputs_are_those_of_the_whole(monkeypatch):
    """The head's are gathered piece by piece, those of the blocks at once."""
    model = tiny_model("llama").requires_grad_(False)
    outputs = linked_modules({"head": model.lm_head, "down": model.model.layers[0].mlp.down_proj})
    embedding = model.model.embed_tokens
    expected = accumulate_gradients(model, [], outputs, embedding, TEXTS, 1, Reporter(), begins=[2, 1, 1])
    monkeypatch.setattr(backward_loss, "__defaults__", (2 * VOCAB,))
    found = accumulate_gradients(model, [], outputs, embedding, TEXTS, 1, Reporter(), begins=[2, 1, 1])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.shape == found[name].shape
        assert torch.allclose(value, found[name], rtol=1e-3, atol=1e-6 * float(value.max())), name


def test_large_vocabularies_have_smaller_pieces(monkeypatch):
    """135M's and Qwen's are in the pieces that they always were in."""
    found = []
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda logits, *_, **more: found.append(len(logits)) or nan
    )
    nan = torch.tensor(float("nan"))
    text = torch.tensor(TEXT * 100)
    for n_vocab in (49152, 151936, 262144):
        model = tiny_model("llama")
        monkeypatch.setattr(model.config, "vocab_size", n_vocab)
        backward_loss(model, text, 1, False)
    assert found == [(1 << 25) // 49152, (1 << 25) // 151936, (1 << 23) // 262144]


def test_a_loss_that_is_no_number_is_returned():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    for logits in (1 << 30, 2 * VOCAB):
        assert not torch.isfinite(torch.tensor(backward_loss(model, torch.tensor(TEXT), 1, False, logits)))
