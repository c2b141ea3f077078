"""Pages of plans: how large they are, how long they take to be made, and to be opened in Chromium.

    python benchmarks/page.py

LoRA r=16 on the seven linears of every layer, for the shapes of SmolLM2-135M, Llama-70B and Llama-405B, with the other
modules of the model. "Each layer another" has a rank of its own in every layer, so that no two rows are one. Times are
medians: of the process's CPU time, and of the wall time from opening a page until it is loaded and drawn.
"""

import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from playwright.sync_api import Browser
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from benchmarks.compile import SHAPES, TARGETS
from tests.support.browser import WHERE_FROM, chromium, loading_ms, opened

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def row(name: str, shape: dict[str, int], another: bool, browser: Browser | None, rounds: int) -> list[str]:
    """The figures of one page."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    layers = shape["num_hidden_layers"] if another else 0
    ranks = {rf"layers\.{layer}\..*": 8 + layer for layer in range(layers)}
    plan = peftc.plan(model, peftc.LoraConfig(r=16, target_modules=TARGETS, rank_pattern=ranks))
    made: list[float] = []
    page = plan.to_html(model=model)
    for _ in range(rounds):
        start = time.process_time()
        plan.to_html(model=model)
        made.append(1000 * (time.process_time() - start))
    loaded: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.html"
        file.write_text(page, encoding="utf-8")
        for _ in range(rounds if browser is not None else 0):
            assert browser is not None
            with opened(browser, file) as (tab, _, _):
                loaded.append(loading_ms(tab))
    opening = f"{statistics.median(loaded):.0f} ms" if loaded else WHERE_FROM
    sites = f"{len(plan.edits):,}"
    return [name, sites, f"{len(page.encode()) / 1000:,.0f} kB", f"{statistics.median(made):.0f} ms", opening]


def main(rounds: int = 7) -> None:
    """Print a table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    table = Table(title=f"Pages of plans, {rounds} rounds")
    for column in ("", "sites", "size", "made in", "opened in"):
        table.add_column(column, justify="left" if not column else "right")
    with chromium() as browser:
        for name, shape in {"SmolLM2-135M": SMOLLM2, **SHAPES}.items():
            table.add_row(*row(name, shape, False, browser, rounds))
        for name in SHAPES:
            table.add_row(*row(f"{name}, each layer another", SHAPES[name], True, browser, rounds))
    Console(width=100).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
