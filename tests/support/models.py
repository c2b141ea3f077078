"""Tiny models of many kinds: every kind of site, tied weights, odd forwards, and transformers architectures."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Everything(nn.Module):
    """An embedding, a linear, a transposed linear, and 1-, 2- and 3-d convolutions, one after another.

    Input: token ids (batch, 8). Output: (batch, 6).
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16, padding_idx=0)
        self.linear = nn.Linear(16, 12)
        self.transposed = Conv1D(16, 12)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2d = nn.Conv2d(8, 4, (3, 2), stride=(1, 2), padding=1, bias=False)
        self.conv3d = nn.Conv3d(4, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transposed(torch.tanh(self.linear(self.embed(ids))))
        x = self.conv1d(x)
        x = torch.tanh(self.conv2d(x.unflatten(2, (4, 4))))
        x = self.conv3d(x.unsqueeze(2).expand(-1, -1, 2, -1, -1))
        return self.head(self.norm(x.mean((2, 3, 4))))


def token_ids(batch: int = 3, length: int = 8, vocabulary: int = 20) -> Tensor:
    """Random token ids (batch, length), the padding index 0 among them."""
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A ConvNet that torch.fx traces: convolutions with groups and dilation, batch norm, dropout, a reused linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.fc = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = self.grouped(x).mean((2, 3))
        x = torch.relu(self.fc(torch.relu(self.fc(x))))
        x = self.out(self.dropout(x))
        return x if scale is None else x * scale


class QuantisedLinear(nn.Module):
    """A stand-in for the linears of quantisation libraries: int8 weight, a forward that torch.fx can't trace."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("not finite")
        return x @ (self.qweight * self.scale).T


class Attending(nn.Module):
    """An attention of torch's own, and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (x[..., : self.attn.kdim or 16], x[..., : self.attn.vdim or 16])
        return self.head(self.attn(x, keys, values, need_weights=False)[0])


_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}
_HALVES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
}

_SIZES: dict[str, Any] = {
    "qwen2": {**_DECODER, "num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 32},
    "gemma2": {**_GROUPED, "sliding_window": 32},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
    "gpt_neox": _DECODER,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "gemma4_text": {**_GROUPED, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "deepseek_v3": {
        **_DECODER,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "moe_intermediate_size": 16,
    },
    "bart": {
        **_HALVES,
        "max_position_embeddings": 64,
    },
    "roberta": _DECODER,
    "deberta-v2": {**_DECODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32},
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    },
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 64,
        "decoder_start_token_id": 0,
    },
    "vit": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    },
    "mixtral": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "vocab_size": 64,
    },
    "whisper": {
        **_HALVES,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "gemma3_text": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
    },
}
CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "gpt_neox", "bloom")
SEQ2SEQ = ("t5", "bart")
ENCODERS = ("bert", "roberta", "deberta-v2")

_CLASSES: dict[str, str] = {
    **dict.fromkeys(CAUSAL, "AutoModelForCausalLM"),
    **dict.fromkeys(SEQ2SEQ, "AutoModelForSeq2SeqLM"),
    **dict.fromkeys(ENCODERS, "AutoModelForMaskedLM"),
    "vit": "AutoModelForImageClassification",
    "mixtral": "AutoModelForCausalLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
    **dict.fromkeys(("mamba", "gemma4_text", "deepseek_v3"), "AutoModelForCausalLM"),
}

ARCHITECTURES = ("llama", "gpt2", "bert", "t5", "vit", "mixtral", "whisper")


def tiny(model_type: str, auto: str | None = None, **changes: Any) -> Any:
    """A tiny random transformers model in eval mode."""
    config = transformers.AutoConfig.for_model(model_type, **{**_SIZES[model_type], **changes})
    return getattr(transformers, auto or _CLASSES[model_type]).from_config(config).eval()


def model_of(kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A seeded model in training's dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny(kind, **fields).to(dtype).eval()


def llama() -> Any:
    """Always the same model: an adapter is refused on another base."""
    return model_of("llama")


def inputs_for(model_type: str) -> dict[str, Tensor]:
    """Keyword inputs for `tiny(model_type)`."""
    ids = token_ids(2, 7, 64)
    if model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}
    if model_type == "whisper":
        mel = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))
        return {"input_features": mel, "decoder_input_ids": ids}
    if model_type == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    return {"input_ids": ids}
