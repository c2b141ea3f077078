"""Adapters for other runtimes, beside a base that these have already: GGUF for llama.cpp, MLX.

Both take LoRA in its serving form (one rank, scaling 1). What was written is read back and compared: the largest
difference of any change of a weight.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftc.checkpoint.save import config_of
from peftc.checkpoint.serving import serving_form
from peftc.errors import CheckpointError, ExportError
from peftc.export.gguf_names import (
    architecture_of,
    layers_of,
    package,
    tensor_names,
    turned,
    turned_back,
    turned_heads,
)
from peftc.graph.sites import WeightSite, transformers_config
from peftc.plan import Plan
from peftc.rewrite.parts import Part
from peftc.rewrite.program import Program

# By site: A (r, in) and B (out, r), whose product is the change of the weight.
Factors = Mapping[str, tuple[Tensor, Tensor]]
_PREFIX = "base_model.model."


def write_adapter(program: Program, adapter: str, to: str, folder: Path) -> tuple[float, float]:
    """Write one adapter; returns the largest difference between what the file says a weight changes by and what the live
    adapter changes it by, and the largest change.
    """
    read = _WRITERS[to](program, _serving(program, adapter, to), adapter, folder)
    largest, scale = 0.0, 0.0
    for part in program.adapters[adapter].parts.values():
        expected = _change(part)
        a, b = read[part.edit.site]
        largest = max(largest, float((b.double() @ a.double() - expected).abs().max()))
        scale = max(scale, float(expected.abs().max()))
    return largest, scale


def _change(part: Part) -> Tensor:
    """What the live adapter adds to a weight, (out, in), in float64."""
    site = part.site
    assert isinstance(site, WeightSite), "serving forms are of weights"
    values = {name: tensor.detach().cpu().double() for name, tensor in part.tensors().items()}
    zeros = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
    return part.edit.rule.weight(zeros, part.bound(**values))


def _gguf(program: Program, factors: Factors, adapter: str, folder: Path) -> Factors:
    """`<adapter>.gguf`. Returns the factors as the file has them, read back."""
    gguf = package()
    config = transformers_config(program.base)
    architecture = architecture_of(config)
    _refuse_ties(program.plan, factors)
    names = dict(zip(factors, tensor_names(config, [f"{site}.weight" for site in factors]).values(), strict=True))
    heads = turned_heads(config)
    writer = gguf.GGUFWriter(folder / f"{adapter}.gguf", architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(next(iter(factors.values()))[0].shape[0]))
    for site, (a, b) in factors.items():
        count = heads.get(site.rpartition(".")[2])
        a = a.T if _is_embedding(program.plan, site) else a  # llama.cpp looks its rows up.
        b = b if count is None else turned(b, count)
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
        b = b if count is None else turned_back(b, count)
        found[site] = (a.T if _is_embedding(program.plan, site) else a), b
    return found


def _is_embedding(plan: Plan, site: str) -> bool:
    return plan.sites[site].op == "embedding"


def _mlx(program: Program, factors: Factors, adapter: str, folder: Path) -> Factors:
    """`<adapter>/adapters.safetensors` and its config. Returns the factors as the file has them, read back."""
    outside = [site for site in factors if ".layers." not in f".{site}" or _is_embedding(program.plan, site)]
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
        "num_layers": layers_of(transformers_config(program.base)),
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


def _refuse_ties(plan: Plan, factors: Factors) -> None:
    shared = {name.rpartition(".")[0] for group in plan.ties for name in group}
    for site in factors:
        if site in shared:
            raise ExportError(
                f"to='gguf': {site} shares its weight, which is one tensor in GGUF. Leave it out, or export the merged"
                " checkpoint (untied)."
            )
