"""Adapters for other runtimes, beside a base that these have already: GGUF for llama.cpp, MLX.

Both take LoRA in its serving form (one rank, scaling 1). What was written is read back and compared: the largest
difference of any change of a weight.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftc.checkpoint.save import config_of
from peftc.checkpoint.serving import serving_form
from peftc.errors import CheckpointError, ExportError
from peftc.graph.sites import WeightSite, transformers_config
from peftc.plan import Edit
from peftc.rewrite.program import Program
from peftc.rule import Bound

# By site: A (r, in) and B (out, r), whose product is the change of the weight.
Factors = Mapping[str, tuple[Tensor, Tensor]]
_PREFIX = "base_model.model."
# What llama.cpp calls the architectures whose matrices it keeps as they are, and whether it turns the rows of queries and
# keys around (interleaved rotary positions). Others split or reorder matrices.
_ARCHITECTURES: Mapping[str, tuple[str, bool]] = {
    "llama": ("llama", True), "mistral": ("llama", True), "mixtral": ("llama", True), "granite": ("granite", True),
    "smollm3": ("smollm3", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False), "gemma": ("gemma", False),
    "gemma2": ("gemma2", False), "gemma3_text": ("gemma3", False), "phi3": ("phi3", False), "gpt2": ("gpt2", False),
    "olmo2": ("olmo2", False), "starcoder2": ("starcoder2", False), "stablelm": ("stablelm", False),
}  # fmt: skip


def write_adapter(program: Program, adapter: str, to: str, folder: Path) -> tuple[float, float]:
    """Write one adapter; returns the largest difference between what the file says a weight changes by and what the live
    adapter changes it by, and the largest change.
    """
    read = _WRITERS[to](program, _serving(program, adapter, to), adapter, folder)
    largest, scale = 0.0, 0.0
    for edit in program.adapters[adapter].edits:
        expected = _change(program, edit)
        a, b = read[edit.site]
        largest = max(largest, float((b.double() @ a.double() - expected).abs().max()))
        scale = max(scale, float(expected.abs().max()))
    return largest, scale


def _change(program: Program, edit: Edit) -> Tensor:
    """What the live adapter adds to a weight, (out, in), in float64."""
    site, part = program.plan.sites[edit.site], program.adapters[edit.adapter].part(edit)
    assert isinstance(site, WeightSite), "serving forms are of weights"
    values = {name: tensor.detach().cpu().double() for name, tensor in part.tensors().items()}
    zeros = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
    return edit.rule.weight(zeros, Bound({**values, **edit.constants}))


def _gguf(program: Program, factors: Factors, adapter: str, folder: Path) -> Factors:
    """`<adapter>.gguf`. Returns the factors as the file has them, read back."""
    gguf: Any = import_module("gguf")
    config = transformers_config(program.base)
    architecture, turned = _architecture(config)
    _refuse_ties(program, factors)
    names = _gguf_names(gguf, architecture, config, factors)
    heads = _heads(config) if turned else {}
    writer = gguf.GGUFWriter(folder / f"{adapter}.gguf", architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(next(iter(factors.values()))[0].shape[0]))
    for site, (a, b) in factors.items():
        count = heads.get(site.rpartition(".")[2])
        a = a.T if _is_embedding(program, site) else a  # llama.cpp looks its rows up.
        b = b if count is None else b.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        for suffix, tensor in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{names[site]}.{suffix}", tensor.float().contiguous().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {
        entry.name: torch.from_numpy(entry.data.copy()) for entry in gguf.GGUFReader(folder / f"{adapter}.gguf").tensors
    }
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for site, name in names.items():
        a, b = read[f"{name}.lora_a"], read[f"{name}.lora_b"]
        count = heads.get(site.rpartition(".")[2])
        b = b if count is None else b.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        found[site] = (a.T if _is_embedding(program, site) else a), b
    return found


def _gguf_names(gguf: Any, architecture: str, config: Any, sites: Iterable[str]) -> dict[str, str]:
    """What llama.cpp calls the weights of `sites`."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, _layers(config))
    names = {site: table.get_name(f"{site}.weight", try_suffixes=(".weight",)) for site in sites}
    unknown = [site for site, name in names.items() if name is None]
    if unknown:
        raise ExportError(
            f"to='gguf': {unknown[0]} has no name in GGUF's {architecture}. Leave it out, or export the merged checkpoint."
        )
    return names


def _is_embedding(program: Program, site: str) -> bool:
    return program.plan.sites[site].op == "embedding"


def _mlx(program: Program, factors: Factors, adapter: str, folder: Path) -> Factors:
    """`<adapter>/adapters.safetensors` and its config. Returns the factors as the file has them, read back."""
    outside = [site for site in factors if ".layers." not in f".{site}" or _is_embedding(program, site)]
    if outside:
        raise ExportError(
            f"to='mlx': {outside[0]} is in no layer, and mlx-lm adapts layers only. Leave it out, or export the merged"
            " checkpoint."
        )
    own = folder / adapter
    own.mkdir()
    pairs = {f"{site}.{name}": t for site, (a, b) in factors.items() for name, t in (("lora_a", a), ("lora_b", b))}
    save_file({name: tensor.T.contiguous().cpu() for name, tensor in pairs.items()}, own / "adapters.safetensors")
    keys = list(dict.fromkeys(site.partition("layers.")[2].partition(".")[2] for site in factors))
    rank = next(iter(factors.values()))[0].shape[0]
    written = {
        "fine_tune_type": "lora",
        "num_layers": _layers(transformers_config(program.base)),
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    (own / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")
    read = load_file(own / "adapters.safetensors")
    return {site: (read[f"{site}.lora_a"].T, read[f"{site}.lora_b"].T) for site in factors}


_WRITERS: Mapping[str, Callable[[Program, Factors, str, Path], Factors]] = {"gguf": _gguf, "mlx": _mlx}


def _serving(program: Program, adapter: str, to: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors by site. Raises ExportError for what has none, with what can be done instead."""
    try:
        tensors = serving_form(program, adapter, config_of(program, adapter))[1]
    except CheckpointError as error:
        raise ExportError(f"to={to!r}: {error} export(folder) writes the merged model.") from None
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key, a in tensors.items():
        for first, second in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if key.endswith(f".{first}"):
                found[key.removeprefix(_PREFIX).removesuffix(f".{first}")] = a, tensors[key.replace(first, second)]
    return found


def _architecture(config: Any) -> tuple[str, bool]:
    kind = str(getattr(config, "model_type", None))
    if kind not in _ARCHITECTURES:
        raise ExportError(
            f"to='gguf': {kind} is none of {', '.join(_ARCHITECTURES)}, whose matrices llama.cpp keeps as"
            " they are. Export the merged checkpoint, and let llama.cpp's converter take that."
        )
    return _ARCHITECTURES[kind]


def _layers(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", 0) or 0)


def _heads(config: Any) -> dict[str, int]:
    heads = int(config.num_attention_heads)
    return {"q_proj": heads, "k_proj": int(getattr(config, "num_key_value_heads", None) or heads)}


def _refuse_ties(program: Program, factors: Factors) -> None:
    shared = {name.rpartition(".")[0] for group in program.plan.ties for name in group}
    for site in factors:
        if site in shared:
            raise ExportError(
                f"to='gguf': {site} shares its weight, which is one tensor in GGUF. Leave it out, or export the merged"
                " checkpoint (untied)."
            )
