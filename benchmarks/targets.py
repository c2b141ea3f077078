"""Which architectures go where: capture, methods and runtimes, for sixteen small models, as docs/programs.md has it.

    python benchmarks/targets.py [family …] > table.md      (all of them: three quarters of an hour)

Every cell is run: a program is called with other sizes than it was captured with, an artefact is read back by its runtime.
It holds the largest difference to the live model over the largest output, or the number of the cause of the failure.
"""

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import peftc
from tests.support.adapters import perturb
from tests.support.programs import KINDS, cached_inputs, program_inputs, program_model, tensors

LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peftc.LoraConfig(**LORA),
    "DoRA": lambda: peftc.LoraConfig(**LORA, use_dora=True),
    "IA3": lambda: peftc.IA3Config(target_modules="all-linear", feedforward_modules=[]),
}
# What is exported of the other methods: those that are no products have no inputs, a prefix can't be merged.
FORMS = (("DoRA", "merged"), ("DoRA", "inside"), ("IA3", "merged"), ("IA3", "inside"), ("prefix", "inside"))
TASKS = {
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "whisper": "SEQ_2_SEQ_LM",
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
}
# No cache of keys and values is among what they are called with.
NO_CACHE = ("vit", "clip", "mamba")
# Its loop over tokens is unrolled.
FIXED = ("mamba",)


def spec_of(method: str, kind: str) -> Any:
    """The method's spec for a family."""
    if method == "prefix":
        return peftc.PrefixTuningConfig(task_type=TASKS.get(kind, "CAUSAL_LM"), num_virtual_tokens=3)
    return METHODS[method]()


def difference(one: Any, other: Any) -> str:
    """The largest difference of any output, over the largest output."""
    pairs = [(tensors(one)[name].float(), value.float()) for name, value in tensors(other).items()]
    largest, scale = max(float((a - b).abs().max()) for a, b in pairs), max(float(b.abs().max()) for _, b in pairs)
    return "0" if largest == 0 else f"{largest / scale:.0e}"


def attempt(run: Callable[[], str], causes: dict[str, int]) -> str:
    """What `run` gives, or a dash with the number of what it raises, which `causes` gets."""
    try:
        return run()
    except peftc.PeftcError as error:
        return f"– ({causes.setdefault(' '.join(str(error).split()), len(causes) + 1)})"


def captured(kind: str, method: str, passes: Any = ()) -> tuple[str, int, int]:
    """The difference of the program to modules, and its nodes bare and adapted."""
    model, spec = program_model(kind), spec_of(method, kind)
    takes_cache = method == "prefix" and TASKS.get(kind) != "SEQ_CLS" and kind not in NO_CACHE
    inputs = cached_inputs(kind, model) if takes_cache else program_inputs(kind, model)
    torch.manual_seed(0)
    live = perturb(peftc.compile(model, spec)).eval()
    program = peftc.compile(model, spec, capture="export", inputs=inputs, passes=passes).eval()
    program.load_state_dict(live.state_dict())
    others = program_inputs(kind, model, *((1, 8) if kind == "mamba" else (3, 11)))
    with torch.no_grad():
        found = difference(program(**others), live(**others))
    adapted = len(program.graph_of("").nodes)
    with program.disable_adapter():
        return found, len(program.graph_of("").nodes), adapted


def exported(kind: str, to: Any, adapters: Any, method: str = "LoRA") -> str:
    """The certificate's difference over its scale."""
    model = program_model(kind)
    torch.manual_seed(0)
    live = perturb(peftc.compile(model, spec_of(method, kind))).eval()
    inputs = program_inputs(kind, model, labels=False)
    with tempfile.TemporaryDirectory() as folder:
        sizes: Any = "fixed" if kind in FIXED else "open"
        made = live.export(folder, to=to, adapters=adapters, inputs=inputs, sizes=sizes)
    return f"{made.difference / max(made.scale, 1e-30):.0e}"


def row(kind: str, causes: dict[str, int]) -> list[str]:
    """The cells of one family."""
    counts: list[int] = []

    def lora() -> str:
        found, *nodes = captured(kind, "LoRA")
        counts.extend(nodes)
        return found

    found = attempt(lora, causes)
    cells = [kind, " → ".join(map(str, counts)), found]
    cells += [attempt(lambda name=name: captured(kind, name)[0], causes) for name in ("DoRA", "IA3", "prefix")]
    for to in ("pt2", "onnx"):
        cells += [
            attempt(lambda to=to, how=how: exported(kind, to, how), causes) for how in ("merged", "inside", "inputs")
        ]
    return cells


def other_methods(kind: str, causes: dict[str, int]) -> list[str]:
    """The cells of one family in the second table."""
    cells = [(to, how, method) for to in ("pt2", "onnx") for method, how in FORMS]
    return [kind, *(attempt(lambda cell=cell: exported(kind, *cell), causes) for cell in cells)]


def table(heads: list[str], row: Callable[[str, dict[str, int]], list[str]], kinds: Iterable[str]) -> None:
    """Print a table, each row when it is there, and the causes of failures under it."""
    causes: dict[str, int] = {}
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for kind in kinds:
        print(f"| {' | '.join(row(kind, causes))} |", flush=True)
    print("\n".join(["", *(f"{number}. {cause}" for cause, number in causes.items())]))


def main(kinds: list[str]) -> None:
    """Print both tables."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    forms = [f"{to} {how}" for to in ("pt2", "onnx") for how in ("merged", "inside", "inputs")]
    table(["family", "nodes", "LoRA", "DoRA", "IA3", "prefix", *forms], row, kinds or KINDS)
    print()
    others = [f"{to} {method} {how}" for to in ("pt2", "onnx") for method, how in FORMS]
    table(["family", *others], other_methods, kinds or KINDS)


if __name__ == "__main__":
    main(sys.argv[1:])
