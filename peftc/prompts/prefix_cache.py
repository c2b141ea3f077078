"""Trained keys and values in transformers' caches. Imported when a prefix is first used: transformers takes its time."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from peftc.errors import AdapterError
from peftc.graph.region import invoke
from peftc.prompts.virtual import Progress, mark, rows, tensors_in
from peftc.rewrite.hosts import Unbound


class Prefix(NamedTuple):
    """A prefix encoder and how its rows (n, layers · 2 · heads · head_dim) are read; `halves` is 2 for SEQ_2_SEQ_LM."""

    encoder: nn.Module
    number: int
    layers: int
    heads: int
    halves: int


def prefix_cache(at: Progress, host: nn.Module, past: Any, double: bool, prefixes: Sequence[tuple[Any, ...]]) -> Any:
    """The cache that a model goes on with: on a first call, the given one (or a new one) with the prefixes in it.

    Under gradient checkpointing it is one that is only read, since layers run twice. Raises AdapterError where such a
    call would go on from a cache.
    """
    recomputed = bool(_checkpointed(host)) and torch.is_grad_enabled()
    if not at.first:
        if recomputed:
            raise AdapterError("gradient checkpointing can't go on from a cache: pass whole sequences, or disable it")
        return past
    dtype = next(tensor.dtype for tensor in tensors_in(host) if tensor.is_floating_point())
    read = [_keys_and_values(Prefix(*prefix), dtype, at.batch) for prefix in prefixes]
    pairs = [
        (torch.cat([keys for keys, _ in layer], dim=2), torch.cat([values for _, values in layer], dim=2))
        for layer in zip(*read, strict=True)
    ]
    if recomputed:
        return _read_only(pairs, double)
    if past is None:
        past = EncoderDecoderCache(DynamicCache(), DynamicCache()) if double else DynamicCache()
    own = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
    for index, (keys, values) in enumerate(pairs):
        own.update(keys, values, index)
    mark(at, past)
    return past


def withhold(output: Any, base: Unbound, past: Any, use_cache: bool | None, more: Mapping[str, Any] | None) -> Any:
    """The model output without the cache that a prefix needed, where the caller neither gave one nor wants one."""
    wanted = (more or {}).get("use_cache") if use_cache is None else use_cache
    if wanted is None:
        wanted = getattr(getattr(base.host, "config", None), "use_cache", True)
    if past is not None or wanted:
        return output
    if isinstance(output, tuple):
        return tuple(value for value in output if not isinstance(value, Cache))
    return type(output)(**{name: value for name, value in output.items() if name != "past_key_values"})


def _keys_and_values(prefix: Prefix, dtype: torch.dtype, batch: int) -> list[tuple[Tensor, Tensor]]:
    """(batch, heads, n, head_dim) keys and values by layer."""
    flat = rows(prefix.encoder, prefix.number).to(dtype)
    pairs = flat.view(prefix.number, prefix.layers, 2, prefix.heads, -1).permute(1, 2, 3, 0, 4)
    chosen = [pairs[_row_of(layer, prefix)] for layer in range(prefix.layers)]
    return [(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)) for keys, values in chosen]


def _row_of(layer: int, prefix: Prefix) -> int:
    """Which of the pairs of a prefix is that of `layer`. PEFT's files of encoder-decoder models depend on it.

    PEFT lays out twice the pairs, for self- and cross-attention in turn, and throws the latter away: so layer i has pair
    2i, counted around.
    """
    return prefix.halves * layer % prefix.layers


class _ReadOnlyLayer(DynamicLayer):
    """Keys and values that stay what they are: a layer run twice, as under gradient checkpointing, sees the same."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        if keys is not None and values is not None:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _NeverUpdated(dict[int, bool]):
    """Says of every layer that its cross-attention is still to be computed."""

    def __setitem__(self, key: int, value: bool) -> None:
        pass


def _read_only(pairs: Sequence[tuple[Tensor, Tensor]], double: bool) -> Any:
    own = Cache(layers=[_ReadOnlyLayer(keys, values) for keys, values in pairs])
    if not double:
        return own
    both = EncoderDecoderCache(own, Cache(layers=[_ReadOnlyLayer() for _ in pairs]))
    both.is_updated = _NeverUpdated()
    return both


def _checkpointed(host: nn.Module) -> list[nn.Module]:
    """The modules of `host` that take gradient checkpointing to be on in this call, with gradients or without."""
    if not host.training:
        return []
    return [module for module in host.modules() if getattr(module, "gradient_checkpointing", False) is True]


def call_with_prefix(
    base: Unbound,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    more_args: tuple[Any, ...] = (),
    more_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """`invoke`, with gradient checkpointing told that the cache is only read. Recomputed layers keep what they got.

    Raises AdapterError where checkpointing can't carry a prefix: reentrant, or of layers that are not transformers' own.
    """
    with _kept_by(_checkpointed(base.host)):
        return invoke(base, args, kwargs, more_args, more_kwargs)


@contextmanager
def _kept_by(modules: Sequence[nn.Module]) -> Generator[None]:
    """Let checkpointing leave the cache to `modules`: its layers, and models, some of which look at their own flag."""
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    if modules and not (layers and "_can_checkpoint_with_cache" in vars(GradientCheckpointingLayer)):
        raise AdapterError(
            f"gradient checkpointing of {type(modules[0]).__name__} drops the cache, and with it the prefix, in this"
            " version of transformers. Disable it (gradient_checkpointing_disable()), or use prompt tuning."
        )
    if any(_is_reentrant(layer) for layer in layers):
        raise AdapterError(
            "reentrant gradient checkpointing loses the gradient of a prefix. Use the other kind:"
            " gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )
    models = [module for module in modules if isinstance(module, PreTrainedModel)]
    for layer in layers:
        layer.__dict__["_can_checkpoint_with_cache"] = True
    for model in models:
        model.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_can_checkpoint_with_cache", None)
        for model in models:
            model.gradient_checkpointing = True


def _is_reentrant(layer: Any) -> bool:
    function = layer._gradient_checkpointing_func
    return isinstance(function, partial) and bool(function.keywords.get("use_reentrant", False))
