"""Fenced blocks of documents, and what those of README.md and docs/ find when they run."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import peftc
from tests.support.adapters import lora, perturb
from tests.support.models import llama, token_ids

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Block:
    """A fenced block of a document: its section, its language, its text, and the line at which that begins."""

    section: str
    language: str
    text: str
    line: int


def blocks(document: str, language: str) -> list[Block]:
    """The blocks of `language` in a document, in order."""
    found: list[Block] = []
    section, fence, begin, lines = "", None, 0, list[str]()
    for number, line in enumerate((ROOT / document).read_text().splitlines(keepends=True), 1):
        if fence is None and line.startswith("```"):
            fence, begin, lines = line.strip("`\n"), number + 1, []
        elif fence is not None and line.startswith("```"):
            found.append(Block(section, fence, "".join(lines), begin))
            fence = None
        elif fence is not None:
            lines.append(line)
        elif line.startswith("## "):
            section = line.removeprefix("## ").strip()
    return [block for block in found if block.language == language]


def section(document: str, heading: str) -> str:
    """The text under a heading of a document, up to the next one."""
    return (ROOT / document).read_text().partition(f"\n{heading}\n")[2].partition("\n#")[0]


def run(document: str, own: list[Block], given: dict[str, Any]) -> ModuleType:
    """Run blocks one after the other, in a module: pickles look classes up in theirs. Errors name the document's line."""
    module = ModuleType("code_of_a_document")
    sys.modules[module.__name__] = module
    vars(module).update(given)
    try:
        for block in own:
            code = compile("\n" * (block.line - 1) + block.text, document, "exec")
            exec(code, module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def stage(folder: Path) -> dict[str, Any]:
    """What blocks take for granted: a model and what it is called with, specs; in `folder`, its checkpoint and adapters."""
    model, ids = llama(), token_ids(3, 8, 64)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    for name, seed in (("adapter", 1), ("another", 2)):
        torch.manual_seed(seed)
        perturb(peftc.compile(model, lora("q_proj", "v_proj", task_type="CAUSAL_LM"))).save_pretrained(folder / name)
    mask = torch.ones_like(ids)
    return {
        "peftc": peftc,
        "torch": torch,
        "model": model,
        "spec": lora("q_proj", "v_proj", task_type="CAUSAL_LM"),
        "lora": lora("q_proj", "v_proj", task_type="CAUSAL_LM"),
        "ids": ids,
        "mask": mask,
        "labels": ids,
        "inputs": {"input_ids": ids, "attention_mask": mask},
        "batch": {"input_ids": ids, "attention_mask": mask, "labels": ids},
    }
