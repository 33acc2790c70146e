"""The language model inside a wrapper (Gemma 3, Mistral 3, Qwen-VL, LLaVA and others), as a causal model of its own.

llama.cpp's converter writes the same: the language model under the names that it would have alone, `model.layers.0...`
and `lm_head`, so what links tensors to modules needs to know nothing of wrappers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Parts of a wrapper that make hidden states of images, sound or video, or map them to the language model's.
_OTHER_PARTS = (
    "vision", "visual", "audio", "image", "video", "projector", "connector", "speech", "sound", "sam_", "vit",
    "embed_vision", "embed_audio", "talker", "token2wav", "code2wav", "qformer", "aligner", "mlp_AR",
)  # fmt: skip


class TextModel(PreTrainedModel):
    """A decoder and its head, where transformers has no causal class for the decoder alone (Qwen2-VL and others)."""

    config_class = PretrainedConfig
    base_model_prefix = "model"
    # Attention is the decoder's own affair, which has settled it for this config.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PretrainedConfig, decoder: PreTrainedModel, head: torch.nn.Module):
        super().__init__(config)
        self.model, self.lm_head = decoder, head

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the decoder's own affair, too

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits [texts, tokens, vocabulary] of token ids [texts, tokens]."""
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


def has_other_parts(model: PreTrainedModel) -> bool:
    """Whether a model has a part for images, sound or video beside its language model."""
    children = [name for owner in (model, model.base_model) for name, _ in owner.named_children()]
    return any(name.startswith(_OTHER_PARTS) or name.endswith(_OTHER_PARTS) for name in children)


def text_model(model: PreTrainedModel) -> tuple[PreTrainedModel, str | None]:
    """(the language model of `model`, the name of its decoder inside `model`); (`model`, None) if it is no wrapper."""
    decoder = model.get_decoder()
    if not has_other_parts(model) or decoder is model or decoder is model.base_model:
        return model, None
    path = next(name for name, module in model.named_modules() if module is decoder)
    if decoder.get_output_embeddings() is not None:  # Llama 4's is a causal model as it is
        return decoder, path
    head, config = model.get_output_embeddings(), decoder.config
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text = _grafted(causal, config, decoder, head) if causal is not None else None
    return text or TextModel(config, decoder, head), path


def _grafted(
    causal: Any, config: PretrainedConfig, decoder: PreTrainedModel, head: torch.nn.Module
) -> PreTrainedModel | None:
    """`causal`, transformers' class for the decoder alone, with this decoder and head in place of its own; None where
    its decoder is of another class."""
    with torch.device("meta"):
        text = causal(config)
    places = [name for name, child in text.named_children() if type(child) is type(decoder)]
    if len(places) != 1:
        return None
    setattr(text, places[0], decoder)
    text.set_output_embeddings(head)
    rest = [name for name, value in [*text.named_parameters(), *text.named_buffers()] if value.is_meta]
    return None if rest else text
