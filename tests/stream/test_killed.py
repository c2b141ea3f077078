"""A merge on disk that is killed leaves nothing that looks like a model, and goes on when it is called again."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import peftc
from peftc.merge import fold
from peftc.stream import write
from tests.support.checkpoints import adapter_on_disk, assert_same_files, base_on_disk
from tests.support.killing import changes_made, finish, kill_at
from tests.support.models import model_of

MOMENTS = 200


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in shards, an adapter, and what merging gives, with and without a log to undo it."""
    folder = tmp_path_factory.mktemp("killed")
    model = base_on_disk(model_of("llama", torch.bfloat16), folder, shard="30KB")
    adapter_on_disk(model, folder / "adapter", target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    finish(partial(merge, folder, folder / "merged"))
    finish(partial(unmerge, folder, folder / "unmerged"))
    assert_same_files(folder / "unmerged", folder / "base")
    return folder


def merge(disk: Path, out: Path) -> None:
    peftc.merge_checkpoint(disk / "base", disk / "adapter", out, undo=True, progress=False)


def unmerge(disk: Path, out: Path) -> None:
    peftc.unmerge_checkpoint(disk / "merged", out, progress=False)


def assert_whole_or_no_model(out: Path, expected: Path) -> None:
    if (out / "config.json").exists():
        assert_same_files(out, expected, besides=(".peftc-commit",))


@pytest.mark.slow
@pytest.mark.parametrize(("action", "expected"), [(merge, "merged"), (unmerge, "unmerged")], ids=["merge", "unmerge"])
def test_killed_at_any_moment_it_goes_on(
    action: Callable[[Path, Path], None], expected: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "EVERY", 4000)
    total = 2 * changes_made(partial(action, disk, tmp_path / "counted"), tmp_path / "count")
    killed = 0
    for moment in sorted(random.Random(0).sample(range(total), min(total, MOMENTS))):
        out = tmp_path / str(moment)
        killed += kill_at(moment, partial(action, disk, out))
        assert_whole_or_no_model(out, disk / expected)
        finish(partial(action, disk, out))
        assert_same_files(out, disk / expected)
    assert killed > MOMENTS * 3 // 4


def test_what_was_done_is_not_done_again(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "EVERY", 4000)
    real, folds = fold.fold_tile, list[str]()

    def counted(*args: Any) -> Any:
        folds.append("")
        return real(*args)

    monkeypatch.setattr(fold, "fold_tile", counted)
    merge(disk, tmp_path / "counted")
    everything = len(folds)
    total = 2 * changes_made(partial(merge, disk, tmp_path / "again"), tmp_path / "count")
    assert kill_at(total // 3, partial(merge, disk, tmp_path / "out"))
    folds.clear()
    merge(disk, tmp_path / "out")
    assert 0 < len(folds) < everything
    folds.clear()
    merge(disk, tmp_path / "out")
    assert not folds
    assert_same_files(tmp_path / "out", disk / "merged")


def test_killed_several_times_in_a_row(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "EVERY", 4000)
    order = random.Random(1)
    kills = 0
    while kill_at(order.randrange(40, 160), partial(merge, disk, tmp_path / "out")):
        kills += 1
        assert kills < 100, "it never gets on"
    merge(disk, tmp_path / "out")
    assert kills > 2
    assert_same_files(tmp_path / "out", disk / "merged")


def test_after_another_boot_it_begins_again(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the page cache had may be gone then."""
    from peftc.stream import job

    monkeypatch.setattr(write, "EVERY", 4000)
    total = 2 * changes_made(partial(merge, disk, tmp_path / "counted"), tmp_path / "count")
    assert kill_at(total // 3, partial(merge, disk, tmp_path / "out"))
    shard = next((tmp_path / "out" / ".peftc-merge" / "files").glob("model-*.safetensors"))
    shard.write_bytes(bytes(shard.stat().st_size))
    monkeypatch.setattr(job, "_boot", lambda: "another")
    merge(disk, tmp_path / "out")
    assert_same_files(tmp_path / "out", disk / "merged")


def test_another_job_does_not_go_on_with_it(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "EVERY", 4000)
    out = tmp_path / "out"
    total = 2 * changes_made(partial(merge, disk, tmp_path / "counted"), tmp_path / "count")
    assert kill_at(total // 3, partial(merge, disk, out))
    peftc.merge_checkpoint(disk / "base", [disk / "adapter"], out, weights=[0.5], progress=False)
    peftc.merge_checkpoint(disk / "base", [disk / "adapter"], tmp_path / "other", weights=[0.5], progress=False)
    assert_same_files(out, tmp_path / "other")
