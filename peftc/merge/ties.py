"""Merging at one end of a tie: refused, or the tie is cut."""

import warnings
from collections.abc import Sequence

from torch import nn

from peftc.errors import MergeError
from peftc.graph.sites import parameter_name, transformers_config
from peftc.rewrite.program import Program


def partner(program: Program, owner: str, leaf: str) -> str | None:
    """The name of a parameter of another module that is the very tensor `leaf` of `owner`."""
    name = parameter_name(owner, leaf)
    group = next((group for group in program.plan.ties if name in group), ())
    own = _parameter(program, name)
    return next((other for other in group if other != name and _parameter(program, other) is own), None)


def require_untied(program: Program, targets: Sequence[tuple[str, str]]) -> None:
    """Refuse to fold into a tensor that is another module's too."""
    for owner, leaf in targets:
        other = partner(program, owner, leaf)
        if other is not None:
            raise MergeError(
                f"{owner}: its {leaf} is tied to {other}, and folding would change both. Pass untie=True to give this end"
                " a tensor of its own (the model grows by it), or leave the site out."
            )


def cut(program: Program, owner: str, leaf: str) -> None:
    """Note that `leaf` of `owner` is about to be no longer the tensor of another module, if it is."""
    other = partner(program, owner, leaf)
    if other is None:
        return
    config = transformers_config(program.base)
    if config is not None and config.tie_word_embeddings:
        config.tie_word_embeddings = False
        program.merge.tie_word_embeddings = True
    warnings.warn(f"{parameter_name(owner, leaf)} is no longer tied to {other} (untie=True)", stacklevel=6)


def mend(program: Program) -> None:
    """Say again that the embeddings are tied, if a cut has said they are not."""
    if program.merge.tie_word_embeddings:
        config = transformers_config(program.base)
        assert config is not None, "it was there when the tie was cut"
        config.tie_word_embeddings = True
        program.merge.tie_word_embeddings = False


def _parameter(program: Program, name: str) -> nn.Parameter | None:
    owner, _, leaf = name.rpartition(".")
    return program.base.get_submodule(owner)._parameters.get(leaf)
