"""PEFT's methods and what was done with each here, as docs/coverage.md. `python -m tests.methods.test_table` writes it."""

import re
import sys
from pathlib import Path

import pytest
from peft.utils.peft_types import PeftType

import peftc
import peftc.peft
from peftc.registry import spec_classes
from peftc.specs.io import absent
from tests.support.coverage import CELLS, run

PAGE = Path(__file__).parent.parent.parent / "docs" / "coverage.md"
NAMES = sorted(member.value for member in PeftType)
# Those that the quick test does again, and what of them: an export takes longer than all the rest.
QUICK = ("LORA", "IA3", "PROMPT_TUNING", "TINYLORA")
CHEAP = tuple(cell for cell in CELLS if cell != "export")

HEAD = """# PEFT's methods, and what was done with each

The {count} types of peft 0.21.2 on a tiny Llama, by `python -m tests.methods.test_table`. A ✓ is not a claim: the cell was
done, and held, when this page was made (a slow test makes all of it again, a quick one a part). A number is a refusal,
whose words are below. With peft's defaults, but for sizes that a tiny model has not.

- *spec*: peft's `adapter_config.json` is a spec, every field known. *files in*: what peft trained and saved loads, every
  tensor and field known. *files out*: peft loads what is saved here, and computes the same.
- *forward*, *gradient*: outputs and gradients are peft's, within 1e-5 and 1e-4 of the largest number, in float32
  (C3A's gradients in the last layer only, as peft has no right ones of its inputs).
- *merge*: outputs stay. *undo*: `torch.equal`. *disk*: `merge_checkpoint`, loaded by transformers. *mixed*: three rows with
  an adapter each, and what each gives alone. *export*: a torch.export program with the adapter inside, which is compared.

| type | {cells} |
|---|{rule}
"""


def page(found: dict[str, dict[str, str]]) -> str:
    """The page, of what `found` has by type and cell."""
    said = {name: [cell for cell in own.values() if cell] for name, own in found.items()}
    reasons = list(dict.fromkeys(reason for name in NAMES for reason in said.get(name, ())))
    rows = [row(name, found[name], reasons) if name in found else f"| {name} |{' |' * len(CELLS)}" for name in NAMES]
    lines = [HEAD.format(count=len(NAMES), cells=" | ".join(CELLS), rule="---|" * len(CELLS)) + "\n".join(rows)]
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    lines += ["", "## Not there", "", "Loading the config of one of these says the same.", ""]
    lines += [f"- `{name}`: {why}." for name, why in sorted(absent().items())]
    return "\n".join(lines) + "\n"


def row(name: str, own: dict[str, str], reasons: list[str]) -> str:
    marks = [str(reasons.index(own[cell]) + 1) if own[cell] else "✓" for cell in CELLS]
    return f"| {name} | {' | '.join(marks)} |"


def marks_of(name: str) -> dict[str, str]:
    """The row of a type in the page, by cell."""
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    return dict(zip(CELLS, (cell.strip() for cell in line.split("|")[2:-1]), strict=True))


def test_every_type_is_there_or_named() -> None:
    assert set(absent()) | set(spec_classes()) >= set(NAMES)
    assert not set(absent()) & set(spec_classes())
    for name in NAMES:
        assert any(marks_of(name).values()) == (name in spec_classes()), name
    text = PAGE.read_text()
    assert all(f"- `{name}`: {why}.\n" in text for name, why in absent().items())


@pytest.mark.parametrize("name", sorted(absent()))
def test_loading_the_config_of_one_that_is_not_there_says_what_comes_closest(name: str) -> None:
    for load in (peftc.load_spec, peftc.peft.get_peft_config):
        with pytest.raises(peftc.SpecError, match=f"{name}.* has no rule yet: {re.escape(absent()[name])}"):
            load({"peft_type": name})


@pytest.mark.parametrize("name", QUICK)
def test_a_part_of_the_table_is_current(name: str) -> None:
    found, marks, text = run(name, CHEAP), marks_of(name), PAGE.read_text().splitlines()
    for cell, reason in found.items():
        assert (marks[cell] == "✓") == (not reason), f"{cell}: {reason}"
        assert not reason or f"{marks[cell]}. {reason}" in text


def test_the_page_is_what_its_rows_make() -> None:
    assert PAGE.read_text() == page(kept())
    assert kept().keys() == {name for name in NAMES if name in spec_classes()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name in spec_classes()])
def test_the_table_is_current(name: str) -> None:
    assert kept()[name] == run(name)


def kept() -> dict[str, dict[str, str]]:
    """What the page has now, by type and cell."""
    lines = PAGE.read_text().splitlines()
    said = dict(line.split(". ", 1) for line in lines if line.split(". ")[0].isdigit())
    marks = {name: marks_of(name) for name in NAMES if any(line.startswith(f"| {name} |") for line in lines)}
    return {
        name: {cell: said.get(mark, "") for cell, mark in own.items()}
        for name, own in marks.items()
        if name in spec_classes() and any(own.values())
    }


if __name__ == "__main__":
    # All of them, or those that are named and what the page lacks.
    made = kept() if sys.argv[1:] else {}
    for one in [name for name in NAMES if name in spec_classes() and (name in sys.argv or name not in made)]:
        made[one] = run(one)
        print(one, ", ".join(cell for cell, reason in made[one].items() if reason), file=sys.stderr, flush=True)
    PAGE.write_text(page(made))
