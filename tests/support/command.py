"""The command `peftc` in this process."""

import json
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from peftc.cli import app


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
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="peftc")
    ran = Ran(result.exit_code, result.stdout, result.stderr)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert ran.code == code, ran
    assert "Traceback" not in ran.out + ran.err
    assert "\x1b" not in ran.out + ran.err, "there is no terminal"
    return ran
