"""Mixed batches: rows that use 1 to 64 LoRA adapters, beside the bare model and peft; and training of 16 in one batch.

    python benchmarks/mixed_batch.py

Prefill is a forward of 16 tokens per row, decode the generation of 16 tokens after 4. The physical limit of a decoding
step is what has to be read: the ratio of weights and adapters to weights. Beside it the same products by hand: two batched
ones on the output of every linear, of factors that are stacked and sorted already. Times are CPU seconds of one thread.
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

R = 16
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


CASES = (
    *((prefill, 64, number) for number in (1, 4, 16, 64)),
    *((decode, 64, number) for number in (1, 4, 16, 64)),
    (decode, 16, 16),
)


def by_hand(base: LlamaForCausalLM, number: int, trained: bool = False) -> LlamaForCausalLM:
    """The base with the products of `number` adapters on all linears, for rows that are sorted by adapter. The factors of a
    site are two stacks; if they are `trained`, two parameters in the place of two for each adapter.
    """
    model = copy.deepcopy(base)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            down, up = torch.randn(number, module.in_features, R), torch.randn(number, R, module.out_features) * 1e-6
            if trained:
                down, up = torch.nn.Parameter(down), torch.nn.Parameter(up)
                module.own = torch.nn.ParameterList([down, up])

            def hook(_: Any, args: Any, y: Tensor, down: Tensor = down, up: Tensor = up) -> None:
                grouped = args[0].reshape(number, -1, args[0].shape[-1])
                y.view(number, -1, y.shape[-1]).baddbmm_(torch.bmm(grouped, down), up)

            module.register_forward_hook(hook)
    return model


def step(model: Any, embeddings: Tensor, **more: Any) -> Callable[[], None]:
    """Forward and backward on fixed input embeddings (rows, tokens, width)."""
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> None:
        model(inputs_embeds=embeddings, use_cache=False, **more).logits.square().mean().backward()
        for tensor in (embeddings, *own):
            tensor.grad = None

    return run


def training(base: LlamaForCausalLM, rounds: int) -> None:
    """Print a table of one step of 16 adapters, a row each. peft has no such step: it takes one for each adapter."""
    names = [f"a{i}" for i in range(16)]
    spec = peftc.LoraConfig(r=R, target_modules=TARGETS, init_lora_weights=False)
    compiled = peftc.compile(base, dict.fromkeys(names, spec)).train()
    table = Table(
        "tokens a row", "peftc", "to bare [quartiles]", "16 steps apart, to bare", title="training of 16 adapters"
    )
    for tokens in (8, 64):
        embeddings = torch.randn(16, tokens, base.config.hidden_size, requires_grad=True)

        def apart(embeddings: Tensor = embeddings) -> None:
            for i, name in enumerate(names):
                compiled.set_adapter(name)
                step(compiled, embeddings[i : i + 1].detach().requires_grad_())()
            compiled.set_adapter(names)

        compiled.set_adapter(names)
        runs = {
            "bare": step(base.train(), embeddings),
            "peftc": step(compiled, embeddings, adapter_names=names),
            "apart": apart,
        }
        seconds = paired(runs, rounds)
        ratios = [ratio(seconds, name, "bare") for name in ("peftc", "apart")]
        table.add_row(str(tokens), median_ms(seconds["peftc"]), *ratios)
    base.eval()
    Console(width=110).print(table)


def main(rounds: int = 5) -> None:
    """Run and print a table per shape."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for shape in SHAPES:
        base = llama(shape)
        spec = peftc.LoraConfig(r=R, target_modules=TARGETS, init_lora_weights=False)
        compiled = peftc.compile(base, {f"a{i}": spec for i in range(64)}).eval()
        config = peft.LoraConfig(r=R, target_modules=TARGETS, init_lora_weights=False)
        theirs: Any = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
        for i in range(1, 64):
            theirs.add_adapter(f"a{i}", config)
        theirs.eval()
        weights = sum(p.numel() for n, p in base.named_parameters() if "embed" not in n)
        own = sum(p.numel() for n, p in compiled.named_parameters() if ".a0." in n)
        table = Table(title=f"{shape}, r={R} on all linears, {rounds} rounds, 1 thread")
        columns = (
            "adapters",
            "peftc",
            "to bare [quartiles]",
            "to peft [quartiles]",
            "by hand, to bare",
            "bytes to bare",
        )
        for column in ("", *columns):
            table.add_column(column, justify="left" if not column else "right")
        for kind, rows, number in CASES:
            ids = torch.randint(3, 1000, (rows, 16))
            names = [f"a{row % number}" for row in range(rows)]
            runs = {
                "bare": kind(base, ids),
                "peft": kind(theirs, ids, adapter_names=names),
                "peftc": kind(compiled, ids, adapter_names=names),
                "by hand": kind(by_hand(base, number), ids),
            }
            seconds = paired(runs, rounds)
            ratios = [ratio(seconds, *pair) for pair in (("peftc", "bare"), ("peftc", "peft"), ("by hand", "bare"))]
            limit = f"{1 + number * own / weights:.2f}" if kind is decode else ""
            what = f"{kind.__name__}, {rows} rows"
            table.add_row(what, str(number), median_ms(seconds["peftc"]), *ratios, limit)
        Console(width=130).print(table)
    training(llama(next(iter(SHAPES))), rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
