"""PEFT's function that lets LoRA on a quantised base make up for what quantising lost."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from peftc.errors import AdapterError, CheckpointError
from peftc.graph.rows import dequantised
from peftc.graph.sites import dtype_of
from peftc.peft.rooted import root_in
from peftc.rewrite.sharding import put

__all__ = ["replace_lora_weights_loftq"]


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Let A and B at every quantised linear be the leading part of what quantising took from its weight.

    `model_path`: the folder, or the safetensors file, of the weights as they were; by default the base's own. `callback` is
    asked with the model and a module's name after each, and False takes that one back. Li et al. 2023, arXiv:2310.08659,
    algorithm 1, with one iteration. Raises AdapterError, CheckpointError.
    """
    root = root_in(peft_model)
    program = root.program
    parts = [
        part
        for part in program.adapters[adapter_name].parts.values()
        if part.site.op == "linear" and not dtype_of(part.site.dtype).is_floating_point and "lora_A" in part.tensors()
    ]
    if not parts:
        raise AdapterError("replace_lora_weights_loftq: no LoRA is on a quantised linear here")
    config = getattr(program.base, "config", None)
    files = _files(model_path or getattr(config, "_name_or_path", None))
    prefix = getattr(program.base, "base_model_prefix", "")
    for part in parts:
        fqn, tensors = part.edit.site, part.tensors()
        weight = dequantised(program.modules[part.site.owner]).float()
        original = _tensor(files, f"{fqn}.weight", prefix).to(weight.device, torch.float32)
        u, s, vh = torch.linalg.svd(original - weight, full_matrices=False)
        r = tensors["lora_A"].shape[0]
        root_s = s[:r].sqrt()
        before = [tensors[name].clone() for name in ("lora_A", "lora_B")]
        put(tensors["lora_A"], root_s[:, None] * vh[:r])
        put(tensors["lora_B"], u[:, :r] * root_s)
        if callback is not None and not callback(peft_model, fqn):
            put(tensors["lora_A"], before[0])
            put(tensors["lora_B"], before[1])


def _files(path: Any) -> list[Path]:
    """The safetensors files of a model. Raises CheckpointError if there are none."""
    folder = Path(path) if path else Path()
    if not path or not folder.exists():
        try:
            folder = Path(snapshot_download(str(path), local_files_only=True))
        except Exception as error:  # The client's, for a name as for a cache.
            raise CheckpointError(
                f"replace_lora_weights_loftq: {path!r} is no folder here, nor a model in the cache; pass model_path, where"
                f" the weights are as they were ({type(error).__name__})"
            ) from None
    if folder.is_file():
        return [folder]
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    found = [folder / name for name in sorted(names)]
    if not all(file.exists() for file in found):
        raise CheckpointError(
            f"replace_lora_weights_loftq: {folder} lacks {found[0].name}; safetensors files are read only"
        )
    return found


def _tensor(files: list[Path], name: str, prefix: str) -> Tensor:
    """The tensor of this name, with or without the model's prefix."""
    for file in files:
        with safe_open(file, "pt") as opened:
            known = set(opened.keys())
            for wanted in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
                if wanted in known:
                    return opened.get_tensor(wanted)
    raise CheckpointError(
        f"replace_lora_weights_loftq: {name} is in none of the {len(files)} files in {files[0].parent}"
    )
