"""Every Python block of README.md and of the pages runs, what they show is what is printed, and nothing is named that is
not there.
"""

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

import peftc
from peftc.registry import rules
from tests.support.documents import ROOT, blocks, run, stage

PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if blocks(page, "python")]
# Programs are captured and exported there.
SLOW = ("docs/captures.md", "docs/shipping.md")
# What torchrun has made when a script begins.
DISTRIBUTED = ("docs/several-gpus.md",)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in WITH_CODE]
)
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if page in DISTRIBUTED:
        request.getfixturevalue("process_group")
    given, known = stage(tmp_path), rules()
    try:
        run(page, blocks(page, "python"), given)
    finally:
        for rule in rules():
            if rule not in known:
                peftc.unregister(rule)


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)
    assert sorted(_pages(config["nav"])) == sorted(Path(page).name for page in PAGES if page != "README.md")


class _Loader(yaml.SafeLoader):
    """What mkdocs.yml has beside plain YAML is not of interest."""


_Loader.add_multi_constructor("tag:", lambda *_: None)
_Loader.add_multi_constructor("!", lambda *_: None)


def _pages(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    several = entry.values() if isinstance(entry, dict) else entry
    return [page for one in several for page in _pages(one)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert not [link for link in links if "://" not in link and not (folder / link).exists()]


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    others = [name for name in peftc.__all__ if not name.endswith("Error")]
    assert not [name for name in others if not re.search(rf"\b{name}\b", text)]
    assert "::: peftc.errors" in text


def test_the_page_of_costs_is_what_was_measured() -> None:
    """And says of each bar whether it is met, as its figure does."""
    figures = json.loads((ROOT / "benchmarks" / "bars.json").read_text())
    page = (ROOT / "docs" / "speed.md").read_text()
    text = runpy.run_path(str(ROOT / "benchmarks" / "bars_page.py"))["text"]
    assert page == text(figures)
    met = [one for one in figures.values() if one["value"] < one["bar"] + 0.005]
    assert f"{len(met)} of {len(figures)} bars are met." in page
    assert page.count(", missed |") == len(figures) - len(met)


def test_the_page_of_where_time_goes_is_what_was_profiled() -> None:
    figures = json.loads((ROOT / "benchmarks" / "where.json").read_text())
    text = runpy.run_path(str(ROOT / "benchmarks" / "where.py"))["text"]
    assert (ROOT / "docs" / "where.md").read_text() == text(figures)
    assert len(figures) > 5


PROMISES = re.findall(r"^\| (.+?) \| (.+?) \|$", (ROOT / "docs" / "tested.md").read_text(), re.MULTILINE)[2:]


def test_the_tests_of_every_promise_are_there() -> None:
    assert len(PROMISES) > 20
    for promise, where in PROMISES:
        named = re.findall(r"`([\w/.-]+)`", where)
        assert named, promise
        assert not [path for path in named if not (ROOT / path).exists()], promise
        assert all(path.startswith(("tests/", "benchmarks/")) for path in named), promise


def test_every_folder_of_tests_is_for_a_promise() -> None:
    named = " ".join(where for _, where in PROMISES)
    folders = {file.parent.relative_to(ROOT).as_posix() for file in (ROOT / "tests").glob("*/test_*.py")}
    assert not [folder for folder in folders if f"`{folder}" not in named]
