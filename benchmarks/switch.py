"""Switching between adapters on 560 sites (a Llama-70B shape on the meta device), with few and many others loaded.

    python benchmarks/switch.py

With one adapter a switch turns it off or on again, else it goes from one to another. The physical limit beside it: one
class assigned per site and four flags set, in the barest loop. Times are CPU microseconds per site and switch.
"""

import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
from rich.console import Console
from rich.table import Table

import peftc
from benchmarks.compile import TARGETS, meta_llama
from benchmarks.timing import paired, ratio

SITES = 560
OFTEN = 20  # Switches per measurement.


Run = tuple[Callable[[], None], int]  # Switches, and how many they are.


def in_peft(number: int) -> Run:
    """peft with `number` adapters."""
    config = peft.LoraConfig(r=16, target_modules=TARGETS)
    model: Any = peft.get_peft_model(meta_llama("70B"), config, adapter_name="a0", low_cpu_mem_usage=True)
    for i in range(1, number):
        model.add_adapter(f"a{i}", config, low_cpu_mem_usage=True)
    return toggle(model.base_model.enable_adapter_layers, model.base_model.disable_adapter_layers, model, number, 2)


def in_peftc(number: int) -> Run:
    """peftc with `number` adapters."""
    spec = peftc.LoraConfig(r=16, target_modules=TARGETS)
    model = peftc.compile(meta_llama("70B"), {f"a{i}": spec for i in range(number)})
    return toggle(lambda: model.enable_adapters(True), lambda: model.enable_adapters(False), model, number, OFTEN)


def cold(number: int) -> Run:
    """peftc with `number` adapters, of which each is as if it had not been active before."""
    spec = peftc.LoraConfig(r=16, target_modules=TARGETS)
    model = peftc.compile(meta_llama("70B"), {f"a{i}": spec for i in range(number)})

    def run() -> None:
        for i in range(OFTEN):
            model.program.made.layouts.clear()
            model.set_adapter(f"a{i % number}")

    return run, OFTEN


def toggle(on: Callable[[], Any], off: Callable[[], Any], model: Any, number: int, often: int) -> Run:
    """`often` switches."""
    first, second = (lambda: model.set_adapter("a0"), lambda: model.set_adapter(f"a{number - 1}"))
    pair = (off, on) if number == 1 else (first, second)

    def run() -> None:
        for i in range(often):
            pair[i % 2]()

    return run, often


def barest() -> Run:
    """What no switch can do without: a class for every site, and two parameters that stop and two that start training."""
    one, two = (type(name, (torch.nn.Linear,), {}) for name in "ab")
    modules = [one(1, 1, device="meta") for _ in range(SITES)]
    parameters = [torch.nn.Parameter(torch.empty(1, device="meta")) for _ in range(4 * SITES)]

    def run() -> None:
        for i in range(OFTEN):
            cls = (one, two)[i % 2]
            for module in modules:
                object.__setattr__(module, "__class__", cls)
            for position, parameter in enumerate(parameters):
                parameter.requires_grad = (position + i) % 2 == 0

    return run, OFTEN


def main(rounds: int = 15) -> None:
    """Run and print a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runs = {"barest loop": barest(), "peft, 1": in_peft(1), "peft, 16": in_peft(16)}
    runs |= {f"peftc, {number}": in_peftc(number) for number in (1, 16, 200)}
    runs["peftc, 16, cold"] = cold(16)
    seconds = paired({name: run for name, (run, _) in runs.items()}, rounds)
    each = {name: [s / runs[name][1] / SITES for s in own] for name, own in seconds.items()}
    table = Table(title=f"One switch, {SITES} sites, {rounds} rounds of {OFTEN} (peft: 2), 1 thread")
    for column in ("adapters", "per site", "to peft, 16 [quartiles]"):
        table.add_column(column, justify="left" if column == "adapters" else "right")
    for name, own in each.items():
        table.add_row(name, f"{1e6 * statistics.median(own):.2f} µs", ratio(each, name, "peft, 16"))
    Console(width=100).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
