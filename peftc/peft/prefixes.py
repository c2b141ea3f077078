"""Prefixes that begin with a text's own keys and values, and cartridges put one behind the other."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftc.errors import AdapterError, SpecError
from peftc.graph.sites import transformers_config
from peftc.peft.configs import PeftConfig
from peftc.peft.functions import load_peft_weights
from peftc.prompts.files import load_prompt, prompt_part

__all__ = [
    "compose_cartridge_adapters",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "prompt_embeddings_from_past_key_values",
]

# What cartridges that are put together have in common.
_SIZES = ("peft_type", "task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The rows (num_virtual_tokens, layers · 2 · heads · head_dim) that the first tokens of a cache, of one sequence, are.

    Takes transformers' caches, and pairs of keys and values by layer. Raises AdapterError if it has fewer tokens, more
    sequences, or layers of several sizes.
    """
    layers: Any = getattr(past_key_values, "layers", None)
    pairs: list[tuple[Tensor, Tensor]]
    pairs = [(x[0], x[1]) for x in past_key_values] if layers is None else [(x.keys, x.values) for x in layers]
    shapes = {tuple(tensor.shape) for pair in pairs for tensor in pair}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 4 or shape[0] != 1:
        raise AdapterError(
            f"past_key_values: expected (1, heads, tokens, head_dim) in all layers, got {sorted(shapes)}"
        )
    if shape[2] < num_virtual_tokens:
        raise AdapterError(
            f"past_key_values has {shape[2]} tokens, and num_virtual_tokens={num_virtual_tokens}: more text"
        )
    both = torch.stack([tensor[0, :, :num_virtual_tokens] for pair in pairs for tensor in pair])
    return both.permute(2, 0, 1, 3).flatten(1)


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Let a prefix, or a cartridge, be the first tokens of a cache that the base has made; the rows are returned.

    Raises AdapterError if the adapter (default: the active one) is neither, has a `prefix_projection`, or other sizes.
    """
    name = model.active_adapters[0] if adapter_name is None else adapter_name
    program = model.root.program
    part = prompt_part(program.adapters[name]) if name in program.adapters else None
    if part is None or part.edit.slots != ("past",):
        raise AdapterError(f"{name!r} has no keys and values; there are {', '.join(program.adapters)}")
    if getattr(program.adapters[name].spec, "prefix_projection", False):
        raise AdapterError(f"{name!r} makes its keys and values by an MLP (prefix_projection), so they can't be given")
    if getattr(transformers_config(program.base), "is_encoder_decoder", False):
        raise AdapterError("the cache of an encoder-decoder model is of what it writes, not of a text; begin at random")
    number = part.edit.constants["num_virtual_tokens"] if num_virtual_tokens is None else num_virtual_tokens
    made = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=int(number))  # type: ignore[arg-type]
    wanted = tuple(model.get_prompt_embedding_to_save(name).shape)
    if tuple(made.shape) != wanted:
        raise AdapterError(f"past_key_values has rows {tuple(made.shape)}, and {name!r} {wanted}")
    with torch.no_grad():
        load_prompt(program.adapters[name], part, made, {})
    return made


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a prefix, or a cartridge, begin with the keys and values that the base has for a `text`; they are returned.

    `use_chat_template`: the text is a system message, if the tokenizer has a template. `max_length`: of its tokens. Raises
    AdapterError as `initialize_kv_prefix_from_past_key_values`.
    """
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids[:, :max_length].to(model.device)
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Write one cartridge of several, one behind the other; the frozen tokens are those of the first.

    Raises AdapterError if there are fewer than two, SpecError if they are for different models or no cartridges.
    """
    if len(adapter_paths) < 2 or not safe_serialization:
        raise AdapterError("compose_cartridge_adapters: give two folders at least; pickles are not written")
    configs = [PeftConfig.from_pretrained(path) for path in adapter_paths]
    for path, config in zip(adapter_paths, configs, strict=True):
        wrong = [name for name in _SIZES if getattr(config, name, None) != getattr(configs[0], name, None)]
        if wrong or config.peft_type != "CARTRIDGE":
            raise SpecError(f"{path}: {wrong[0] if wrong else 'peft_type'} is not as of a cartridge for this model")
    rows = torch.cat([load_peft_weights(str(path), device="cpu")["prompt_embeddings"] for path in adapter_paths])
    configs[0].num_virtual_tokens = len(rows)
    configs[0].save_pretrained(output_path)
    save_file({"prompt_embeddings": rows}, Path(output_path) / "adapter_model.safetensors")
