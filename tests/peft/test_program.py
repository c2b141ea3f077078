"""One program, run with peft and with peftc in its place: it finds the same."""

from typing import Any

import pytest

from tests.peft.program import TOPICS
from tests.support import both_ways


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the program finds with peft, and with peftc."""
    return both_ways.found("tests.peft.program", tmp_path_factory.mktemp("program"))


@pytest.mark.slow
@pytest.mark.parametrize("topic", TOPICS)
def test_the_program_finds_the_same(topic: str, found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = found
    assert both_ways.close(theirs[topic], ours[topic]) == theirs[topic]
