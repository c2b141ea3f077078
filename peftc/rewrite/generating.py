"""`generate` of a model that runs as one program, with a cache among its inputs: it is called as it was captured."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from peftc.errors import AdapterError
from peftc.graph.calling import Signature
from peftc.graph.region import Source
from peftc.graph.sites import transformers_config
from peftc.rewrite.program import Program

_MASK, _CACHE = "attention_mask", "past_key_values"
_NEEDED = ("input_ids", _MASK, "position_ids", _CACHE)
# What a program does as it was captured: it gives a cache, and all logits, of which `generate` reads the last.
_SAID = ("use_cache", "return_dict", "logits_to_keep")


@contextmanager
def generating(program: Program) -> Generator[None]:
    """Let the model be called by transformers' `generate`. Raises AdapterError if it is a program that can't be."""
    source = program.regions[0].source if program.plan.capture == "export" and program.regions else None
    if source is None or source.signature is None:
        yield
        return
    base: Any = program.base
    double = bool(getattr(transformers_config(base), "is_encoder_decoder", False))
    encoded = str(getattr(base, "main_input_name", "input_ids"))
    needed = (encoded, _MASK, "decoder_input_ids", _CACHE) if double else _NEEDED
    if not _serves(source.signature, needed) or not _gives_cache(source):
        raise AdapterError(
            "generate: which calls the model with caches and positions; this model runs as one program, captured with"
            f" {', '.join(source.signature.known)}. Capture it with {', '.join(needed[:-1])} (as far as the model takes"
            f" them) and {needed[-1]} that the model has filled, and with config.use_cache=True; or compile it with"
            " capture='modules', load the adapter there and do it then."
        )
    as_captured = partial(_as_captured, source.signature.known, encoded if double else None)
    handle = program.base.register_forward_pre_hook(as_captured, with_kwargs=True)
    if double:
        base.get_encoder = _no_encoder(encoded)
    try:
        yield
    finally:
        handle.remove()
        if double:
            del base.get_encoder


def _serves(signature: Signature, needed: tuple[str, ...]) -> bool:
    """Whether a program takes what a step of a decoder has, and nothing else."""
    known, optional = signature.known, (_MASK, "position_ids")
    return set(needed) - set(optional) <= set(known) <= {*needed, *_SAID}


def _gives_cache(source: Source) -> bool:
    from peftc.graph.caches import renewed  # Late, as transformers takes its time.

    return any(node.target is renewed for node in source.graph.nodes)


def _no_encoder(name: str) -> Callable[..., nn.Module]:
    """What gives `generate` an encoder that leaves its input, called `name`, as it is: the program has the encoder in it,
    and encodes again in every step.
    """
    from transformers.modeling_outputs import BaseModelOutput  # Late, as transformers takes its time.

    class Unencoded(nn.Module):
        main_input_name = name

        def forward(self, **kwargs: Any) -> Any:
            return BaseModelOutput(last_hidden_state=kwargs[name])

    return lambda *_, **__: Unencoded()


def _as_captured(
    known: tuple[str, ...], encoded: str | None, base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step without what the program does anyway, and with the mask that `generate` leaves out.

    `encoded`: what an encoder, which is in the program, takes; it is where its outputs would be.
    """
    given = {name: value for name, value in kwargs.items() if name in known or name not in _SAID}
    if encoded is not None:
        given[encoded] = cast("tuple[Any, ...]", given.pop("encoder_outputs"))[0]
    elif _MASK in known and given.get(_MASK) is None:
        ids, cache = given["input_ids"], given.get(_CACHE)
        length = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        given[_MASK] = torch.ones(ids.shape[0], length, dtype=torch.int64, device=ids.device)
    return args, given
