"""A training step with adapters on other layers than linears, and with IA3: bare, peft and peftc.

    python benchmarks/layer_kinds.py

LoRA of rank 16 on one kind of layer each: embeddings, convolutions, GPT-2's transposed linears, fused experts; and IA3 and
DoRA on linears. Bare is the frozen model with gradients to its first floating-point input where it has one, else to a
parameter that all adapters come after. Times are CPU seconds of one thread.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import peftc
from benchmarks.timing import median_ms, paired, ratio
from benchmarks.train_step import small_llama


@dataclass(frozen=True)
class Case:
    """What is measured: a model, its inputs, the method and its options, and the parameter that bare has a gradient of."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Tensor]]
    method: str
    options: Mapping[str, Any]
    learns: str | None = None


class Convolutions(nn.Module):
    """Four convolutions of 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)))

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 64, height, width)."""
        return self.layers(pixels)


def gpt2() -> nn.Module:
    """Four layers of width 576, whose linears are Conv1D."""
    return GPT2LMHeadModel(GPT2Config(n_embd=576, n_layer=4, n_head=9, vocab_size=1024, n_positions=256))


def mixtral() -> nn.Module:
    """Two layers with four experts each, two of them for a token."""
    config = MixtralConfig(
        hidden_size=576,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1024,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config)


def hidden() -> Mapping[str, Tensor]:
    """Embeddings (2, 64, 576)."""
    return {"inputs_embeds": torch.randn(2, 64, 576, requires_grad=True)}


def tokens() -> Mapping[str, Tensor]:
    """Ids (2, 64)."""
    return {"input_ids": torch.randint(0, 1024, (2, 64))}


EXPERTS = ["gate_up_proj", "down_proj"]
LORA = {"r": 16}
CASES = {
    "LoRA on linears": Case(small_llama, hidden, "Lora", {**LORA, "target_modules": "all-linear"}),
    "LoRA on an embedding": Case(
        small_llama, tokens, "Lora", {**LORA, "target_modules": ["embed_tokens"]}, "model.embed_tokens.weight"
    ),
    "LoRA on Conv1D": Case(gpt2, hidden, "Lora", {**LORA, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "LoRA on Conv2d": Case(
        Convolutions,
        lambda: {"pixels": torch.randn(2, 64, 32, 32, requires_grad=True)},
        "Lora",
        {**LORA, "target_modules": ["0", "1", "2", "3"]},
    ),
    "LoRA on experts": Case(
        mixtral, hidden, "Lora", {**LORA, "target_modules": [], "target_parameters": [f"experts.{n}" for n in EXPERTS]}
    ),
    "IA3 on linears": Case(
        small_llama,
        hidden,
        "IA3",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "DoRA on linears": Case(small_llama, hidden, "Lora", {**LORA, "use_dora": True, "target_modules": "all-linear"}),
}


def step(model: Any, inputs: Mapping[str, Tensor]) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        output = model(**inputs)
        (output if isinstance(output, Tensor) else output.logits).float().square().mean().backward()
        for tensor in (*inputs.values(), *model.parameters()):
            tensor.grad = None

    return run


def main(rounds: int = 11) -> None:
    """Run and print a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table(title=f"one training step, {rounds} rounds, 1 thread")
    for column in ("", "dtype", "bare", "peft, to bare [quartiles]", "peftc, to bare", "peftc, to peft"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, case in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            base = case.model().to(dtype).requires_grad_(False)
            inputs = {key: _like(value, dtype) for key, value in case.inputs().items()}
            compiled = peftc.compile(base, getattr(peftc, f"{case.method}Config")(**case.options)).train()
            config = getattr(peft, f"{case.method}Config")(**case.options)
            theirs = peft.get_peft_model(copy.deepcopy(base), config).train()
            bare = copy.deepcopy(base).train()
            if case.learns is not None:
                bare.get_parameter(case.learns).requires_grad_()
            runs = {"bare": step(bare, inputs), "peft": step(theirs, inputs), "peftc": step(compiled, inputs)}
            seconds = paired(runs, rounds)
            ratios = (ratio(seconds, "peft", "bare"), ratio(seconds, "peftc", "bare"), ratio(seconds, "peftc", "peft"))
            table.add_row(name, str(dtype).removeprefix("torch."), median_ms(seconds["bare"]), *ratios)
    Console(width=140).print(table)


def _like(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype).requires_grad_() if value.is_floating_point() else value


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
