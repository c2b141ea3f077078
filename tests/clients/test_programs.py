"""Programs for the packages of real clients, run with peft and with peftc in its place: they find the same."""

import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.peft.test_program import close

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = (
    "with_trainer",
    "with_trl",
    "with_accelerate",
    "with_sentence_transformers",
    "with_diffusers",
    "with_evaluation",
)


@cache
def found(program: str, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a program finds with peft, and with peftc."""
    results: list[dict[str, Any]] = []
    for name, how in (("theirs", ["-m"]), ("ours", ["-m", "peftc.peft", "-m"])):
        file = out / f"{program}-{name}.json"
        command = [sys.executable, *how, f"tests.clients.programs.{program}", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(file.read_text()))
    return results[0], results[1]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_finds_the_same(program: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    theirs, ours = found(program, tmp_path_factory.getbasetemp())
    assert {topic: close(value, ours[topic]) for topic, value in theirs.items()} == theirs
    assert set(importlib.import_module(f"tests.clients.programs.{program}").TOPICS) == set(theirs)
