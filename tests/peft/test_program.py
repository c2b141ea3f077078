"""One program, run with peft and with peftc in its place: it finds the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.peft.program import TOPICS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the program finds with peft, and with peftc."""
    folder = tmp_path_factory.mktemp("program")
    results: list[dict[str, Any]] = []
    for name, how in (("theirs", ["-m"]), ("ours", ["-m", "peftc.peft", "-m"])):
        out = folder / f"{name}.json"
        command = [sys.executable, *how, "tests.peft.program", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    return results[0], results[1]


def close(theirs: Any, ours: Any) -> Any:
    """`ours`, with `theirs` in the place of numbers that differ by rounding."""
    if isinstance(theirs, float) and isinstance(ours, float):
        return theirs if abs(theirs - ours) <= 1e-4 * max(1.0, abs(theirs)) else ours
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return [close(*pair) for pair in zip(theirs, ours, strict=True)]
    if isinstance(theirs, dict) and isinstance(ours, dict) and theirs.keys() == ours.keys():
        return {key: close(value, ours[key]) for key, value in theirs.items()}
    return ours


@pytest.mark.parametrize("topic", TOPICS)
def test_the_program_finds_the_same(topic: str, found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = found
    assert close(theirs[topic], ours[topic]) == theirs[topic]
