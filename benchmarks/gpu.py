"""On a GPU: exactness of what adapters do there, and the time and memory of a training step and of decoding, beside peft.

    python benchmarks/gpu.py

A Llama of width 2048 with 16 layers in bfloat16 and LoRA of rank 16 on its seven linears; a step of 4 × 512 tokens,
decoding of 64 tokens for 8 rows. Times are wall-clock between CUDA events, interleaved; memory is the peak over a step.
"""

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from benchmarks.timing import paired, ratio

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    """A random one on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def clock() -> float:
    """Seconds, when all that was asked of the GPU is done."""
    import time

    torch.cuda.synchronize()
    return time.perf_counter()


def step(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """Forward, backward, and an optimiser's step on what trains."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> object:
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
        return None

    return run


def decode(model: Any, ids: torch.Tensor, **more: Any) -> Callable[[], object]:
    """Greedy generation of 64 tokens."""
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return lambda: model.generate(input_ids=ids, attention_mask=mask, **options, **more)


def exactness(base: Any, ids: torch.Tensor) -> list[tuple[str, str]]:
    """What must hold to the bit, or to a rounding."""
    compiled = peftc.compile(base, {f"a{i}": peftc.LoraConfig(r=16, target_modules=TARGETS) for i in range(4)}).eval()
    found: list[tuple[str, str]] = []
    with torch.no_grad():
        bare = base.eval()(ids).logits
        found.append(("a fresh adapter is the base, bit for bit", str(torch.equal(compiled(ids).logits, bare))))
        for parameter in compiled.parameters():
            if parameter.dtype is torch.float32:
                parameter.add_(0.01 * torch.randn_like(parameter))
        y = compiled(ids).logits
        compiled.merge_adapter()
        error = float((compiled(ids).logits - y).abs().max() / y.abs().max())
        compiled.unmerge_adapter()
        found.append(("merged and not, largest difference / largest logit (bfloat16: 2^-8 = 0.004)", f"{error:.4f}"))
        found.append(("unmerged again, bit for bit", str(torch.equal(compiled(ids).logits, y))))
        rows = compiled(ids, adapter_names=["a0", "a1", "__base__", "a2"]).logits
        compiled.set_adapter("a1")
        error = float((rows[1] - compiled(ids).logits[1]).abs().max() / y.abs().max())
        found.append(("a row of a mixed batch and alone, likewise", f"{error:.4f}"))
        with compiled.disable_adapter():
            found.append(("disabled, bit for bit", str(torch.equal(compiled(ids).logits, bare))))
    counted: list[Any] = []
    torch._dynamo.reset()

    def backend(graph: Any, example: Any) -> Any:
        counted.append(graph)
        return graph.forward

    with torch.no_grad():
        run = torch.compile(compiled.base, backend=backend, fullgraph=True)
        for name in ("a0", "a1", "a2", "a3"):
            compiled.set_adapter(name)
            compiled.set_scale(name, 0.5)
            run(ids)
    found.append(("graphs for four adapters under torch.compile(fullgraph=True)", str(len(counted))))
    return found


def main(rounds: int = 7) -> None:
    """Run and print two tables."""
    warnings.simplefilter("ignore")
    console = Console(width=130)
    base = llama()
    ids = torch.randint(3, 30000, (4, 512), device="cuda")
    name = torch.cuda.get_device_name()
    table = Table(title=f"{name}, torch {torch.__version__}: what must hold")
    for column in ("", "found"):
        table.add_column(column)
    for row in exactness(base, ids[:, :64]):
        table.add_row(*row)
    console.print(table)
    compiled = peftc.compile(base, peftc.LoraConfig(r=16, target_modules=TARGETS)).train()
    models: dict[str, Any] = {"bare": copy.deepcopy(base).train(), "peftc": compiled}
    for parameter in models["bare"].parameters():
        parameter.requires_grad_(False)
    models["bare"].lm_head.requires_grad_(True)
    try:
        import peft

        config = peft.LoraConfig(r=16, target_modules=TARGETS)
        models["peft"] = peft.get_peft_model(copy.deepcopy(base), config).train()
    except ImportError:
        console.print("peft is not installed here")
    peaks: dict[str, float] = {}
    for key, model in models.items():
        run = step(model, ids)
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peaks[key] = (torch.cuda.max_memory_allocated() - before) / 2**20
    steps = paired({key: step(model, ids) for key, model in models.items()}, rounds, clock)
    for model in models.values():
        model.eval()
    decoded = paired({key: decode(model, ids[:2, :32].repeat(4, 1)) for key, model in models.items()}, rounds, clock)
    table = Table(title="ratio to bare (its head alone trains), median [quartiles]")
    for column in ("", "step", "decode", "peak of a step, MiB"):
        table.add_column(column)
    for key in models:
        table.add_row(key, ratio(steps, key, "bare"), ratio(decoded, key, "bare"), f"{peaks[key]:.0f}")
    if "peft" in models:
        table.add_row("peftc to peft", ratio(steps, "peftc", "peft"), ratio(decoded, "peftc", "peft"), "")
    console.print(table)


if __name__ == "__main__":
    main()
