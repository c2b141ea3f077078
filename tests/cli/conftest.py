"""A folder to work in: a model, two adapters of it, and nothing else."""

import shutil
from pathlib import Path

import pytest

from tests.support.command import WIDTH, lay_out


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    lay_out(folder)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with copies of `model`, `adapter` and `other`."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", str(WIDTH))  # Of plans that tests print, as of the command.
    return folder
