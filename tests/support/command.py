"""The command `peftc` in this process, a folder for it to work in, and what of its output is the same everywhere."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from peftc.cli import app
from tests.support.adapters import saved

ROOT = Path(__file__).parent.parent.parent
# Of the terminal that it thinks it has.
WIDTH = 120
COMMANDS = tuple(str(command.name) for command in app.registered_commands)


@dataclass(frozen=True)
class Ran:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def peftc(*arguments: object, code: int = 0) -> Ran:
    """Run `peftc` with these arguments, which must end with this exit code, and never in a traceback."""
    result = CliRunner(env={"COLUMNS": str(WIDTH)}).invoke(
        app, [str(argument) for argument in arguments], prog_name="peftc"
    )
    ran = Ran(result.exit_code, result.stdout, result.stderr)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert ran.code == code, ran
    assert "Traceback" not in ran.out + ran.err
    assert "\x1b" not in ran.out + ran.err, "there is no terminal"
    return ran


def lay_out(folder: Path) -> None:
    """Put a model into `folder`, `adapter` and `other`, of another rank; and two plans."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        saved(folder / "adapter").unload().save_pretrained(folder / "model")
        saved(folder / "other", r=3)
    for name, rank in (("plan-a.json", 2), ("plan-b.json", 4)):
        ran = peftc("plan", folder / "model", "--targets", "q_proj", "--r", rank, "--json")
        (folder / name).write_text(ran.out)


def example(command: str) -> list[str]:
    """The arguments of the example in a command's help."""
    text = peftc(command, "--help").out.partition("\n  Example: ")[2]
    name, *arguments = shlex.split(text)
    assert (name, arguments[0]) == ("peftc", command)
    return arguments


def of_any_machine(text: str) -> str:
    """What a command has printed, without what differs by machine: rounding, hashes, versions, places."""
    text = text.replace(str(ROOT / "rules"), "peftc_rules")
    text = re.sub(r'("peftc|"torch|"transformers|"onnx\w*|"gguf)": "[^"]*"', r'\1": "a version"', text)
    text = re.sub(r"\b[0-9a-f]{64}\b", "a hash", text)
    return re.sub(r"\b\d+\.\d+(e[+-]?\d+)?|\b\d+e-\d+", "a float", text)
