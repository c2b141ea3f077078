"""Merging and unmerging rank-16 LoRA in 16 linear layers: time, memory, and what is left of the weights.

    python benchmarks/merge.py
    python benchmarks/merge.py --whole 5    # SmolLM2-135M with adapters on all its linears

The limit is one read and one write of the weights. `keep` makes new tensors and keeps the old ones, `residual` works in
place. Times are CPU seconds of one thread. Memory is the rise of the peak over what was there before, in a process of its
own. Bits: the share of weights that differ from the original after that many cycles.
"""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import peftc
from benchmarks.timing import median_ms, paired, ratio
from peftc.demo import smollm2

WIDTH, LAYERS = 2048, 16
NAMES = [str(i) for i in range(LAYERS)]
KINDS = ("peft", "keep", "residual")


def linears(dtype: torch.dtype, width: int = WIDTH, layers: int = LAYERS) -> nn.Sequential:
    """Gaussian weights of the size that language models have."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


def adapted(kind: str, model: nn.Module, names: Any = NAMES) -> Any:
    """The model with an adapter whose delta is a tenth of the weights, if these are as large as those of `linears`."""
    if kind == "peft":
        made: Any = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=names))
    else:
        spec = peftc.LoraConfig(r=16, lora_alpha=16, target_modules=names)
        made = peftc.compile(model, spec, inplace=kind == "residual")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02 * 0.1 / 4 if "lora_B" in name else 1.0)
    return made


def merging(kind: str, model: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """How to merge and to unmerge it."""
    if kind == "peft":
        return model.merge_adapter, model.unmerge_adapter
    return lambda: model.merge_adapter(undo=kind), model.unmerge_adapter


def both(merge: Callable[[], None], unmerge: Callable[[], None]) -> None:
    """There and back."""
    merge()
    unmerge()


def peak(kind: str, dtype: str) -> None:
    """Print the rise of the resident peak (MiB) of one merge, and the bytes that undoing it needs, by weight bytes."""
    model = adapted(kind, linears(getattr(torch, dtype)))
    merge, _ = merging(kind, model)
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # Start the peak anew.
    before = field("VmRSS")
    merge()
    risen, kept = field("VmHWM") - before, 0.0
    if kind == "residual":
        log = sum(chunk.nbytes for item in model.program.merge.replaced for chunk in item.log)
        kept = log / sum(p.nbytes for name, p in model.named_parameters() if "lora_" not in name)
    print(f"{risen / 1024:.0f} {kept:.4f}")


def differing(kind: str, dtype: torch.dtype, cycles: int) -> str:
    """The share of weights that differ after `cycles`."""
    model = linears(dtype, 512, 1)
    before = model[0].weight.detach().clone()
    made = adapted(kind, copy.deepcopy(model), ["0"])
    merge, unmerge = merging(kind, made)
    for _ in range(cycles):
        merge()
        unmerge()
    after = next(p for name, p in made.named_parameters() if "lora_" not in name)
    return f"{(after != before).double().mean().item():.1%}"


def whole(rounds: int = 5) -> None:
    """Print a table of SmolLM2-135M, 210 linears of its own weights."""
    base = smollm2.load_base(None)
    table = Table(title=f"SmolLM2-135M, LoRA r=16 on 210 linears, {rounds} rounds, 1 thread")
    for column in ("", "merge and unmerge", "to one copy [quartiles]", "weights that differ after 1"):
        table.add_column(column, justify="left" if not column else "right")
    for dtype in (torch.float32, torch.bfloat16):
        base = base.to(dtype)
        models = {kind: adapted(kind, copy.deepcopy(base), "all-linear") for kind in KINDS}
        linears = [m.weight for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        copies = [weight.clone() for weight in linears]

        def copying(linears: list[Tensor] = linears, copies: list[Tensor] = copies) -> None:
            with torch.no_grad():
                for a, b in zip(linears, copies, strict=True):
                    b.copy_(a)

        runs = {"read and write": copying}
        runs |= {kind: partial(both, *merging(kind, model)) for kind, model in models.items()}
        seconds = paired(runs, rounds)
        for name in runs:
            bits = changed(base, models[name]) if name in models else ""
            told = (median_ms(seconds[name]), ratio(seconds, name, "read and write"), bits)
            table.add_row(f"{name}, {str(dtype)[6:]}", *told)
    Console(width=110).print(table)


def changed(base: nn.Module, model: Any) -> str:
    """The share of the weights of linears in `model` that are not those of `base`."""
    before = {n: m.weight for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    after = {n.removeprefix("base_model.model.").removeprefix("base."): p for n, p in after.items()}
    differ = sum(int((after[f"{name}.weight"] != weight).sum()) for name, weight in before.items())
    return f"{differ / sum(weight.numel() for weight in before.values()):.2%}"


def main(rounds: int = 7) -> None:
    """Run and print a table per dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        models = {kind: adapted(kind, linears(dtype)) for kind in KINDS}
        source, target = linears(dtype), linears(dtype)
        size = sum(p.nbytes for p in source.parameters())

        def copying(source: nn.Sequential = source, target: nn.Sequential = target) -> None:
            with torch.no_grad():
                for a, b in zip(source.parameters(), target.parameters(), strict=True):
                    b.copy_(a)

        calls = {kind: merging(kind, model) for kind, model in models.items()}
        runs = {"read and write": copying}
        for kind, (merge, unmerge) in calls.items():
            runs[f"{kind}: both ways"] = partial(both, merge, unmerge)
        seconds = paired(runs, rounds)
        table = Table(title=f"{dtype}, {LAYERS} × {WIDTH}², {size >> 20} MiB, {rounds} rounds, 1 thread")
        for column in (
            "",
            "merge and unmerge",
            "to one copy [quartiles]",
            "peak",
            "log",
            "bits 1",
            "10",
            "1,000 cycles",
        ):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row("read and write", median_ms(seconds["read and write"]), "1", "", "", "", "", "")
        for kind in KINDS:
            name = f"{kind}: both ways"
            command = [sys.executable, __file__, "--peak", kind, str(dtype).removeprefix("torch.")]
            risen, log = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            bits = [differing(kind, dtype, cycles) for cycles in (1, 10, 1000)]
            share = f"{float(log):.1%}" if kind == "residual" else ""
            row = (median_ms(seconds[name]), ratio(seconds, name, "read and write"), f"{risen} MiB", share)
            table.add_row(kind if kind == "peft" else f"peftc, {kind}", *row, *bits)
        Console(width=130).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--peak"]:
        peak(*sys.argv[2:4])
    elif sys.argv[1:2] == ["--whole"]:
        whole(*map(int, sys.argv[2:3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
