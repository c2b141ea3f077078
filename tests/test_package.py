"""What is built holds all of it, installs by itself, and its extras bring what errors ask for."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import peftc
from peftc.export import Certificate
from tests.support.adapters import lora
from tests.support.models import inputs_for, llama

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {"peftc": "peftc", "rules": "peftc_rules"}


def run(*command: object, folder: Path | None = None) -> str:
    ran = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def files() -> dict[str, bytes]:
    """The files of both packages by their places when they are installed."""
    return {
        (Path(package) / file.relative_to(ROOT / folder)).as_posix(): file.read_bytes()
        for folder, package in SOURCES.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, a wheel that is made from it, and one that is made from the tree."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    for name in ("peftc", "rules"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder=tree)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "direct", folder=tree)
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_wheel_and_sdist_have_every_file(built: Path) -> None:
    (wheel,), (direct,) = (list((built / name).glob("*.whl")) for name in ("dist", "direct"))
    assert contents(wheel) == files()
    assert contents(direct) == files()
    (sdist,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "rules/architectures/llama.yaml", "peftc/py.typed"} <= names


SCRIPT = """
import json, sys, torch, transformers
import peftc, peftc_rules
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
config = transformers.LlamaConfig(**sizes)
model = transformers.LlamaForCausalLM(config)
compiled = peftc.compile(model, peftc.LoraConfig(r=2))
compiled.merge_adapter()
compiled.unmerge_adapter()
compiled.save_pretrained("adapter")
import peftc.peft
print(json.dumps([peftc.__file__, peftc_rules.__file__, sorted(compiled.plan.sites), len(peftc.peft.__all__)]))
"""


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_of_the_tree_is(built: Path, tmp_path: Path) -> None:
    (wheel,) = (built / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    # Paths that follow: what peftc needs is there, and a peftc that is there is not looked at.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    own, rules, sites, names = json.loads(run(python, "-c", SCRIPT, folder=tmp_path).splitlines()[-1])
    assert {Path(own).parent.parent, Path(rules).parent.parent} == {site}
    assert sites == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"], (
        "llama's defaults, from YAML"
    )
    assert names > 100
    methods = json.loads(run(python, "-m", "peftc", "rules", "--json", folder=tmp_path))
    assert len(methods) == len(peftc.registry.spec_classes())
    assert {Path(rule["file"]).parts[: len(site.parts)] for method in methods for rule in method["rules"]} == {
        site.parts
    }
    run(tmp_path / "venv" / "bin" / "peftc", "inspect", "adapter", folder=tmp_path)
    assert '"intent": ' in run(tmp_path / "venv" / "bin" / "peftc", "demo", "--show", 1, folder=tmp_path)


def test_every_package_is_listed() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    there = {name.rpartition("/")[0].replace("/", ".") for name in files() if name.endswith(("/__init__.py", ".yaml"))}
    assert listed == there


def test_every_dependency_has_a_lower_bound_that_can_be_tried() -> None:
    bounds = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["undo"]]
    assert not [line for line in bounds if not re.fullmatch(r"[\w-]+>=[\d.]+", line)], (
        "tools/lower_bounds.py reads them"
    )


def needing(extra: str) -> set[str]:
    """The packages that an extra brings."""
    return {re.split(r"[\[><=]", line)[0].lower() for line in PROJECT["project"]["optional-dependencies"][extra]}


NEEDS: dict[str, Callable[[Path], Any]] = {
    "zstandard": lambda _: peftc.compile(llama(), lora("q_proj"), inplace=True).merge_adapter(undo="residual"),
    "gguf": lambda folder: peftc.compile(llama(), lora("q_proj")).export(folder / "out", to="gguf"),
    "onnx": lambda folder: peftc.compile(llama(), lora("q_proj")).export(folder / "out", to="onnx"),
    "onnxruntime": lambda folder: peftc.compile(llama(), lora("q_proj")).export(folder / "out", to="onnx"),
    "onnxscript": lambda folder: peftc.compile(llama(), lora("q_proj")).export(folder / "out", to="onnx"),
    "pywt": lambda _: peftc.compile(llama(), wavelets("sym4"))(**inputs_for("llama")),
    "sklearn.cluster": lambda _: peftc.compile(llama(), peftc.AdamssConfig(target_modules=["q_proj"])),
}
SLOW = ("onnx", "onnxruntime", "onnxscript")


def wavelets(family: str) -> Any:
    return peftc.WaveFTConfig(target_modules=["q_proj"], n_frequency=10, wavelet_family=family)


@pytest.mark.parametrize("module", NEEDS)
def test_the_extra_that_an_error_names_brings_what_is_missing(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(peftc.PeftcError, match="pip install") as caught:
        NEEDS[module](tmp_path)
    (extra,) = re.findall(r"pip install 'peftc\[(\w+)\]'", str(caught.value))
    names = {name.lower() for name in packages_distributions()[module.partition(".")[0]]}
    assert names & needing(extra)
    assert any(name in str(caught.value).lower() for name in (module, *names))
    assert not (tmp_path / "out").exists()
    if module not in SLOW:  # With it, the same call does it; tests/export has the others.
        monkeypatch.undo()
        NEEDS[module](tmp_path)


def test_checking_an_export_names_the_extra_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = Certificate("onnx", "merged", ("default",), 0.0, 1.0, None, None, {}, {})
    exported.write(tmp_path, {}, {})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(peftc.ExportError, match=r"needs onnxruntime: pip install 'peftc\[export\]'"):
        peftc.verify(tmp_path)


def test_extras_that_are_named_anywhere_are_there_and_all_are_explained() -> None:
    named = {
        extra
        for folder in ("peftc", "docs")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".md")
        for extra in re.findall(r"peftc\[(\w+)\]", file.read_text())
    }
    assert named == set(PROJECT["project"]["optional-dependencies"])
