"""Mixed batches: 64 rows that use 1, 4, 16 or 64 LoRA adapters, beside the bare model and peft.

    python benchmarks/mixed_batch.py

Prefill is a forward of 16 tokens per row, decode the generation of 16 tokens after 4. The physical limit of a decoding
step is what has to be read: the ratio of weights and adapters to weights. Times are CPU seconds of one thread.
"""

import copy
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
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from benchmarks.timing import median_ms, paired, ratio

ROWS, R = 64, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "SmolLM2's width, 8 layers": (576, 1536, 8, 9, 3),
    "width 2048, 2 layers": (2048, 5632, 2, 16, 8),
}


def llama(shape: str) -> LlamaForCausalLM:
    """A random Llama with a small vocabulary."""
    width, inner, layers, heads, kv = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=1024,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prefill(model: Any, ids: Tensor, **more: Any) -> Callable[[], object]:
    """One forward of the prompt."""

    def run() -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, **more).logits

    return run


def decode(model: Any, ids: Tensor, **more: Any) -> Callable[[], object]:
    """Greedy generation of 16 tokens."""
    mask = torch.ones_like(ids[:, :4])
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(input_ids=ids[:, :4], attention_mask=mask, **options, **more)


def main(rounds: int = 5) -> None:
    """Run and print a table per shape."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for shape in SHAPES:
        base = llama(shape)
        ids = torch.randint(3, 1000, (ROWS, 16))
        spec = peftc.LoraConfig(r=R, target_modules=TARGETS, init_lora_weights=False)
        compiled = peftc.compile(base, {f"a{i}": spec for i in range(64)}).eval()
        config = peft.LoraConfig(r=R, target_modules=TARGETS, init_lora_weights=False)
        theirs: Any = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
        for i in range(1, 64):
            theirs.add_adapter(f"a{i}", config)
        theirs.eval()
        weights = sum(p.numel() for n, p in base.named_parameters() if "embed" not in n)
        own = sum(p.numel() for n, p in compiled.named_parameters() if ".a0." in n)
        table = Table(title=f"{shape}: {ROWS} rows, r={R} on all linears, {rounds} rounds, 1 thread")
        for column in ("", "adapters", "peftc", "to bare [quartiles]", "to peft [quartiles]", "bytes to bare"):
            table.add_column(column, justify="left" if not column else "right")
        for name, kind in (("prefill", prefill), ("decode", decode)):
            for number in (1, 4, 16, 64):
                names = [f"a{row % number}" for row in range(ROWS)]
                runs = {
                    "bare": kind(base, ids),
                    "peft": kind(theirs, ids, adapter_names=names),
                    "peftc": kind(compiled, ids, adapter_names=names),
                }
                seconds = paired(runs, rounds)
                ratios = [ratio(seconds, "peftc", to) for to in ("bare", "peft")]
                limit = f"{1 + number * own / weights:.2f}" if name == "decode" else ""
                table.add_row(name, str(number), median_ms(seconds["peftc"]), *ratios, limit)
        Console(width=110).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
