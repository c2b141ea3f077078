"""Merging at one end of a tie: refused, or the tie is cut."""

import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

from torch import nn

from peftc.errors import MergeError
from peftc.graph.dry_run import head_scale
from peftc.graph.finding import holder_of, parameter_at
from peftc.graph.sites import Site, WeightSite, parameter_name, transformers_config
from peftc.merge.fold import Folded
from peftc.plan import Edit, Plan
from peftc.rewrite.build import parked
from peftc.rewrite.program import Program
from peftc.rewrite.sharding import managed, whole


def moving(program: Program, groups: Mapping[str, Sequence[Edit]]) -> dict[str, str]:
    """By site, the one of `groups` whose weight is the same tensor, and changes to the same: all ends of the tie do.

    So they can have one new tensor, and the tie stays.
    """
    found: dict[str, str] = {}
    for fqn, edits in groups.items():
        first = edits[0].follows
        whose = [edit.adapter for edit in groups.get(first or "", ())]
        if first is not None and all(e.follows == first for e in edits) and [e.adapter for e in edits] == whose:
            found[fqn] = first
    weights = {fqn: weight_name(program.plan.sites[fqn]) for fqn in {*found, *found.values()}}
    whole = {
        first
        for first in found.values()
        if _same(program, weights[first]) <= {weights[first], *(weights[end] for end in found if found[end] == first)}
    }
    return {end: first for end, first in found.items() if first in whole}


def weight_name(site: Site) -> str:
    """The name of the weight of a site; of a module that is saved whole, which follows a tie, its own."""
    return str(site.weight) if isinstance(site, WeightSite) else parameter_name(site.fqn, "weight")


def _same(program: Program, name: str) -> set[str]:
    """The names of the tensor `name`."""
    own = _parameter(program.base, name)
    group = next((group for group in program.plan.ties if name in group), (name,))
    return {other for other in group if _parameter(program.base, other) is own}


def together(plan: Plan, moved: Mapping[str, str]) -> frozenset[str]:
    """The names of the parameters of sites that change together."""
    return frozenset(weight_name(plan.sites[fqn]) for pair in moved.items() for fqn in pair)


def partner(program: Program, owner: str, leaf: str) -> str | None:
    """The name of a parameter of another module that is the very tensor `leaf` of `owner`."""
    name = parameter_name(owner, leaf)
    group = next((group for group in program.plan.ties if name in group), ())
    own = _parameter(program.base, name)
    return next((other for other in group if other != name and _parameter(program.base, other) is own), None)


def require_untied(program: Program, targets: Sequence[tuple[str, str]], moved: Container[str]) -> None:
    """Refuse to fold into a tensor that is another module's too, but for names of those that are `moved` together."""
    for owner, leaf in targets:
        other = partner(program, owner, leaf)
        if other is not None and parameter_name(owner, leaf) not in moved:
            raise MergeError(
                f"{owner}: its {leaf} is tied to {other}, and folding would change both. Pass untie=True to give this end"
                " a tensor of its own (the model grows by it), or leave the site out."
            )


def untied(program: Program, folded: Sequence[Folded], moved: Container[str]) -> list[Folded]:
    """`folded` and what else must change where it cuts a tie that the config speaks of, for it to say that there is none.

    All other ends that the config ties get tensors of their own, or loading would find no values for them; and a head whose
    inputs are scaled because it is tied gets that factor. Names of those that are `moved` together stay tied. Raises
    MergeError if that can't be told.
    """
    cutting = [item for item in folded if parameter_name(item.owner, item.leaf) not in moved]
    found = {parameter_name(item.owner, item.leaf): item for item in folded}
    held = managed(program.base)
    for item in cutting if held else ():
        other = partner(program, item.owner, item.leaf)
        if other is not None and id(_parameter(program.base, other)) in held:
            raise MergeError(
                f"{item.owner}: its {item.leaf} is tied to {other}, and fully_shard has made one tensor of both for good."
                " Merge before fully_shard, or save the adapter and merge on disk (merge_checkpoint)."
            )
    if not any(partner(program, item.owner, item.leaf) for item in cutting) or not says_tied(program.base):
        return list(folded)
    head = output_weight(program.base)
    scale = scale_of(program)
    if head is not None and scale != 1:
        value = found[head].value if head in found else whole(parameter_at(program.base, head)).detach()
        found[head] = Folded(*_split(head), (value.double() * scale).to(value.dtype))
    by_config = tied_by_config(program.base)
    for group in program.plan.ties:
        kept: set[int] = set()  # The first end that is left keeps the tensor itself.
        for name in group if by_config & set(group) else ():
            parameter = _parameter(program.base, name)
            if name not in found and parameter is not None:
                if id(parameter) in kept:
                    found[name] = Folded(*_split(name), whole(parameter).detach().clone())
                kept.add(id(parameter))
    return list(found.values())


def says_tied(base: nn.Module) -> bool:
    """Whether the model's config says that its embeddings are tied, and can say otherwise.

    Those of T5's family can't; there, loading ties what the files have no value of its own for, whatever the config says.
    """
    config = transformers_config(base)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return False
    return not type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False}).tie_word_embeddings


def scale_of(program: Program) -> float:
    """What the config's saying that the head is tied multiplies its inputs by. Raises MergeError if that can't be told."""
    with parked(program) as base:
        scale = head_scale(base)
    if scale is None:
        raise MergeError(
            f"{type(program.base).__name__} computes otherwise where its config says that embeddings are tied, and how"
            " can't be told from a run without values; leave that end out (exclude_modules), or load the model and merge in"
            " memory (merge_and_unload)"
        )
    return scale


def output_weight(base: nn.Module) -> str | None:
    """The name of the head's weight, of a transformers model that has one."""
    head = cast(Any, base).get_output_embeddings()
    names = (f"{fqn}.weight" for fqn, module in base.named_modules() if module is head)
    return next(names, None) if head is not None else None


def tied_by_config(base: Any) -> set[str]:
    """The names of a transformers model's parameters that its config ties."""
    tied = cast("dict[str, str]", vars(base).get("all_tied_weights_keys") or {})
    return {*tied, *tied.values()}


def _split(name: str) -> tuple[str, str]:
    owner, _, leaf = name.rpartition(".")
    return owner, leaf


def cut(program: Program, owner: str, leaf: str) -> None:
    """Note that `leaf` of `owner` is about to be no longer the tensor of another module, if it is."""
    other = partner(program, owner, leaf)
    if other is None:
        return
    if says_tied(program.base):
        cast(Any, transformers_config(program.base)).tie_word_embeddings = False
        program.merge.tie_word_embeddings = True
    warnings.warn(f"{parameter_name(owner, leaf)} is no longer tied to {other} (untie=True)", stacklevel=6)


def mend(program: Program) -> None:
    """Say again that the embeddings are tied, if a cut has said they are not."""
    if program.merge.tie_word_embeddings:
        config = transformers_config(program.base)
        assert config is not None, "it was there when the tie was cut"
        config.tie_word_embeddings = True
        program.merge.tie_word_embeddings = False


def _parameter(base: nn.Module, name: str) -> nn.Parameter | None:
    module, leaf = holder_of(base, name)
    return module._parameters.get(leaf)
