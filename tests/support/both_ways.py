"""A program for peft, run with peft and with peftc in its place."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def found(program: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What module `program` writes, as JSON to the file that it is told, with peft and with peftc."""
    results: list[dict[str, Any]] = []
    for name, how in (("theirs", ["-m"]), ("ours", ["-m", "peftc.peft", "-m"])):
        file = folder / f"{program}-{name}.json"
        command = [sys.executable, *how, program, str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(file.read_text()))
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
