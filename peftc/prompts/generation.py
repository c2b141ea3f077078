"""What transformers' `generate` must be told of virtual tokens: it takes the length of a cache for that of its tokens."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from peftc.errors import AdapterError
from peftc.prompts.virtual import held_by


def call_methods(cls: type[nn.Module]) -> dict[str, Callable[[Any], Any]]:
    """What makes the methods of a host of class `cls` from its own. They change nothing where no virtual token is."""
    return {name: make for name, make in _METHODS.items() if callable(getattr(cls, name, None))}


def _count_virtual(original: Any) -> Any:
    """Going on from a given cache, the tokens that are not in it: `generate` has counted the virtual ones among them."""

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        number = kwargs.get("next_sequence_length")
        if kwargs.get("is_first_iteration") and number is not None:
            kwargs["next_sequence_length"] = number + held_by(kwargs.get("past_key_values"))
        return original(self, *args, **kwargs)

    return prepare


def _refuse_chunks(original: Any) -> Any:
    """Chunks are cut before anything can be told."""

    @functools.wraps(original)
    def prefill(self: Any, input_ids: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        cache = model_kwargs.get("past_key_values")
        going_on = cache is not None and cache.get_seq_length() > 0 and held_by(cache) > 0
        if going_on and generation_config.prefill_chunk_size is not None:
            raise AdapterError(
                "prefill_chunk_size with a cache that holds virtual tokens would cut the wrong tokens. Leave it out, or"
                " start from an empty cache."
            )
        return original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)

    return prefill


_METHODS = {"prepare_inputs_for_generation": _count_virtual, "_prefill": _refuse_chunks}
