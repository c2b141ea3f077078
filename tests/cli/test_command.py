"""The command as a whole: help and its examples, exit codes, errors, what a pipe sees."""

import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peftc as library
from peftc import progress
from peftc.export import programs
from peftc.stream import job
from tests.support.command import COMMANDS, ROOT, example, peftc
from tests.support.models import llama


def test_the_examples_of_the_helps_run(here: Path) -> None:
    said = {command: peftc(*example(command)).out for command in COMMANDS}
    assert "lora_A 8×32" in said["plan"]
    assert "~ edit model.layers.{0–2}.self_attn.q_proj" in said["diff"]
    assert "does not name it" in said["explain"]
    assert "config and tensors are what was saved" in said["inspect"]
    assert said["preflight"] == "vllm: takes it\n"
    assert json.loads(Path("mix/adapter_config.json").read_text())["r"] == 5
    assert (here / "restored" / "model.safetensors").read_bytes() == (here / "model" / "model.safetensors").read_bytes()
    assert (here / "exported" / "certificate.json").exists()
    assert "weight" in said["verify"] or "differ by 0 at most" in said["verify"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("pln",),
        ("plan",),
        ("plan", "model", "--r", "many"),
        ("export", "a", "b", "c", "--to", "tar"),
        ("combine", "a", "b", "out", "--base", "model"),
        ("combine", "a", "b", "out", "--base", "model", "--weights", "1"),
        ("combine", "a", "b", "out", "--base", "model", "--weights", "1,half"),
    ],
)
def test_a_wrong_command_line_is_2(arguments: tuple[str, ...]) -> None:
    peftc(*arguments, code=2)


def test_the_exit_codes_are_in_the_help() -> None:
    said = " ".join(peftc("--help").out.split())
    assert "0 it is done; 1 an error" in said
    assert "3 the answer is no" in said


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("plan", "nowhere"), "CheckpointError: nowhere: neither a folder here nor a Hub repository"),
        (("diff", "nowhere", "adapter"), "PlanError: nowhere"),
        (("explain", "model", "adapter", "lm_haed"), "Nearest: 'lm_head'"),
        (("explain", "model", "adapter", "q_proj"), "There are 'model.layers.0.self_attn.q_proj', "),
        (("plan", "model", "--class", "LlamaForCausalLN"), "--class LlamaForCausalLN: names no class"),
        (("inspect", "model"), "SpecError: model/adapter_config.json: no such file"),
        (("preflight", "model"), "CheckpointError: model: no adapter"),
        (("preflight", "adapter", "--runtime", "vlm"), "known are vllm"),
        (("convert", "adapter", "out", "--base", "nowhere"), "nowhere: is no folder"),
        (("combine", "adapter", "model", "out", "--base", "model", "--weights", "1,1"), "adapter_config.json: no such"),
        (("combine", "adapter", "other", "out", "--base", "model", "--weights", "1,1", "--type", "cart"), "'cart'"),
        (("merge", "adapter", "model", "out"), "CheckpointError"),
        (("unmerge", "model", "out"), "has no peftc_undo"),
        (("unmerge", "nowhere", "out"), "nowhere: no such folder"),
        (("export", "model", "model", "out"), "model/adapter_config.json: no such file"),
        (("export", "model", "adapter", "out", "--to", "hf", "--adapters", "inside"), "ExportError: to='hf'"),
        (("verify", "model"), "holds no certificate"),
        (("verify", "model", "adapter"), "verify takes the folder of an export"),
    ],
)
def test_an_error_is_one_message_and_1(arguments: tuple[str, ...], told: str) -> None:
    ran = peftc(*arguments, code=1)
    assert told in ran.err
    assert ran.out == ""
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_warnings_are_a_line_each() -> None:
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("spec.json").write_text(json.dumps({**config, "of_next_year": 1}))
    ran = peftc("plan", "model", "spec.json", "--json")
    assert ran.err == "warning: spec.json: keys without effect here, kept as they are: 'of_next_year'\n"
    assert ran.json["model"] == "LlamaForCausalLM"


def process(*command: str) -> Any:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_in_a_process_of_its_own() -> None:
    missed = process(sys.executable, "-m", "peftc", "plan", "model/config.json", "--targets", "q_proj,q_prj")
    assert missed.returncode == 3, missed
    assert "'q_prj' matches none" in missed.stdout
    assert "\x1b" not in missed.stdout + missed.stderr
    merged = process(sys.executable, "-m", "peftc", "-v", "merge", "model", "adapter", "merged")
    assert (merged.returncode, merged.stdout) == (0, "merged into merged\n"), merged
    assert "%" not in merged.stderr, "nobody looks at a bar"
    assert "peftc.stream.job: merge into merged: done, " in merged.stderr
    wrong = process(sys.executable, "-m", "peftc", "merge", "model", "model", "wrong")
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr
    assert "SpecError: " in wrong.stderr


@pytest.mark.usefixtures("here")
def test_interrupted_it_says_how_to_go_on_and_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library.merge_checkpoint("model", "adapter", "expected", progress=False)
    llama().save_pretrained("sharded", max_shard_size="20KB")
    real, before = (
        job.write_output,
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # Ignored in the background.

    def interrupted(output: Any, *how: Any) -> None:
        if output.name.startswith("model-00003"):
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C.
        real(output, *how)

    with monkeypatch.context() as patched:
        patched.setattr(job, "write_output", interrupted)
        ran = peftc("merge", "sharded", "adapter", "merged", code=130)
    signal.signal(signal.SIGINT, before)
    assert "The same command goes on where it was" in ran.err
    assert [file.name for file in Path("merged").iterdir()] == [".peftc-merge"]
    caplog.set_level(logging.INFO, "peftc")
    peftc("merge", "sharded", "adapter", "merged")
    assert "merge into merged: goes on, 2 of " in caplog.text
    merged = {name: value for file in Path("merged").glob("*.safetensors") for name, value in load_file(file).items()}
    expected = load_file("expected/model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("here")
def test_an_interrupted_export_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(programs, "difference", interrupted)
    assert "Run the same command to start over" in peftc("export", "model", "adapter", "exported", code=130).err
    assert list(Path("exported").rglob("*")) == []


LONG = {
    "convert": ("convert adapter out --base model", "peftc.checkpoint.atomic", "_sync_tree"),
    "combine": ("combine adapter other out --base model --weights 1,1", "peftc.checkpoint.atomic", "_sync_tree"),
    "unmerge": ("unmerge merged out", "peftc.stream.job", "write_output"),
    "verify": ("verify model adapter merged", "peftc.export.verify", "_apart"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", LONG)
def test_what_an_interruption_says_can_be_done(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    line, module, name = LONG[command]
    peftc("merge", "model", "adapter", "merged", "--undo")
    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module(module), name, interrupted)
        told = peftc(*line.split(), code=130).err
    assert ("goes on where it was" if command == "unmerge" else "Run the same command to start over") in told
    left = [file for file in Path("out").rglob("*") if file.is_file() and ".peftc-merge" not in file.parts]
    assert left == []
    peftc(*line.split())


def test_it_is_installed_as_peftc() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {"peftc": "peftc.cli:main"}
    ran = process(str(Path(sys.executable).parent / "peftc"), "rules", "--help")
    assert ran.returncode == 0, ran
    assert "Usage: peftc rules" in ran.stdout


WITHOUT_TORCH = """
import sys
from typer.testing import CliRunner
from peftc.cli import app
for line in sys.argv[1:]:
    result = CliRunner().invoke(app, line.split(), prog_name="peftc")
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
print(sorted({"torch", "transformers", "rich"} & set(sys.modules)))
"""


def test_helps_and_wrong_lines_import_no_torch() -> None:
    lines = ["", "--help", "--version", "pln", "plan", "plan model --r many", "export a b c --to tar"]
    told = process(sys.executable, "-c", WITHOUT_TORCH, *lines, *(f"{command} --help" for command in COMMANDS))
    assert told.stdout == "[]\n", told


def completed(shell: str, **words: str) -> list[str]:
    """What a shell is offered."""
    environment = {**os.environ, "_PEFTC_COMPLETE": f"complete_{shell}", **words}
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "peftc"], env=environment, capture_output=True, text=True, check=True
    )
    assert " torch" not in ran.stderr, "nobody waits for it at a key"
    return re.findall(r"[\w.-]+", ran.stdout)


def test_shells_complete_commands_options_and_their_values() -> None:
    assert completed("bash", COMP_WORDS="peftc un", COMP_CWORD="1") == ["unmerge"]
    values = completed("zsh", _TYPER_COMPLETE_ARGS="peftc export base adapter out --to ")
    assert values[-6:] == ["hf", "pt2", "onnx", "aoti", "gguf", "mlx"]
    options = completed(
        "fish", _TYPER_COMPLETE_ARGS="peftc merge --un", _TYPER_COMPLETE_FISH_ACTION="get-args", COMP_WORDS=""
    )
    assert {"--undo", "--untie"} <= set(options)


def test_bars_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.VARIABLE, "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert progress.wanted()
    peftc("--no-progress", "rules")
    assert not progress.wanted()


def test_the_version_is_that_of_the_package() -> None:
    assert peftc("--version").out == f"peftc {version('peftc')}\n"
