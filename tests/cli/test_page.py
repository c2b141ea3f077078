"""docs/command.md has the help of every command and its example with what that prints; `--json` prints what it did.

Write both anew with `python -m tests.cli.test_page`.
"""

import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from tests.support.command import COMMANDS, ROOT, example, lay_out, of_any_machine, peftc

PAGE = ROOT / "docs" / "command.md"
GOLDEN = ROOT / "tests" / "golden" / "cli"
MARK = "<!-- What follows is written by `python -m tests.cli.test_page`. -->\n"
# In this order: the later ones read what the earlier ones wrote.
JSON = {
    "plan": "plan model/config.json --targets q_proj,v_prj --r 8 --field layers_to_transform=[0]",
    "diff": "diff adapter other",
    "explain": "explain model adapter model.layers.0.self_attn.q_proj",
    "inspect": "inspect adapter",
    "preflight": "preflight adapter",
    "convert": "convert adapter served --base model",
    "combine": "combine adapter other mix --base model --weights 0.7,-0.3 --type cat",
    "merge": "merge model adapter merged --undo",
    "unmerge": "unmerge merged restored",
    "export": "export model adapter exported",
    "verify": "verify exported",
    "rules": "rules",
    "demo": "demo --show 2",
}


def page() -> Iterator[str]:
    """The generated part, made in the working directory."""
    for command in COMMANDS:
        arguments = example(command)
        yield f"\n## peftc {command}\n\n```\n{peftc(command, '--help').out.strip()}\n```\n"
        said = peftc(*arguments).out.replace(str(ROOT / "rules"), "…/peftc_rules").rstrip()
        lines = "\n".join(line.rstrip() for line in said.splitlines())
        yield f"\n```\n$ {shlex.join(['peftc', *arguments])}\n{lines}\n```\n"


def alike(text: str) -> str:
    """What is the same everywhere: a rounded number may be whole elsewhere, and its column of another width."""
    text = re.sub(r"differ by \S+ at most, of \S+", "differ", of_any_machine(text))
    text = re.sub(r"^(model\.layers\.\S+( +\d+){3}) +\S.*$", r"\1", text, flags=re.MULTILINE)
    return re.sub(r" {2,}", "  ", text)


def printed(name: str) -> str:
    return of_any_machine(peftc(*JSON[name].split(), "--json", code=3 if name == "plan" else 0).out)


@pytest.mark.usefixtures("here")
def test_the_page_says_what_the_commands_print() -> None:
    hand, mark, generated = PAGE.read_text().partition(MARK)
    assert mark
    assert alike(generated) == alike("".join(page())), "python -m tests.cli.test_page"
    assert [
        command for command in COMMANDS if f"peftc {command} " not in hand and f"peftc {command}\n" not in hand
    ] == []


@pytest.mark.usefixtures("here")
def test_json_is_what_it_was() -> None:
    for name in JSON:
        assert printed(name) == (GOLDEN / f"{name}.json").read_text(), f"{name}: python -m tests.cli.test_page"


def test_every_command_has_json() -> None:
    assert list(JSON) == list(COMMANDS)
    assert [command for command in COMMANDS if "--json" not in peftc(command, "--help").out] == []


def _write() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        lay_out(Path(folder))
        hand = PAGE.read_text().partition(MARK)[0]
        PAGE.write_text(hand + MARK + "".join(page()))
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        lay_out(Path(folder))
        GOLDEN.mkdir(exist_ok=True)
        for name in JSON:
            (GOLDEN / f"{name}.json").write_text(printed(name))


if __name__ == "__main__":
    _write()
