"""Small models of sixteen families, what they are called with, and comparing two models call by call."""

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.support.small import small_model

KINDS: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "clip": "CLIPModel",
    "whisper": "WhisperForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mamba": "MambaForCausalLM",
}
_TOKENS = {"eos_token_id": 2, "decoder_start_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
_MORE: dict[str, dict[str, Any]] = {
    "whisper": {**_TOKENS, "suppress_tokens": None, "begin_suppress_tokens": None},
    "t5": {**_TOKENS, "num_decoder_layers": 1},
    "qwen2": {"layer_types": ["full_attention"]},
    "qwen3": {"layer_types": ["full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention"]},
    "mamba": {"state_size": 4},
}
_PARTS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def program_model(kind: str) -> Any:
    """The small model, in eval()."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "clip":
            text = {**_PARTS, "vocab_size": 64, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
            vision = {**_PARTS, "image_size": 16, "patch_size": 8}
            config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
            return transformers.CLIPModel(config).eval()
        if kind == "qwen3_moe":
            sizes = {**_PARTS, "vocab_size": 64, "moe_intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8}
            moe = transformers.Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2)
            return transformers.Qwen3MoeForCausalLM(moe).eval()
        model = small_model(kind, KINDS[kind], **_MORE.get(kind, {}))
    assert model is not None, kind
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = 1
    return model


def program_inputs(kind: str, model: Any, rows: int = 2, length: int = 8, labels: bool = True) -> dict[str, Tensor]:
    """What the model is called with."""
    generator, config = torch.Generator().manual_seed(rows * 100 + length), model.config
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("vit", "clip"):
        size = config.image_size if kind == "vit" else config.vision_config.image_size
        pixels = {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}
        given = pixels if kind == "vit" else {**pixels, **given}
    if kind == "whisper":
        frames = 2 * config.max_source_positions
        given = {"input_features": torch.randn(rows, config.num_mel_bins, frames, generator=generator)}
        given |= {} if labels else {"decoder_input_ids": ids}
    if kind in ("t5", "bart") and not labels:
        given["decoder_input_ids"] = ids.clone()
    if labels and kind != "clip":
        per_row = kind in ("bert", "roberta", "vit")
        given["labels"] = torch.arange(rows) % 2 if per_row else ids.flip(1)
    return given


def cached_inputs(kind: str, model: Any, labels: bool = True, past: int = 5) -> dict[str, Any]:
    """What the model is called with to go on from `past` tokens."""
    few, inputs = program_inputs(kind, model, 2, past, labels=False), program_inputs(kind, model, labels=labels)
    with torch.no_grad():
        inputs["past_key_values"] = model(**few).past_key_values
    if not model.config.is_encoder_decoder:
        inputs["attention_mask"] = torch.cat([few["attention_mask"], inputs["attention_mask"]], 1)
    return inputs


def loss_of(outputs: Any) -> Tensor:
    """The loss, or a number that all of the first output goes into."""
    loss = getattr(outputs, "loss", None)
    return loss if loss is not None else outputs[0].float().square().sum()


def tensors(outputs: Any) -> dict[str, Tensor]:
    """The outputs by name, caches left out."""
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def gradients(model: Any) -> dict[str, Tensor]:
    """By parameter."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
