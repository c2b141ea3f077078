"""What llama.cpp calls architectures and tensors, and how it turns the rows of some."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from peftc.errors import ExportError

# What llama.cpp calls the architectures whose matrices it keeps as they are, and whether it turns the rows of queries and
# keys around (interleaved rotary positions). Others split or reorder matrices.
_ARCHITECTURES: Mapping[str, tuple[str, bool]] = {
    "llama": ("llama", True), "mistral": ("llama", True), "mixtral": ("llama", True), "granite": ("granite", True),
    "smollm3": ("smollm3", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False), "gemma": ("gemma", False),
    "gemma2": ("gemma2", False), "gemma3_text": ("gemma3", False), "phi3": ("phi3", False), "gpt2": ("gpt2", False),
    "olmo2": ("olmo2", False), "starcoder2": ("starcoder2", False), "stablelm": ("stablelm", False),
}  # fmt: skip


def package() -> Any:
    """The package gguf, which an export asks for before it begins."""
    return import_module("gguf")


def architecture_of(config: Any) -> str:
    """What llama.cpp calls the architecture of a config. Raises ExportError."""
    return _known(config)[0]


def _known(config: Any) -> tuple[str, bool]:
    kind = str(getattr(config, "model_type", None))
    if kind not in _ARCHITECTURES:
        raise ExportError(
            f"to='gguf': {kind} is none of {', '.join(_ARCHITECTURES)}, whose matrices llama.cpp keeps as"
            " they are. Export the merged checkpoint, and let llama.cpp's converter take that."
        )
    return _ARCHITECTURES[kind]


def tensor_names(config: Any, names: Iterable[str]) -> dict[str, str]:
    """What llama.cpp calls tensors, by their names in the model. Raises ExportError."""
    gguf = package()
    architecture = architecture_of(config)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers_of(config))
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unknown = [name for name, own in found.items() if own is None]
    if unknown:
        raise ExportError(
            f"to='gguf': {unknown[0]} has no name in GGUF's {architecture}. Leave it out, or export the merged checkpoint."
        )
    return found


def layers_of(config: Any) -> int:
    """The number of a config's layers."""
    return int(getattr(config, "num_hidden_layers", 0) or 0)


def turned_heads(config: Any) -> dict[str, int]:
    """By the last name of a module, the heads in which its rows are turned around."""
    if not _known(config)[1]:
        return {}
    heads = int(config.num_attention_heads)
    return {"q_proj": heads, "k_proj": int(getattr(config, "num_key_value_heads", None) or heads)}


def turned(rows: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order: both halves of a head in turn."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turned_back(rows: Tensor, heads: int) -> Tensor:
    """Rows of llama.cpp's order in the model's."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
