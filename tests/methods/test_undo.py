"""What merging and unmerging leave, of each method here and in peft: docs/undo.md. `python -m tests.methods.test_undo`."""

import copy
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.coverage import Trial
from tests.support.interchange import quietly

PAGE = Path(__file__).parent.parent.parent / "docs" / "undo.md"
COVERAGE = PAGE.with_name("coverage.md")
QUICK = ("IA3", "LORA", "OFT")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

HEAD = """# Merging and undoing, beside PEFT

Each method that merges, on a tiny Llama with a trained adapter (`python -m tests.methods.test_undo`): how far the outputs
move when it is merged, relative to the largest, and how many of the base's numbers are others after one merge and one
unmerge; first in peft 0.21.2, then here, where a test holds the last to none. ✗: peft raises, or gives no finite number.

| type | float32: moved | | others after undoing | | bfloat16: moved | | others after undoing | |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
| | peft | peftc | peft | peftc | peft | peftc | peft | peftc |
"""


def merging() -> list[str]:
    """The types that docs/coverage.md has a mark of under `merge`."""
    rows = [line.split("|") for line in COVERAGE.read_text().splitlines() if line.startswith("| ")]
    place = [cell.strip() for cell in rows[0]].index("merge")
    return [cells[1].strip() for cells in rows[1:] if cells[place].strip() == "✓"]


def base_of(model: Any) -> dict[str, Tensor]:
    """The base's tensors by name, of a model of here or of peft."""
    adapters = ("lora_", "hada_", "lokr_", "default", "original_module")
    return {n: t.detach().clone() for n, t in model.named_parameters() if not any(part in n for part in adapters)}


def figures(trial: Trial, model: Any) -> tuple[float | None, float | None]:
    """How far outputs move when `model` is merged, and the share of the base's numbers that undoing leaves as others."""
    before = base_of(model)
    try:
        y = trial.logits(model).double()
        quietly(model.merge_adapter)
        moved = float((trial.logits(model).double() - y).abs().max() / y.abs().max())
        quietly(model.unmerge_adapter)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return None, None
    after = base_of(model)
    numbers = [(after[name], value) for name, value in before.items()]
    wrong = sum(int((new != old).sum()) for new, old in numbers)
    return moved if moved == moved else None, wrong / sum(old.numel() for _, old in numbers)


def row(name: str) -> dict[str, tuple[float | None, float | None]]:
    """The figures of a type, by dtype and whose."""
    found: dict[str, tuple[float | None, float | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(name, Path(folder))
        for said, dtype in DTYPES.items():
            found[f"{said} peft"] = figures(trial, copy.deepcopy(trial.theirs).to(dtype))
            found[f"{said} peftc"] = figures(trial, trial.ours().to(dtype))
    return found


def line(name: str, own: Mapping[str, tuple[float | None, float | None]]) -> str:
    cells: list[str] = []
    for dtype in DTYPES:
        pair = [own[f"{dtype} {whose}"] for whose in ("peft", "peftc")]
        cells += [*(shown(moved, "{:.0e}".format) for moved, _ in pair), *(shown(wrong, percent) for _, wrong in pair)]
    return f"| {name} | {' | '.join(cells)} |"


def shown(number: float | None, form: Callable[[float], str]) -> str:
    return "✗" if number is None else form(number) if number else "0"


def percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def test_the_page_has_a_row_for_each_that_merges() -> None:
    lines = PAGE.read_text().split(HEAD)[1].splitlines()
    assert [one.split("|")[1].strip() for one in lines] == merging()
    for one in lines:
        cells = [cell.strip() for cell in one.split("|")[2:-1]]
        assert (cells[3], cells[7]) == ("0", "0"), one


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in merging() if n not in QUICK)]
)
def test_undoing_leaves_every_bit_and_merging_no_more_than_rounding(name: str) -> None:
    own = row(name)
    for dtype, near in (("float32", 1e-5), ("bfloat16", 0.05)):
        moved, wrong = own[f"{dtype} peftc"]
        assert wrong == 0
        assert moved is not None
        assert moved <= near


if __name__ == "__main__":
    made: list[str] = []
    for one in merging():
        made.append(line(one, row(one)))
        print(made[-1], file=sys.stderr, flush=True)
    PAGE.write_text(HEAD + "\n".join(made) + "\n")
