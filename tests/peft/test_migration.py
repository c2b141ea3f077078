"""The migration page, from docs/migration.yaml and the module itself. `python -m tests.peft.test_migration` writes it."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml

import peftc.peft
from peftc.peft.names import VERSION, kind_of, resolve
from tests.support.small import small_model

DOCS = Path(__file__).parent.parent.parent / "docs"
SECTIONS: list[dict[str, Any]] = yaml.safe_load((DOCS / "migration.yaml").read_text())
DOCUMENTED = {name for section in SECTIONS if "of" not in section for name in section.get("names", ())}


def page() -> str:
    """The page."""
    lines = [
        "# Coming from PEFT",
        "",
        f"Code written for `peft` ({VERSION}) runs on peftc: import from `peftc.peft`, call `peftc.peft.install()` first,",
        "or run `python -m peftc.peft script.py`. This page has every documented name, what it is here, and how it",
        "differs. It is made from [migration.yaml](migration.yaml) and checked against the module.",
        "",
        "Out of reach is code that patches PEFT's classes from outside (axolotl, unsloth and ms-swift do, in parts).",
    ]
    for section in SECTIONS:
        if "notes" in section:
            lines += ["", f"## {section['section']}", "", *(f"- {note}" for note in section["notes"])]
            continue
        lines += ["", f"## {section['section']}", "", "| name | here | how it differs |", "|---|---|---|"]
        lines += [f"| `{name}` | {row['here']} | {row['differs']} |" for name, row in section["names"].items()]
    for kind, title in (("to come", "Not yet: methods and variants to come"), ("refused", "Not served")):
        found = {
            name: why for name in sorted(peft.__all__) if (pair := kind_of("", name))[0] == kind and (why := pair[1])
        }
        lines += [
            "",
            f"## {title}",
            "",
            "They can be imported, and raise an error that says this when they are used.",
            "",
        ]
        if kind == "to come":
            lines += [", ".join(f"`{name}`" for name in found) + "."]
        else:
            lines += [f"- `{name}`: {why}." for name, why in found.items()]
    return "\n".join(lines) + "\n"


def test_the_page_is_what_the_table_and_the_module_say() -> None:
    assert (DOCS / "migration.md").read_text() == page()


@pytest.mark.parametrize("name", sorted(peft.__all__))
def test_every_name_is_served_and_documented_or_says_why_not(name: str) -> None:
    kind, why = kind_of("", name)
    value = getattr(peftc.peft, name)
    assert (kind == "served") == (name in DOCUMENTED)
    if kind != "served" and not name.isupper():
        with pytest.raises(peftc.PeftcError, match=why[:20]):
            value()


@pytest.mark.parametrize("section", [section for section in SECTIONS if "of" in section], ids=lambda s: s["of"])
def test_what_classes_are_said_to_have_is_there(section: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = small_model("llama", "LlamaForSequenceClassification", pad_token_id=0)
    assert model is not None
    adapted = peftc.peft.get_peft_model(model, peftc.peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    module, _, name = section["of"].rpartition(".")
    cls = resolve(module, name)
    instance = next(m for m in (adapted, *adapted.modules()) if isinstance(m, cls))
    missing = [name for name in section["names"] if name != "prompt_encoder" and not hasattr(instance, name)]
    assert not missing


if __name__ == "__main__":
    (DOCS / "migration.md").write_text(page())
