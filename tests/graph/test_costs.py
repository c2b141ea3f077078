"""What a plan says that adapters cost against what a captured program does: FLOPs as torch counts them, bytes it reads."""

from typing import Any

import pytest

import peftc
from tests.support.costs import bytes_read, flops
from tests.support.programs import program_inputs, program_model

ROWS, LENGTH = 3, 7


@pytest.mark.slow
@pytest.mark.parametrize("passes", [(), peftc.program_passes()])
def test_linears_cost_what_the_plan_says(passes: Any) -> None:
    model = program_model("llama")
    spec = peftc.LoraConfig(r=5, target_modules="all-linear", rank_pattern={"down_proj": 3})
    inputs = program_inputs("llama", model, labels=False)
    program = peftc.compile(model, spec, capture="export", inputs=inputs, passes=passes).eval()
    given = program_inputs("llama", model, ROWS, LENGTH, labels=False)
    adapted, tokens = flops(program, given), ROWS * LENGTH
    with program.disable_adapter():
        bare = flops(program, given)
    assert adapted - bare == program.plan.costs.flops_per_token * tokens
    shapes = [p.shape for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    products = sum(2 * rows * columns for rows, columns in shapes) * tokens
    config = model.config
    heads, size = config.num_attention_heads, config.head_dim
    attention = 2 * 2 * ROWS * heads * LENGTH * LENGTH * size * config.num_hidden_layers
    assert bare - products in (0, attention)  # torch counts fused attention on some devices alone.


def test_an_adapter_reads_the_bytes_that_the_plan_says() -> None:
    model = program_model("llama")
    inputs = program_inputs("llama", model, labels=False)
    spec = peftc.LoraConfig(r=5, target_modules="all-linear")
    program = peftc.compile(model, spec, capture="export", inputs=inputs)
    with program.merged():
        bare = bytes_read(program)
    planned = sum(4 * param.numel for edit in program.plan.edits for param in edit.params)
    assert planned == program.plan.costs.gradient_bytes
    assert sum(p.nbytes for name, p in program.named_parameters() if "lora_" in name) == planned
    assert bare == sum(p.nbytes for p in model.parameters())
