"""A save that is killed (kill -9) at any moment leaves the old adapters or the new ones, whole, and never a mixture."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.checkpoint import read_adapter
from peftc.checkpoint.atomic import settle
from tests.support.adapters import perturb
from tests.support.checkpoints import hashes
from tests.support.killing import changes_made, kill_at, started
from tests.support.models import tiny

FILES = ("adapter_config.json", "adapter_model.safetensors", "prompt_encoder.safetensors")


def lora(seed: int, *names: str) -> peftc.CompiledModel:
    """Adapters of rank `seed` with values of their own."""
    torch.manual_seed(seed)
    spec = peftc.LoraConfig(target_modules=["q_proj"], r=seed, task_type="CAUSAL_LM")
    return perturb(peftc.compile(tiny("llama"), dict.fromkeys(names or ("default",), spec)))


def p_tuning(seed: int) -> peftc.CompiledModel:
    """A prompt, which has a file more: the encoder of its rows."""
    torch.manual_seed(seed)
    spec = peftc.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")
    return perturb(peftc.compile(tiny("llama"), spec))


# What is in the folder, and what is saved into it.
SAVES: dict[str, tuple[Callable[[], peftc.CompiledModel] | None, Callable[[], peftc.CompiledModel]]] = {
    "two adapters over two": (partial(lora, 2, "default", "b"), partial(lora, 3, "default", "b")),
    "into a new folder": (None, partial(lora, 3, "default", "b")),
    "LoRA over a prompt": (partial(p_tuning, 2), partial(lora, 3)),
    "a prompt over LoRA": (partial(lora, 2), partial(p_tuning, 3)),
}


def seen_by_others(folder: Path) -> dict[str, dict[str, str]]:
    """The files of every adapter as they lie there, for a library that knows nothing of how they were saved."""
    every, paths = hashes(folder), {"default": "", "b": "b/"}
    found = {name: {file: every.get(f"{path}{file}", "") for file in FILES} for name, path in paths.items()}
    return {name: files for name, files in found.items() if files["adapter_config.json"]}


def adapters_in(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What peftc reads: specs, tensors, encoders of prompts."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, place in {"default": folder, "b": folder / "b"}.items():
        settle(place)
        if (place / "adapter_config.json").exists():
            found[name] = adapter_in(place)
    return found


def adapter_in(folder: Path) -> tuple[Any, ...]:
    files = read_adapter(folder, is_trainable=True)
    lists = [{key: value.tolist() for key, value in t.items()} for t in (files.tensors, files.encoder)]
    return (files.spec.to_dict(), *lists)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), SAVES.values(), ids=SAVES)
def test_killed_at_any_moment(
    old: Callable[[], peftc.CompiledModel] | None, new: Callable[[], peftc.CompiledModel], tmp_path: Path
) -> None:
    saved, before, after = new(), tmp_path / "before", tmp_path / "after"
    before.mkdir()
    if old is not None:
        old().save_pretrained(before)
    shutil.copytree(before, after)
    saved.save_pretrained(after)
    states, views = [adapters_in(before), adapters_in(after)], [seen_by_others(before), seen_by_others(after)]
    assert states[0] != states[1]
    counted = Path(shutil.copytree(before, tmp_path / "counted"))
    total = 2 * changes_made(partial(saved.save_pretrained, counted), tmp_path / "count")
    assert total > 50
    outcomes: set[bool] = set()
    for moment in range(total):
        folder = Path(shutil.copytree(before, tmp_path / str(moment)))
        assert kill_at(moment, partial(saved.save_pretrained, folder))
        for name, files in seen_by_others(folder).items():
            assert files in [view.get(name) for view in views], moment
        # Whoever saves next finishes what was begun, as whoever loads does.
        directly = Path(shutil.copytree(folder, tmp_path / f"{moment} again"))
        saved.save_pretrained(directly)
        assert adapters_in(directly) == states[1]
        assert hashes(directly).keys() == hashes(after).keys(), moment
        state = adapters_in(folder)
        assert state in states, moment
        outcomes.add(state == states[1])
        saved.save_pretrained(folder)
        assert adapters_in(folder) == states[1]
        assert hashes(folder).keys() == hashes(after).keys(), moment
    assert outcomes == {False, True}


def test_two_processes_that_save_at_once(tmp_path: Path) -> None:
    """Every load meanwhile sees the whole of one save, and so does whoever comes after both."""
    folder = tmp_path / "adapter"
    writers = [lora(2, "default", "b"), lora(3, "default", "b")]
    states: list[dict[str, tuple[Any, ...]]] = []
    for writer in writers:
        writer.save_pretrained(folder)
        states.append(adapters_in(folder))
    running, seen = {started(partial(save_often, writer, folder)) for writer in writers}, set[int]()
    while running:
        # One after the other: between two loads there may be a save.
        for name, place in (("default", folder), ("b", folder / "b")):
            seen.add([state[name] for state in states].index(adapter_in(place)))
        ended = {pid: status for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in running) if pid}
        assert not any(ended.values())
        running -= set(ended)
    assert seen == {0, 1}
    assert adapters_in(folder) in states
    assert not list(folder.glob(".peftc*"))


def save_often(compiled: peftc.CompiledModel, folder: Path) -> None:
    for _ in range(60):
        compiled.save_pretrained(folder)
