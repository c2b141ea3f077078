"""docs/images/plan.svg is a recording of `peftc plan`. Record it anew with `python -m tests.cli.test_recording`."""

import io
import json
import re
import tempfile
from contextlib import chdir
from pathlib import Path

import pytest
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from tests.support.command import ROOT, WIDTH, peftc

FILE = ROOT / "docs" / "images" / "plan.svg"
# Llama 3.1 70B.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
COMMANDS = (
    "peftc plan llama-70b/config.json --targets q_proj,k_proj,v_proj,down_proj --r 16",
    "peftc plan llama-70b/config.json --targets q_prj",
)


def recorded() -> str:
    """The commands and what they print, as an SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", legacy_windows=False)
    for command in COMMANDS:
        ran = peftc(*command.split()[1:], code=3 if "q_prj" in command else 0)
        console.print(Text.assemble(("$ ", "green"), (command, "bold")))
        style = ""
        for line in ran.out.splitlines():
            style = "red" if line.startswith("✗") or style == "red" else "bold" if line.startswith("Plan for") else ""
            console.print(Text(line, style=style), soft_wrap=False)
        console.print()
    # No fonts from elsewhere: what shows the picture has one of fixed width.
    return console.export_svg(
        title="peftc", code_format=re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    )


def _written(folder: Path) -> None:
    (folder / "llama-70b").mkdir()
    (folder / "llama-70b" / "config.json").write_text(json.dumps(CONFIG))


def test_the_recording_shows_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _written(tmp_path)
    assert FILE.read_text() == recorded(), "python -m tests.cli.test_recording"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where, chdir(where):
        _written(Path(where))
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(recorded())
