"""The task: a shop's messages become JSON of one schema. The held-out ones have other wordings and other items."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

SYSTEM = "Turn the message into JSON with the keys intent, item, quantity and day."
FIELDS = ("intent", "item", "quantity", "day")


@dataclass(frozen=True)
class Example:
    """A message, and the JSON object it should become."""

    message: str
    answer: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """Of `total` answers: how many have exactly the schema's keys, all values right, and each value right."""

    total: int
    schema: int
    exact: int
    fields: dict[str, int]


def read_examples(part: Literal["train", "heldout"]) -> list[Example]:
    """The examples to train on, or those that are held out."""
    text = (files("peftc.demo") / "data" / f"schema_{part}.jsonl").read_text(encoding="utf-8")
    return [Example(**json.loads(line)) for line in text.splitlines()]


def parse(answer: str) -> dict[str, Any] | None:
    """The object an answer is, if it has the schema's keys and no others."""
    try:
        data = json.loads(answer)
    except json.JSONDecodeError:
        return None
    return data if isinstance(data, dict) and set(data) == set(FIELDS) else None


def score(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """How many answers are right."""
    pairs = [(parse(answer), example.answer) for answer, example in zip(answers, examples, strict=True)]
    return Score(
        total=len(pairs),
        schema=sum(got is not None for got, _ in pairs),
        exact=sum(got == wanted for got, wanted in pairs),
        fields={
            field: sum(got is not None and got[field] == wanted[field] for got, wanted in pairs) for field in FIELDS
        },
    )
