"""Programs for the packages of real clients, run with peft and with peftc in its place: they find the same."""

import importlib
from pathlib import Path

import pytest

from tests.support.both_ways import close, found

PROGRAMS = ("trainer", "trl", "accelerate", "sentence_transformers", "diffusers", "evaluation")


@pytest.mark.slow
@pytest.mark.parametrize("client", PROGRAMS)
def test_the_program_finds_the_same(client: str, tmp_path: Path) -> None:
    program = f"tests.clients.programs.with_{client}"
    theirs, ours = found(program, tmp_path)
    assert {topic: close(value, ours[topic]) for topic, value in theirs.items()} == theirs
    assert set(importlib.import_module(program).TOPICS) == set(theirs)
