"""Small GGUF files of llamas, written as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_llama(model: Any, path: Path, kind: str = "F32", **more: int) -> None:
    """Write `model`, its matrices in the type `kind`; without the head if it is tied. `more`: further metadata."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    for name, number in numbers.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_string("general.name", "small")
    writer.add_array("general.tags", ["a", "b"])
    for name, number in more.items():
        writer.add_uint16(name, number)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for fqn, tensor in model.state_dict().items():
        if fqn == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name, value = _name(fqn), tensor.float().numpy()
        short = name.split(".")[-2]
        if short in heads:
            value = value.reshape(heads[short], 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        _add(writer, name, np.ascontiguousarray(value), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(fqn: str) -> str:
    module = fqn.removesuffix(".weight")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.weight"
    _, _, layer, own = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[own]}.weight"


def _add(writer: Any, name: str, value: Any, kind: str) -> None:
    own = getattr(gguf.GGMLQuantizationType, kind)
    if value.ndim == 1 or kind == "F32":
        writer.add_tensor(name, value.astype(np.float32))
    else:
        writer.add_tensor(name, gguf.quants.quantize(value, own), raw_dtype=own)
