"""The documents say what is so: their code runs, what they quote is what is there, and the walks lead where they say."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import PretrainedConfig

import peftc
from peftc import architectures, registry
from peftc.graph import ops
from peftc.registry import rules
from tests.support import made_up_method
from tests.support.documents import ROOT, blocks, run, section

EXAMPLES = list(dict.fromkeys(block.section for block in blocks("CONTRIBUTING.md", "python")))


@pytest.fixture
def _unregistered() -> Iterator[None]:
    """What an example registers goes again."""
    known, rows = rules(), ops.ops()
    yield
    for rule in rules():
        if rule not in known:
            peftc.unregister(rule)
    for name, row in ops.ops().items():
        if name not in rows:
            peftc.unregister_op(row)


def test_there_is_an_example_of_all_that_can_be_added() -> None:
    assert EXAMPLES == ["How to add a method", "How to add an op", "How to add a pass"]


@pytest.mark.usefixtures("_unregistered")
@pytest.mark.parametrize("title", EXAMPLES)
def test_the_examples_run(title: str) -> None:
    own = [block for block in blocks("CONTRIBUTING.md", "python") if block.section == title]
    assert any("assert " in block.text or "check_rule(" in block.text for block in own), "an example that checks itself"
    run("CONTRIBUTING.md", own, {})


def points(document: str) -> dict[str, dict[str, str]]:
    """The entry points that a document declares, by group."""
    found: dict[str, dict[str, str]] = {}
    for block in blocks(document, "toml"):
        for group, own in tomllib.loads(block.text)["project"]["entry-points"].items():
            found.setdefault(group, {}).update(own)
    return found


def test_entry_points_are_those_that_are_looked_for() -> None:
    assert set(points("CONTRIBUTING.md")) == {registry.GROUP, ops.GROUP, architectures.GROUP}
    assert set(points("docs/writing-a-method.md")) == {registry.GROUP}


def test_a_family_in_a_package_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = (block.text for block in blocks("CONTRIBUTING.md", "yaml"))
    ((name, module),) = points("CONTRIBUTING.md")[architectures.GROUP].items()
    folder = tmp_path.joinpath(*module.split("."))
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / f"{name}.yaml").write_text(text)
    installed = tmp_path / f"{name}-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{architectures.GROUP}]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    architectures.families.cache_clear()
    try:
        family = yaml.safe_load(text)
        plan = peftc.plan(Attention(config_of(family["model_types"][0])), peftc.LoraConfig(r=1))
        names = family["defaults"]["LORA"]["target_modules"]
        assert [edit.site for edit in plan.edits] == names
        assert plan.sites[names[0]].role == "attention.query"
        with pytest.raises(peftc.NoMatchError, match="no default for model_type 'supernova'"):
            peftc.plan(Attention(config_of("supernova")), peftc.LoraConfig(r=1))
    finally:
        architectures.families.cache_clear()


def config_of(model_type: str) -> PretrainedConfig:
    """A config of transformers of that type."""
    return type("Config", (PretrainedConfig,), {"model_type": model_type})()


class Attention(nn.Module):
    """What a family has defaults for."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.q_proj, self.v_proj = config, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.v_proj(x)


def test_the_page_shows_the_made_up_method_as_it_is() -> None:
    file, page = Path(made_up_method.__file__), "docs/writing-a-method.md"
    assert blocks(page, "python")[0].text == file.read_text()
    assert f"`{file.relative_to(ROOT)}`" in (ROOT / page).read_text()


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))],
)
def test_files_that_are_named_are_there(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:peftc|rules|tests|benchmarks|examples)/[\w/.-]*)[:`]", text)
    assert not [path for path in named if not (ROOT / path).exists()]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"(?:^|`)make (\w+)(?=[`\s]*(?:#|`|$|\n))", text, re.MULTILINE)
    assert set(commands) <= set(targets)


WALKS = {
    "a spec": ("### A spec, through `peftc.compile`", "peftc/api.py:compile"),
    "a weight": ("### A weight, through `merge_adapter`", "peftc/compiled.py:CompiledModel.merge_adapter"),
}


def walk(heading: str) -> list[tuple[str, str | None]]:
    """The steps of a walk, each with the one that it is indented under."""
    found: list[tuple[str, str | None]] = []
    above: list[str] = []
    for indent, step in re.findall(r"^( *)- `(\S+\.py:\S+)`", section("CONTRIBUTING.md", heading), re.MULTILINE):
        del above[len(indent) // 2 :]
        found.append((step, above[-1] if above else None))
        above.append(step)
    return found


def definition(step: str) -> Any:
    """What `path.py:name` names, or None."""
    path, _, name = step.partition(":")
    node: Any = ast.parse((ROOT / path).read_text()) if (ROOT / path).exists() else None
    for part in name.split("."):
        inner = node.body if node is not None else []
        defined = (own for own in inner if isinstance(own, ast.FunctionDef | ast.ClassDef))
        node = next((own for own in defined if own.name == part), None)
    return node


def calls(step: str, other: str) -> bool:
    """Whether `step` names `other` in its code."""
    nodes = list(ast.walk(definition(step)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return re.split(r"[.:]", other)[-1] in names


@pytest.mark.parametrize("name", WALKS)
def test_every_step_of_a_walk_is_there_and_called_by_the_one_above(name: str) -> None:
    heading, first = WALKS[name]
    steps = walk(heading)
    assert len(steps) > 20
    assert steps[0] == (first, None)
    assert not [step for step, _ in steps if definition(step) is None]
    assert not [(step, above) for step, above in steps if above is not None and not calls(above, step)]
    assert [step for step, above in steps if above is None] == [first]


def test_a_step_that_is_not_there_or_not_called_would_be_found() -> None:
    assert definition("peftc/api.py:compiles") is None
    assert definition("peftc/apis.py:compile") is None
    assert definition("peftc/compiled.py:CompiledModel.no_such_method") is None
    assert not calls("peftc/api.py:compile", "peftc/rewrite/hosts.py:install")
