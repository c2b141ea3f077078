"""Caches of keys and values among the inputs of a program: its graph reads their tensors, and puts the new ones in.

Imported when a cache is first met: transformers takes its time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from peftc.errors import CaptureError

_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


def is_cache(value: Any) -> bool:
    """Whether a value is a cache that a program takes as such: one that grows. Others are inputs like any."""
    return type(value) in (DynamicCache, EncoderDecoderCache)


def is_double(cache: Any) -> bool:
    """Whether a cache is of an encoder-decoder: meant are the decoder's own keys and values, the others are computed."""
    return isinstance(cache, EncoderDecoderCache)


def taken_apart(name: str, cache: Any) -> list[Tensor]:
    """Copies of the tensors of a cache to trace with. Raises CaptureError if they say nothing, or if it holds others."""
    layers = _own(cache).layers
    other = next((layer for layer in layers if type(layer) not in _PLAIN), None)
    if other is not None:
        raise CaptureError(
            f"capture='export': {name} has a {type(other).__name__}, which is more than keys and values that grow. Leave it"
            " out of inputs, or use capture='modules'."
        )
    if not layers or any(layer.get_seq_length() < 2 for layer in layers):
        raise CaptureError(
            f"capture='export': {name} holds no two tokens, so it does not say what its tensors are like. Give one that the"
            f" model has filled: with torch.no_grad(): {name} = model(**inputs).{name}"
        )
    return [tensor.detach().clone() for tensor in tensors(cache)]


def tensors(cache: Any) -> list[Tensor]:
    """The keys and values (batch, heads, tokens, size) of every layer, in turn."""
    return [tensor for layer in _own(cache).layers for tensor in (layer.keys, layer.values)]


def tensor_of(cache: Any, number: int) -> Tensor:
    """One of them."""
    layer = _own(cache).layers[number // 2]
    return layer.values if number % 2 else layer.keys


def renewed(cache: Any, new: Sequence[Tensor]) -> Any:
    """The cache itself, with other tensors in it: a model, too, changes the one that it is given."""
    _own(cache).layers[:] = [_layer(*pair) for pair in zip(new[::2], new[1::2], strict=True)]
    return cache


def begun(name: str, cache: Any, double: bool, empty: Sequence[Tensor]) -> Any:
    """The cache of a call: the given one, or a new one if there is none, with the tensors `empty` if there are none in it.

    Raises CaptureError if it is no such cache, or has dropped tokens, of which a program keeps all.
    """
    if cache is None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if double else DynamicCache()
    if not is_cache(cache) or is_double(cache) is not double:
        expected = "EncoderDecoderCache" if double else "DynamicCache"
        raise CaptureError(f"{name}: is {type(cache).__name__}; the program takes a {expected}, or none to begin with")
    layers = _own(cache).layers
    if all(layer.get_seq_length() == 0 for layer in layers):
        return renewed(cache, empty)
    if 2 * len(layers) != len(empty) or any(type(layer) not in _PLAIN for layer in layers):
        raise CaptureError(f"{name}: has other layers than the one that the program was captured with")
    if any(layer.get_seq_length() != layer.keys.shape[-2] for layer in layers):
        raise CaptureError(f"{name}: has dropped tokens that left a layer's window; begin with an empty one")
    return renewed(cache, tensors(cache))


def called(forward: Callable[..., Any], given: Mapping[str, Any], doubles: Mapping[str, bool]) -> Any:
    """What a model gives for inputs whose caches are taken apart: its outputs, with their names in the place of caches, and
    the tensors that are in these afterwards. `doubles`: by name, whether a cache is double.
    """
    whole: dict[str, Any] = {}
    for name, double in doubles.items():
        own = renewed(DynamicCache(), given[name])
        whole[name] = EncoderDecoderCache(own, DynamicCache()) if double else own
    names = {id(cache): name for name, cache in whole.items()}
    outputs = forward(**{**given, **whole})

    def name_of(leaf: Any) -> Any:
        return names.get(id(leaf), leaf)

    named = pytree.tree_map(name_of, outputs, is_leaf=lambda leaf: id(leaf) in names)
    return named, [tensor for cache in whole.values() for tensor in tensors(cache)]


def _own(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    """A layer that keeps all; so it also is, in eager calls, where a model would drop what has left a window."""
    layer: Any = DynamicLayer()
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    layer.keys, layer.values = keys, values
    return cast(DynamicLayer, layer)
