"""Bars on a terminal, for long work only; nothing in pipes; and what the logger `peftc` is told."""

import logging
import os
import pty
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import peftc
from peftc import progress
from tests.support.adapters import saved
from tests.support.checkpoints import adapter_on_disk, base_on_disk
from tests.support.models import llama, model_of

PROGRAM = """
import sys
from peftc import progress
progress.DELAY = {delay}
with progress.bar("merge", 4_000_000, "bytes", {shown}) as tick:
    import time
    time.sleep(0.2)
    tick(1_000_000, "first")
    time.sleep(0.2)
    tick(3_000_000)
"""


def on_a_terminal(delay: float = 0, shown: bool = True, **environment: str) -> str:
    """What a program with a bar says on a terminal that is its stderr."""
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(delay=delay, shown=shown)],
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment},
    )
    os.close(theirs)
    said = b""
    try:
        while block := os.read(ours, 4096):
            said += block
    except OSError:  # Linux's word for: nobody writes there any more.
        pass
    os.close(ours)
    assert run.wait(60) == 0, said
    return said.decode()


def test_a_terminal_sees_how_much_is_done() -> None:
    said = on_a_terminal()
    assert "merge" in said
    assert "merge: first" in said
    assert "4.0/4.0 MB" in said


@pytest.mark.parametrize(
    ("how", "environment"),
    [({"delay": 60}, {}), ({"shown": False}, {}), ({}, {"PEFTC_PROGRESS": "0"}), ({}, {"PEFTC_PROGRESS": "off"})],
)
def test_nothing_is_shown_of_short_work_nor_where_it_is_not_wanted(
    how: dict[str, Any], environment: dict[str, str]
) -> None:
    assert on_a_terminal(**how, **environment) == ""


def test_a_pipe_sees_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0)
    with progress.bar("merge", 2, "sites") as tick:
        tick(2)
    assert capfd.readouterr() == ("", "")


def test_a_notebook_has_its_own(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(progress, "DELAY", 0)
    with progress.bar("merge", 2, "sites") as tick:
        tick(2, "folding")
    assert "merge: folding: 100%" in capfd.readouterr().err


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every bar that is shown: what it says, how much there is, and how much it was told of in the end."""
    shown: list[tuple[str, int, int]] = []

    @contextmanager
    def counted(what: str, total: int, unit: str) -> Generator[Any]:
        done = 0

        def tick(count: int = 1, doing: str | None = None) -> None:
            nonlocal done
            done += count

        yield tick
        shown.append((what, total, done))

    monkeypatch.setattr(progress, "_line", counted)
    monkeypatch.setattr(progress, "wanted", lambda asked=True: asked)
    return shown


def test_work_on_disk_is_told_to_the_last_byte(bars: list[Any], tmp_path: Path) -> None:
    model = base_on_disk(model_of("llama"), tmp_path)
    adapter = adapter_on_disk(model, tmp_path / "adapter", target_modules=["q_proj"], r=2)
    peftc.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", undo=True)
    peftc.unmerge_checkpoint(tmp_path / "merged", tmp_path / "back")
    size = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    adapters = (adapter / "adapter_model.safetensors").stat().st_size
    assert bars == [("merge into merged", size + adapters, size + adapters), ("unmerge into back", size, size)]
    bars.clear()
    peftc.verify(tmp_path / "base", adapter, tmp_path / "merged")
    assert [(what, done) for what, _, done in bars] == [("merge into merged", size), ("compare", 30)]
    bars.clear()
    peftc.verify(tmp_path / "base", adapter, tmp_path / "merged", progress=False)
    peftc.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "again", progress=False)
    assert bars == []


@pytest.mark.parametrize("undo", ["keep", "residual"])
def test_merging_in_memory_is_told_by_site(undo: Any, bars: list[Any]) -> None:
    spec = peftc.LoraConfig(target_modules=["q_proj", "v_proj"], bias="lora_only", lora_bias=False)
    compiled = peftc.compile(llama(), spec, inplace=True)
    compiled.merge_adapter(undo=undo)
    compiled.unmerge_adapter()
    assert bars == [], "PEFT's default"
    compiled.merge_adapter(undo=undo, progressbar=True)
    replaced = len(compiled.program.merge.replaced)
    compiled.unmerge_adapter(progressbar=True)
    compiled.merge_and_unload(progressbar=True)
    assert bars == [("merge", 6, 6), ("unmerge", replaced, replaced), ("merge", 6, 6)]


@pytest.mark.parametrize(
    ("to", "adapters"), [("hf", "merged"), ("gguf", "beside"), pytest.param("pt2", "inputs", marks=pytest.mark.slow)]
)
def test_an_export_is_told_by_step(to: Any, adapters: Any, bars: list[Any], tmp_path: Path) -> None:
    compiled = saved(tmp_path / "adapter")
    compiled.export(tmp_path / "exported", to, adapters=adapters)
    assert bars == [(f"export to {to}", 3, 3)]
    compiled.export(tmp_path / "once more", to, adapters=adapters, progress=False)
    assert len(bars) == 1


def test_the_log_says_what_was_done(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, "peftc")
    saved(tmp_path / "adapter").unload().save_pretrained(tmp_path / "model")
    compiled = peftc.load(llama(), tmp_path / "adapter")
    compiled.load_adapter(tmp_path / "adapter", "second")
    compiled.merge_adapter()
    compiled.unmerge_adapter()
    compiled.delete_adapter("second")
    compiled.export(tmp_path / "exported")
    peftc.merge_checkpoint(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    said = [f"{record.name}: {record.getMessage()}" for record in caplog.records if record.name.startswith("peftc")]
    expected = (
        "peftc.rewrite.build: LlamaForCausalLM with default: 6 edits on 6 sites",
        f"peftc.checkpoint.save: saved default to {tmp_path}/adapter: ",
        "peftc.rewrite.build: LlamaForCausalLM with default: 6 edits",
        f"peftc.lifecycle: loaded default: 12 tensors of {tmp_path}/adapter",
        "peftc.lifecycle: added second (LORA): 6 edits",
        "peftc.lifecycle: loaded second: 12 tensors",
        "peftc.merge.merge: merged default: 6 sites, undo='keep', ",
        "peftc.merge.merge: unmerged default: 6 tensors, ",
        "peftc.lifecycle: deleted second",
        "peftc.merge.merge: merged default: 6 sites",
        "peftc.merge.merge: unmerged default: 6 tensors",
        f"peftc.export.programs: exported to {tmp_path}/exported in ",
        "peftc.rewrite.build: LlamaForCausalLM with adapter0: 6 edits",
        "peftc.stream.job: merge into merged: begins",
        "peftc.stream.job: merge into merged: done, ",
    )
    assert len(said) == len(expected), said
    for line, start in zip(said, expected, strict=True):
        assert line.startswith(start)


def test_a_script_that_asks_for_nothing_is_told_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "adapter").unload().save_pretrained(tmp_path / "model")
    script = """
import peftc
from transformers import AutoModelForCausalLM, utils
utils.logging.disable_progress_bar()
compiled = peftc.load(AutoModelForCausalLM.from_pretrained("model"), "adapter")
compiled.merge_adapter(progressbar=True)
compiled.save_pretrained("again")
compiled.export("exported")
peftc.merge_checkpoint("model", "adapter", "merged")
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == ""
    assert "peftc" not in ran.stderr, "what other packages say when they are imported is theirs"
    assert "%" not in ran.stderr
