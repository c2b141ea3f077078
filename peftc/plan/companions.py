"""What an adapter adapts beside its spec's own targets: specs that belong to it, and ends of ties that follow."""

from collections.abc import Sequence
from dataclasses import replace

from peftc.edits import Miss
from peftc.graph.sites import SiteIndex, is_inside
from peftc.plan.match import Match, match, unfit
from peftc.registry import find_rule


def with_companions(adapter: str, found: Match, index: SiteIndex) -> list[Match]:
    """The match of an adapter's spec, and those of the specs that belong to it.

    What these miss is an error that can't be let pass, under the name of the field that asks for it.
    """
    found = _with_embedding(adapter, found, index)
    matches, fields = [found], ["target_modules"]
    for name, specs in found.spec.companions().items():
        for spec in specs:
            own = _apart(adapter, match(adapter, spec, index), found)
            misses = tuple(replace(miss, field=name, fatal=miss.error) for miss in own.misses)
            matches.append(replace(own, misses=misses, beside=True))
            fields.append(name)
    return [
        _with_ends(adapter, one, [other for other in matches if other is not one], index, name)
        for one, name in zip(matches, fields, strict=True)
    ]


def _apart(adapter: str, own: Match, first: Match) -> Match:
    """The match of a spec without what the adapter's own spec does: files have one or the other at a module."""
    others = {site.fqn for site in first.sites}
    misses = [
        Miss(adapter, "", site.fqn, f"is adapted already, by {first.spec.peft_type}: leave it out of one of the two")
        for site in own.sites
        if site.fqn in others
    ]
    misses += [
        Miss(adapter, "", site.fqn, "is in modules_to_save, which trains all of it: leave it out of one of the two")
        for site in own.sites
        if is_inside(site.fqn, first.saved)
    ]
    taken = {miss.value for miss in misses}
    sites = tuple(site for site in own.sites if site.fqn not in taken)
    return replace(own, sites=sites, misses=(*own.misses, *misses))


def _with_ends(adapter: str, found: Match, others: Sequence[Match], index: SiteIndex, name: str) -> Match:
    """The match with the other ends of the input embedding's tie, if that is adapted and they are to follow.

    An end that another spec of the adapter has, or that is saved whole, goes its own way.
    """
    first = next((site for site in found.sites if site.fqn == index.input_embedding), None)
    rule = find_rule(found.spec, first) if first is not None else None
    if first is None or rule is None or not (rule.replaces_rows or found.spec.ties_targets):
        return found
    adapted = {site.fqn: other for other in others for site in other.sites}
    saved = [fqn for one in (found, *others) for fqn in one.saved]
    sites, follows, misses = {site.fqn: site for site in found.sites}, dict(found.follows), list(found.misses)
    for weight in first.tied:
        fqn = weight.rpartition(".")[0]
        if fqn == first.fqn:
            continue
        if fqn in adapted or is_inside(fqn, saved):
            # Files have one or the other at a module; so what the adapter does there itself is in the way.
            wrong = found.spec.ties_bind or (fqn in adapted and not adapted[fqn].beside)
            told = f"is tied to {fqn}, which has tensors of its own" + (
                ": leave that out" if wrong else " and keeps them"
            )
            misses.append(Miss(adapter, name, first.fqn, told, wrong, wrong and found.beside))
            continue
        site = index.sites.get(fqn)
        reason = (
            "that is no op of the table" if site is None or site.weight != weight else unfit(found.spec, site, end=True)
        )
        if site is None or reason is not None:
            told = f"is tied to {weight}, which can't have its tensors: {reason}"
            misses.append(Miss(adapter, name, first.fqn, told, fatal=found.beside))
            continue
        sites[fqn] = site
        follows[fqn] = first.fqn
    ordered = tuple(sites[fqn] for fqn in (*index.sites, *index.inner) if fqn in sites)
    return replace(found, sites=ordered, follows=follows, misses=tuple(misses))


def _with_embedding(adapter: str, found: Match, index: SiteIndex) -> Match:
    """The match with the input embedding, if one end of its tie is in it and the spec wants that all are; of modules that
    are saved whole, with all ends.
    """
    first = index.sites.get(index.input_embedding or "") if found.spec.ties_targets else None
    ends = [name.rpartition(".")[0] for name in first.tied] if first is not None else []
    if first is None or len(ends) < 2:
        return found
    if any(fqn in found.saved for fqn in ends):
        saved = tuple(fqn for fqn in index.modules if fqn in {*found.saved, *ends})
        sites = tuple(site for site in found.sites if site.fqn not in ends)
        return replace(found, sites=sites, saved=saved, follows={fqn: first.fqn for fqn in ends if fqn != first.fqn})
    reason = unfit(found.spec, first)
    if first in found.sites or not any(site.fqn in ends for site in found.sites):
        return found
    if reason is not None:
        miss = Miss(adapter, "ensure_weight_tying", first.fqn, reason, fatal=True)
        return replace(found, misses=(*found.misses, miss))
    sites = tuple(site for site in index.sites.values() if site is first or site in found.sites)
    others = tuple(site for site in found.sites if site.fqn not in index.sites)
    return replace(found, sites=(*sites, *others))
