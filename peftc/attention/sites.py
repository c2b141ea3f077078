"""What an attention module of transformers is as a site, and the ops that generated code calls there."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftc.graph.sites import Site
from peftc.specs.base import AdapterSpec


class AttentionSpec(AdapterSpec):
    """A spec of attention modules: `target_modules` is the last part of their names, `last` how many from the top.

    Rules for it declare `params` and `output(x, y, p)`: `x` are the hidden states, `y` what the attention gives. `p` has
    `attend(prompt)`, what the queries get from the keys and values of a prompt (1, length, width) alone, as (batch,
    tokens, heads · head_dim), and `project`, the attention's own projection of that.
    """

    excludes = False

    @property
    def last(self) -> int | None:
        """How many of the modules, counted from the last, are adapted; None if the spec leaves that open."""
        return None


@dataclass(frozen=True)
class AttentionSite(Site):
    """An attention module, for hidden states of this `width`."""

    width: int = 0


def unfit(module: nn.Module) -> str | None:
    """Why queries, keys and values of `module` can't be told, or None."""
    names = set(module._modules)
    if not ({"q_proj", "k_proj", "v_proj", "o_proj"} <= names or {"c_attn", "c_proj"} <= names):
        return f"{type(module).__name__} has no projections of the names that Llama's and GPT-2's have"
    if names & {"q_norm", "k_norm"}:
        return f"{type(module).__name__} normalises its queries"
    if "rotary_ndims" in vars(module):
        return f"{type(module).__name__} turns a part of its queries only"
    return None


def width_of(module: Any) -> int:
    """The width of the hidden states that an attention takes."""
    return module.q_proj.in_features if "q_proj" in module._modules else module.c_attn.nx


def queries(host: Any, hidden: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
    """The queries (batch, heads, tokens, head_dim) of an attention, turned by its positions (cosines and sines)."""
    packed = "c_attn" in host._modules
    query = _heads(host, host.c_attn(hidden).split(host.split_size, dim=-1)[0] if packed else host.q_proj(hidden))
    if positions is None:
        return query
    cos, sin = (value.unsqueeze(1) for value in positions)
    first, second = query.chunk(2, dim=-1)
    return query * cos + torch.cat([-second, first], dim=-1) * sin


def attended(host: Any, query: Tensor, prompt: Tensor) -> Tensor:
    """What queries get from a prompt (1, length, width) alone: (batch, tokens, heads · head_dim)."""
    prompt = prompt.to(query.dtype)
    if "c_attn" in host._modules:
        key, value = host.c_attn(prompt).split(host.split_size, dim=-1)[1:]
    else:
        key, value = host.k_proj(prompt), host.v_proj(prompt)
    key, value = _heads(host, key), _heads(host, value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (scores @ value).transpose(1, 2).flatten(2)


def projected(host: Any, x: Tensor) -> Tensor:
    """What an attention makes of what its heads give; GPT-2's is not projected, as in PEFT."""
    return host.o_proj(x) if "o_proj" in host._modules else x


def with_first(output: Any, first: Tensor) -> Any:
    """The output of an attention, a tensor or a tuple that begins with it, with another `first`."""
    if isinstance(output, Tensor):
        return first.to(output.dtype)
    return (first.to(output[0].dtype), *output[1:])


def first_of(output: Any) -> Tensor:
    """The hidden states in the output of an attention."""
    return output if isinstance(output, Tensor) else output[0]


def _heads(host: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, host.head_dim)).transpose(1, 2)
