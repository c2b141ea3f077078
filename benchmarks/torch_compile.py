"""Under `torch.compile(fullgraph=True)` with inductor: a training step, one token's forward, and swaps of adapters.

    python benchmarks/torch_compile.py

Four layers of SmolLM2's width, LoRA r=16 on their 28 linears; CPU seconds of one thread, eager and compiled. Swaps: how
many graphs are compiled while 20 swaps go round among four adapters, and while files are put in the place of one.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
import peftc.peft
from benchmarks.timing import median_ms, paired, ratio
from benchmarks.train_step import step

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIELDS: dict[str, Any] = {"r": 16, "target_modules": TARGETS, "init_lora_weights": False}


def llama() -> LlamaForCausalLM:
    """Four random layers of SmolLM2's width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1024,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def token(model: Any, embeddings: Tensor) -> Callable[[], Tensor]:
    """One token's forward without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return model(inputs_embeds=embeddings, use_cache=False).logits

    return run


def times(rounds: int) -> Table:
    """Eager and compiled, of bare, peft and peftc."""
    torch.compiler.reset()
    base = llama()
    models: dict[str, Any] = {
        "bare": base,
        "peft": peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**FIELDS)),
        "peftc": peftc.compile(base, peftc.LoraConfig(**FIELDS)).base,
    }
    models |= {f"{name}, compiled": torch.compile(model, fullgraph=True) for name, model in models.items()}
    table = Table(title=f"{rounds} rounds, 1 thread")
    for column in ("", "", "median CPU time", "to bare, eager [quartiles]", "to bare, compiled", "to peft, compiled"):
        table.add_column(column, justify="left" if not column else "right")
    for what, make, shape in (("step, 2 × 64 tokens", step, (2, 64, 576)), ("one token", token, (1, 1, 576))):
        embeddings = torch.randn(shape, requires_grad=make is step)
        seconds = paired({name: make(model, embeddings) for name, model in models.items()}, rounds)
        for name in models:
            ratios = [ratio(seconds, name, to) for to in ("bare", "bare, compiled", "peft, compiled")]
            table.add_row(what, name, median_ms(seconds[name]), *(ratios if "compiled" in name else ratios[:1]))
    return table


def counted(run: Callable[[], object]) -> str:
    """Graphs compiled and breaks counted while this runs."""
    counters.clear()
    run()
    return f"{counters['stats'].get('unique_graphs', 0)}, {sum(counters['graph_break'].values())}"


def swaps() -> Table:
    """Graphs compiled by swaps, of peft and of peftc."""
    embeddings, names = torch.randn(1, 8, 576), [f"a{i}" for i in range(4)]
    table = Table("graphs, breaks", "peft", "peftc")
    rows: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for r in (4, 8, 16):
            other = peft.get_peft_model(llama(), peft.LoraConfig(**{**FIELDS, "r": r, "lora_alpha": 2 * r}))
            other.save_pretrained(f"{folder}/{r}")
        for of in ("peft", "peftc"):
            rows.setdefault("first call", []).append(_first_and_swaps(of, embeddings, names, rows))
            _hot(of, embeddings, folder, rows)
    for what, numbers in rows.items():
        table.add_row(what, *numbers)
    return table


def _first_and_swaps(of: str, embeddings: Tensor, names: list[str], rows: dict[str, list[str]]) -> str:
    torch.compiler.reset()
    if of == "peft":
        model: Any = peft.get_peft_model(llama(), peft.LoraConfig(**FIELDS), names[0])
        for name in names[1:]:
            model.add_adapter(name, peft.LoraConfig(**FIELDS))
        run = token(torch.compile(model, fullgraph=True), embeddings)
    else:
        model = peftc.compile(llama(), {name: peftc.LoraConfig(**FIELDS) for name in names})
        run = token(torch.compile(model.base, fullgraph=True), embeddings)
    first = counted(run)

    def swap() -> None:
        for i in range(20):
            model.set_adapter(names[i % 4])
            torch.testing.assert_close(run(), token(model, embeddings)(), rtol=1e-4, atol=1e-4)

    rows.setdefault("20 swaps among 4 adapters", []).append(counted(swap))
    return first


def _hot(of: str, embeddings: Tensor, folder: str, rows: dict[str, list[str]]) -> None:
    torch.compiler.reset()
    here: Any = peft if of == "peft" else peftc.peft
    model = here.PeftModel.from_pretrained(llama(), f"{folder}/16")
    prepare, hot = prepare_model_for_compiled_hotswap, hotswap_adapter
    if of == "peftc":
        prepare, hot = peftc.peft.prepare_model_for_compiled_hotswap, peftc.peft.hotswap_adapter
    prepare(model, target_rank=16)
    run = token(torch.compile(model, fullgraph=True), embeddings)
    run()
    for what, ranks in (
        ("hot swaps of files, equal rank", (16, 16)),
        ("hot swaps of files, ranks 4 and 8 padded", (4, 8)),
    ):

        def swap(ranks: tuple[int, ...] = ranks) -> None:
            for r in ranks:
                hot(model, f"{folder}/{r}", adapter_name="default")
                alone = here.PeftModel.from_pretrained(llama(), f"{folder}/{r}")
                torch.testing.assert_close(run(), token(alone, embeddings)(), rtol=1e-4, atol=1e-4)

        rows.setdefault(what, []).append(counted(swap))


def main(rounds: int = 9) -> None:
    """Run and print both tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    Console(width=130).print(swaps())
    Console(width=130).print(times(rounds))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
