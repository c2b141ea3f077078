"""Checkpoints and adapters on disk, and what merging them in memory gives."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import peftc
from tests.support.adapters import perturb


def base_on_disk(model: Any, folder: Path, shard: str = "60KB") -> Any:
    """Save a model as one that was loaded is saved: transformers lays fresh ones out in another order. The loaded one."""
    model.save_pretrained(folder / "first")
    loaded = type(model).from_pretrained(folder / "first", dtype=model.dtype)
    loaded.save_pretrained(folder / "base", max_shard_size=shard)
    return loaded


def on_disk(model: nn.Module, folder: Path) -> Path:
    """Save a model of no library, in one file."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def adapter_on_disk(model: nn.Module, folder: Path, seed: int = 1, **fields: Any) -> Path:
    """Train an adapter, after a fashion, and save it."""
    cls: Callable[..., Any] = peftc.IA3Config if fields.pop("ia3", False) else peftc.LoraConfig
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        compiled = perturb(peftc.compile(model, cls(**fields), on_unmatched="warn"))
    compiled.save_pretrained(folder)
    compiled.unload()
    return folder


def merged_in_memory(
    base: Path,
    cls: Any,
    adapters: Sequence[Path],
    out: Path,
    weights: Sequence[float] | None = None,
    untie: bool = False,
    shard: str = "60KB",
) -> Any:
    """Load, merge and save: what merging on disk must equal."""
    loaded = cls.from_pretrained(base, dtype="auto")
    compiled = peftc.load(loaded, adapters[0], "a0")
    for number, adapter in enumerate(adapters[1:], 1):
        compiled.load_adapter(adapter, f"a{number}")
    names = list(compiled.peft_config)
    if weights is not None:
        compiled.add_weighted_adapter(names, list(weights), "sum", "" if "ia3" in base.parts[-2] else "cat")
        names = ["sum"]
    compiled.set_adapter(names)
    merged = compiled.merge_and_unload(untie=untie)
    merged.save_pretrained(out, max_shard_size=shard)
    return merged


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same_files(folder: Path, expected: Path, besides: Sequence[str] = ()) -> None:
    """Every file of `expected` is in `folder` with the same bytes, and nothing else but `besides`."""
    found, wanted = hashes(folder), hashes(expected)
    assert {name: found.get(name) for name in wanted} == wanted
    assert {name for name in found if name.partition("/")[0] not in besides} == set(wanted)
