"""Laws of prompt methods: padding is nothing, and a sequence is the same in one piece or in two."""

import functools
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

import peftc
from tests.support.models import tiny
from tests.support.prompts import METHODS, ids

ADAPTERS = ("prefix", "prompt", "p-tuning")


@functools.cache
def model(model_type: str) -> peftc.CompiledModel:
    specs = {name.replace("-", ""): METHODS[name]("CAUSAL_LM") for name in ADAPTERS}
    sizes: dict[str, Any] = {"n_positions": 64} if model_type == "gpt2" else {}
    torch.manual_seed(0)
    return peftc.compile(tiny(model_type, **sizes).double(), specs).eval()


def with_adapters(model_type: str, names: list[str]) -> peftc.CompiledModel:
    compiled = model(model_type)
    compiled.set_adapter([name.replace("-", "") for name in names])
    return compiled


def last_logits(compiled: peftc.CompiledModel, count: int, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return compiled(**inputs).logits[:, -count:]


active = st.lists(st.sampled_from(ADAPTERS), min_size=1, unique=True)
model_types = st.sampled_from(["llama", "gpt2", "bloom"])


@settings(max_examples=40, deadline=None)
@given(model_type=model_types, names=active, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_padded_row_is_the_row_alone(model_type: str, names: list[str], lengths: list[int]) -> None:
    compiled, width = with_adapters(model_type, names), max(lengths)
    tokens = ids(len(lengths), width)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    positions = {} if model_type == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    padded = last_logits(compiled, width, input_ids=tokens, attention_mask=mask, **positions)
    for row, length in enumerate(lengths):
        alone = last_logits(compiled, length, input_ids=tokens[row : row + 1, width - length :])
        torch.testing.assert_close(padded[row, width - length :], alone[0])


@settings(max_examples=40, deadline=None)
@given(model_type=model_types, names=active, length=st.integers(2, 9), cut=st.integers(1, 8), masked=st.booleans())
def test_two_pieces_are_the_whole(model_type: str, names: list[str], length: int, cut: int, masked: bool) -> None:
    compiled, cut = with_adapters(model_type, names), min(cut, length - 1)
    tokens = ids(2, length)
    whole = last_logits(compiled, length, input_ids=tokens)
    with torch.no_grad():
        first = compiled(input_ids=tokens[:, :cut], use_cache=True)
    torch.testing.assert_close(first.logits[:, -cut:], whole[:, :cut])
    mask = {"attention_mask": torch.ones_like(tokens)} if masked else {}
    rest = last_logits(compiled, length - cut, input_ids=tokens[:, cut:], past_key_values=first.past_key_values, **mask)
    torch.testing.assert_close(rest, whole[:, cut:])
