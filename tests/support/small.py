"""Any architecture of transformers, small and random, from its config class alone."""

from typing import Any

import torch
import transformers

# Sizes by the names that configs have for them.
SIZES = {
    "vocab_size": 64, "decoder_vocab_size": 64,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "n_layer": 1, "n_head": 4, "n_embd": 32,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "emb_dim": 32, "n_layers": 1, "n_heads": 4, "dim": 32,
    "hidden_dim": 48, "embedding_size": 16, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_encoder_position_embeddings": 64,
}  # fmt: skip


def small_model(kind: str, name: str, device: str = "cpu", **more: Any) -> Any:
    """A small model of class `name` for config `kind`, or None if that is not made of the usual sizes."""
    try:
        config = transformers.CONFIG_MAPPING[kind]()
        for key, value in {**SIZES, **more}.items():
            if key in config.to_dict():
                setattr(config, key, value)
        with torch.device("meta"):
            model = getattr(transformers, name)(config).eval()
        if device == "meta" or sum(parameter.numel() for parameter in model.parameters()) > 3e6:
            return model if device == "meta" else None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return getattr(transformers, name)(config).eval()
    except Exception:  # Sizes that are of another type here, or must fit each other.
        return None
