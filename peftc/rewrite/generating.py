"""`generate` of a model that runs as one program, with a cache among its inputs: it is called as it was captured."""

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from peftc.errors import AdapterError
from peftc.graph.calling import Signature
from peftc.graph.region import Source
from peftc.rewrite.program import Program

_NEEDED = ("input_ids", "attention_mask", "position_ids", "past_key_values")
# What a program does as it was captured: it gives a cache, and all logits, of which `generate` reads the last.
_SAID = ("use_cache", "return_dict", "logits_to_keep")


@contextmanager
def generating(program: Program) -> Generator[None]:
    """Let the model be called by transformers' `generate`. Raises AdapterError if it is a program that can't be."""
    source = program.regions[0].source if program.plan.capture == "export" and program.regions else None
    if source is None or source.signature is None:
        yield
        return
    if not _serves(source.signature) or not _gives_cache(source):
        raise AdapterError(
            "generate: which calls the model with caches and positions; this model runs as one program, captured with"
            f" {', '.join(source.signature.known)}. Capture it with {', '.join(_NEEDED[:-1])} (as far as the model takes"
            f" them) and {_NEEDED[-1]} that the model has filled, and with config.use_cache=True; or compile it with"
            " capture='modules', load the adapter there and do it then."
        )
    handle = program.base.register_forward_pre_hook(partial(_as_captured, source.signature.known), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _serves(signature: Signature) -> bool:
    """Whether a program takes what a step of a decoder has, and nothing else."""
    known = signature.known
    return "input_ids" in known and "past_key_values" in known and set(known) <= {*_NEEDED, *_SAID}


def _gives_cache(source: Source) -> bool:
    from peftc.graph.caches import renewed  # Late, as transformers takes its time.

    return any(node.target is renewed for node in source.graph.nodes)


def _as_captured(
    known: Collection[str], base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step without what the program does anyway, and with the mask that `generate` leaves out."""
    given = {name: value for name, value in kwargs.items() if name in known or name not in _SAID}
    if "attention_mask" in known and given.get("attention_mask") is None:
        ids, cache = given["input_ids"], given.get("past_key_values")
        length = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        given["attention_mask"] = torch.ones(ids.shape[0], length, dtype=torch.int64, device=ids.device)
    return args, given
