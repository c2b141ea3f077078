"""A folder to work in: a model, an adapter of it, and nothing else."""

import shutil
from pathlib import Path

import pytest

from tests.support.adapters import saved


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    saved(folder / "adapter").unload().save_pretrained(folder / "model")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with copies of `model` and `adapter`."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder
