"""Two commits beside each other: is anything slower than it was?

    python benchmarks/compare.py OLD NEW [ROUNDS]

Each commit is checked out in a folder of its own and measured by a process of its own (this file, run on that code); the
two take turns, in random order, in every round. The table has the median of the paired ratios new : old with the quartiles.
Times are CPU seconds of one thread. A commit is any name that git knows; `.` is the working tree.
"""

import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def llama(dtype: Any, layers: int = 4) -> Any:
    """A few layers of SmolLM2-135M's width, random and frozen."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=1024, **sizes)
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def step(dtype: Any, tokens: int, dropout: float = 0.0) -> Callable[[], None]:
    """A training step."""
    import torch

    import peftc

    spec = peftc.LoraConfig(r=16, target_modules="all-linear", lora_dropout=dropout)
    compiled = peftc.compile(llama(dtype), spec).train()
    embeddings = torch.randn(2, tokens, 576, dtype=dtype)

    def run() -> None:
        compiled(inputs_embeds=embeddings, use_cache=False).logits.float().square().mean().backward()
        compiled.zero_grad(set_to_none=True)

    return run


def decode(names: list[str] | None) -> Callable[[], None]:
    """Eight tokens generated, for one row or one adapter a row."""
    import torch

    import peftc

    spec = peftc.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    adapters = dict.fromkeys(dict.fromkeys(names or ["default"]), spec)
    compiled = peftc.compile(llama(torch.float32), adapters).eval()
    ids = torch.ones(len(names or [""]), 4, dtype=torch.long)
    more = {} if names is None else {"adapter_names": names}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return lambda: compiled.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)


def compiling() -> Callable[[], object]:
    """A Llama-70B shape on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftc

    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=80, **sizes))
    return lambda: peftc.compile(model, peftc.LoraConfig(target_modules="all-linear"))


def merging(dtype: Any) -> Callable[[], None]:
    """A merge and its undoing."""
    import torch

    import peftc

    with torch.no_grad():
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(4))).to(dtype)
    spec = peftc.LoraConfig(r=16, target_modules=["0", "1", "2", "3"], init_lora_weights=False)
    compiled = peftc.compile(model, spec)

    def run() -> None:
        compiled.merge_adapter()
        compiled.unmerge_adapter()

    return run


def switching() -> Callable[[], None]:
    """A hundred switches between two adapters."""
    import torch

    import peftc

    spec = peftc.LoraConfig(target_modules="all-linear")
    compiled = peftc.compile(llama(torch.float32), {"a": spec, "b": spec})

    def run() -> None:
        for _ in range(50):
            compiled.set_adapter("a")
            compiled.set_adapter("b")

    return run


def measures() -> dict[str, Callable[[], Callable[[], object]]]:
    """What is measured, by name: each makes what is run."""
    import torch

    return {
        "training step, float32, 2 × 32": lambda: step(torch.float32, 32),
        "training step, float32, 2 × 256": lambda: step(torch.float32, 256),
        "training step, float32, 2 × 64, dropout": lambda: step(torch.float32, 64, 0.1),
        "training step, bfloat16, 2 × 64": lambda: step(torch.bfloat16, 64),
        "decode, one row": lambda: decode(None),
        "decode, 16 adapters in 64 rows": lambda: decode([f"a{row % 16}" for row in range(64)]),
        "compile, 560 sites": compiling,
        "merge and unmerge, float32": lambda: merging(torch.float32),
        "merge and unmerge, bfloat16": lambda: merging(torch.bfloat16),
        "100 switches": switching,
    }


def worker() -> None:
    """Answer every line on stdin, the number of a measure, with the seconds that it takes once."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    makers, ready = list(measures().values()), dict[int, Callable[[], object]]()
    for line in sys.stdin:
        number = int(line)
        if number not in ready:
            ready = {number: makers[number]()}  # One at a time: the memory of others would be in its way.
            ready[number]()
        start = time.process_time()
        ready[number]()
        print(time.process_time() - start, flush=True)


def started(tree: Path) -> subprocess.Popen[str]:
    """A worker on the code in `tree`: what this file measures, as it is here, with the packages from there."""
    paths = [str(tree), str(ROOT / "benchmarks")]
    code = f"""
import importlib.util, sys
sys.path[:0] = {paths!r}
# Installed in place, rules have another name than their folder.
spec = importlib.util.spec_from_file_location("peftc_rules", {str(tree / "rules" / "__init__.py")!r},
                                              submodule_search_locations=[{str(tree / "rules")!r}])
sys.modules["peftc_rules"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import compare
compare.worker()
"""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)


def asked(process: subprocess.Popen[str], number: int) -> float:
    """The seconds of one run. Raises RuntimeError if the worker has died."""
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError("a worker died; run its commit's benchmarks by themselves to see why")
    return float(answer)


def main(old: str, new: str, rounds: int = 11) -> None:
    """Measure and print the table."""
    from rich.console import Console
    from rich.table import Table

    from benchmarks.timing import median_ms, ratio

    with tempfile.TemporaryDirectory() as folder:
        trees = {name: ROOT if name == "." else Path(folder) / str(n) for n, name in enumerate((old, new))}
        for name, tree in trees.items():
            if name != ".":
                subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, name], check=True)
        table = Table(title=f"{new} beside {old}: {rounds} rounds, CPU time of one thread")
        for column in ("", "old", "new", "new to old [quartiles]"):
            table.add_column(column, justify="left" if not column else "right")
        try:
            processes = {name: started(tree) for name, tree in trees.items()}
            order, turns = random.Random(0), list(processes)
            for number, name in enumerate(measures()):
                seconds: dict[str, list[float]] = {"old": [], "new": []}
                for _ in range(rounds):
                    order.shuffle(turns)
                    for turn in turns:
                        seconds["new" if turn == new else "old"].append(asked(processes[turn], number))
                table.add_row(name, *map(median_ms, seconds.values()), ratio(seconds, "new", "old"))
            for process in processes.values():
                process.kill()
        finally:
            for name, tree in trees.items():
                if name != ".":
                    subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
        Console(width=110).print(table)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
