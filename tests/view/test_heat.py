"""Pages of trained adapters: every norm in its cell, the largest in the darkest, and the spectra as they are."""

import json
from math import nan
from typing import Any

import pytest

from peftc.view.heat import STEPS, Change, adapter_page
from tests.support.pages import having, parsed, text_of

CHANGES = [
    Change("lm_head", 0.5, 1.0, (0.5,)),
    Change("model.layers.10.self_attn.q_proj", 8.0, 1.5, (6.4, 4.8), {"r": 2, "alpha": 4.0}),
    Change("model.layers.2.self_attn.q_proj", 4.0, 2.0, (3.2, 2.4), {"r": 2}),
    Change("model.layers.2.mlp.up_proj", 0.0, 0.0, (0.0, 0.0), {"r": 2}),
    Change("model.layers.2.mlp.down_proj"),
    Change("model.layers.3.mlp.down_proj", nan, nan, (nan, nan)),
]


def page(changes: list[Change] = CHANGES, **more: Any) -> str:
    facts = {"title": "adapter", "facts": [("method", "LORA")], "wrong": {}, "others": ()}
    return adapter_page(**{**facts, "changes": changes, **more})


def table(root: Any, number: int) -> list[list[str]]:
    """The cells of a map, with its heads."""
    own = [*having(root, "heat")][number]
    return [[text_of(cell) for cell in row] for row in own.iter("tr")]


def test_the_map_has_the_layers_in_order_and_what_is_outside_at_its_end() -> None:
    root = parsed(page())
    assert table(root, 0) == [
        ["", "self_attn.q_proj", "mlp.up_proj"],
        ["layer 2", "4", "0"],
        ["layer 10", "8", ""],
    ]
    assert table(root, 1) == [["", "lm_head"], ["outside of layers", "0.5"]]
    steps = {text_of(cell): cell.get("class") for cell in root.iter("td") if cell.get("class")}
    assert steps == {"4": "h4", "0": "h0", "8": f"h{STEPS - 1}", "0.5": "h0"}


def test_every_cell_finds_its_spectrum() -> None:
    root = parsed(page())
    (data,) = (json.loads(script.text or "") for script in root.iter("script") if script.get("type"))
    found = {text_of(button): data[int(button.get("data-n", ""))] for button in root.iter("button")}
    assert found["8"] == ["model.layers.10.self_attn.q_proj", 8.0, 1.5, [6.4, 4.8]]
    assert found["0.5"] == ["lm_head", 0.5, 1.0, [0.5]]
    assert len(found) == len(data) == 4


def test_what_is_not_told_is_in_the_table_of_sites() -> None:
    root = parsed(page(others=["lm_head.weight 64×32"]))
    (rows,) = (
        [[text_of(cell) for cell in row] for row in own.iter("tr")]
        for own in root.iter("table")
        if not own.get("class")
    )
    assert rows[0] == ["site", "r", "alpha", "norm", "effective rank"]
    assert ["model.layers.10.self_attn.q_proj", "2", "4", "8", "1.5"] in rows
    assert ["model.layers.2.mlp.down_proj", "–", "–", "–", "–"] in rows
    assert ["model.layers.3.mlp.down_proj", "–", "–", "nan", "nan"] in rows
    assert "lm_head.weight 64×32" in text_of(root)


def test_a_method_whose_changes_are_no_products() -> None:
    root = parsed(page([Change("model.layers.2.mlp.down_proj", facts={"parameters": 12})]))
    assert not list(having(root, "heat"))
    assert "The files don’t tell" in text_of(root)
    assert len(list(root.iter("script"))) == 1


def test_damage_comes_first() -> None:
    text = page(wrong={"damaged": "adapter_model.safetensors: its bytes are others", "another base": None})
    root = parsed(text)
    assert [text_of(note) for note in having(root, "bad")] == [
        "damaged adapter_model.safetensors: its bytes are others"
    ]
    assert text.index('class="bad"') < text.index('id="heat"')


@pytest.mark.parametrize("nasty", ["</script><script>alert(1)</script>", "<b>'\"&"])
def test_names_are_text_here_too(nasty: str) -> None:
    text = page(
        [Change(f"layers.1.{nasty}", 1.0, 1.0, (1.0,), {nasty: nasty})],
        title=nasty,
        others=[nasty],
        wrong={nasty: nasty},
    )
    root = parsed(text)
    assert len(list(root.iter("script"))) == 2
    (data,) = (json.loads(script.text or "") for script in root.iter("script") if script.get("type"))
    assert data[0][0] == f"layers.1.{nasty}"
    assert nasty in "".join(root.itertext())
