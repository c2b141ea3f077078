"""What a merge changes in a checkpoint: by parameter, what is folded into what."""

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peftc import lifecycle
from peftc.checkpoint import AdapterFiles
from peftc.checkpoint.base import require_base
from peftc.checkpoint.files import open_folder
from peftc.checkpoint.keys import require_fit
from peftc.checkpoint.lazy import FileTensors, outline
from peftc.checkpoint.spelling import respelled_spec
from peftc.checkpoint.state import fit_of, report, require_values
from peftc.errors import CheckpointError
from peftc.graph.finding import parameter_at
from peftc.graph.sites import dtype_of, parameter_name
from peftc.merge import ties
from peftc.merge.combine import checked
from peftc.merge.fold import edits_by_site, fold_bias, value_in
from peftc.merge.merge import require_mergeable
from peftc.merge.undo import owner_of
from peftc.plan import Edit, Plan, PlannedParam, require_applicable
from peftc.rewrite.build import build
from peftc.rewrite.program import Program
from peftc.rewrite.switch import activate
from peftc.rule import Bound, Combination, Part
from peftc.stream.bases import sampler
from peftc.stream.sharded import Checkpoint
from peftc.stream.skeleton import resize_vocabulary, skeleton
from peftc.stream.values import following, loaded
from peftc.stream.work import Change, Options, Source, Work, file_key, file_of, stored_name, weight_site

_COMBINED = "combined"


def thought_through(
    checkpoint: Checkpoint,
    shards: Mapping[str, FileTensors],
    folders: Sequence[Path],
    model: nn.Module | None,
    options: Options,
) -> Work:
    """Everything that can be known without computing a weight, and every refusal. Raises PeftcError."""
    opened = {f"adapter{i}": open_folder(folder, options.verify) for i, folder in enumerate(folders)}
    base, names = skeleton(checkpoint, model, [outline(tensors.header.entries) for _, tensors in opened.values()])
    resize_vocabulary(base, [(files.where, files.spec, outline(t.header.entries)) for files, t in opened.values()])
    laid = {name: _on_model(base, *pair) for name, pair in opened.items()}
    specs = {name: respelled_spec(base, files.spec, tensors) for name, (files, tensors) in laid.items()}
    plan, regions = lifecycle.planned(base, specs, "modules", autocast=True, fresh=False)
    require_applicable(plan, "warn")
    program = build(base, plan, regions, inplace=True, fresh=False)
    sources = {name: _source(program, name, opened[name][1], *pair) for name, pair in laid.items()}
    work = Work(checkpoint, shards, names, program, sources, options, lambda edit, param: loaded(work, edit, param))
    for source in sources.values():
        _require_base(work, source)
    work = replace(work, following=frozenset(following(work)))
    if options.weights is not None:
        work = _combined(work, options.weights)
    return _with_changes(work)


def _on_model(base: nn.Module, files: AdapterFiles, tensors: FileTensors) -> tuple[AdapterFiles, FileTensors]:
    """An adapter as the base has it: of one that is laid out otherwise there, a copy for the time of the merge."""
    new = files.on(base)
    if new.tensors is files.tensors:
        return new, tensors
    folder = TemporaryDirectory(prefix="peftc")
    path = Path(folder.name) / "adapter.safetensors"
    save_file({key: value.contiguous() for key, value in new.tensors.items()}, path)
    written = FileTensors(path)
    weakref.finalize(written, folder.cleanup)
    return replace(new, tensors=written), written


def _source(program: Program, name: str, original: FileTensors, files: AdapterFiles, tensors: FileTensors) -> Source:
    """Fit a file to its adapter, as loading does. Every tensor is looked at once, and not kept."""
    fit = fit_of(program, name, outline(tensors.header.entries))
    require_fit(fit.result, fit.own, files.where, strict=True)
    for key, source in fit.sources.items():
        for part in tensors.parts(source):
            require_values(program, name, {key: tensors.rows(source, part)}, fit, files.where)
    report(fit.result, None, files.where)
    return Source(files, original, tensors, fit)


def _require_base(work: Work, source: Source) -> None:
    if source.files.base is None:
        return

    sample = sampler(work.checkpoint, work.shards, partial(stored_name, work))
    caution = require_base(work.program, source.files.base, sample)
    if caution is not None:
        warnings.warn(f"{source.files.where}: {caution}", stacklevel=5)


def _combined(work: Work, numbers: Sequence[float]) -> Work:
    """The same with one adapter more, active alone: the weighted sum of the others, as `add_weighted_adapter` makes it."""
    program = work.program
    names = list(work.sources)
    lifecycle.combine(program, _COMBINED, names, list(numbers), Combination(_exactly(program.plan)))
    weights = dict(zip(names, numbers, strict=True))
    how = checked(program, weights, Combination(_exactly(program.plan)))

    def value(edit: Edit, param: PlannedParam) -> Tensor:
        site = program.plan.sites[edit.site]
        parts = [
            Part(weight, Bound({**{p.name: work.value(own, p) for p in own.params}, **own.constants}))
            for name, weight in weights.items()
            for own in program.adapters[name].edits
            if own.site == edit.site
        ]
        return edit.rule.combine(site, parts, how)[param.name].to(dtype_of(param.dtype))

    return replace(work, value=value)


def _exactly(plan: Plan) -> str:
    """The combination that is the weighted sum itself, or else the first that the method has."""
    return next((edit.rule.exact for edit in plan.edits if edit.rule.exact), "")


def _with_changes(work: Work) -> Work:
    program = work.program
    combined = _COMBINED in program.plan.adapters
    names = [_COMBINED] if combined else list(work.sources)
    activate(program, names, ())
    groups = edits_by_site(program, names)
    require_mergeable(program, names, groups)
    changes = {} if combined else _starts(work)
    going, targets = ties.moving(program, groups), list[tuple[str, str]]()
    moved = ties.together(program.plan, going)
    for fqn, edits in groups.items():
        folds = _copies(work, edits[-1]) if edits[-1].whole else _folds(work, edits, changes)
        if fqn in going and (weight := ties.weight_name(program.plan.sites[fqn])) not in work.names.direct:
            folds = [change for change in folds if change.parameter != weight]  # It has none of its own in the files.
        changes |= {change.parameter: change for change in folds}
        targets += [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in (c.parameter for c in folds)]
    if not work.options.untie:
        ties.require_untied(program, targets, moved)
    names = {parameter_name(*target): target for target in targets}
    cut = tuple(
        name for name, target in names.items() if name not in moved and ties.partner(program, *target) is not None
    )
    if cut and ties.says_tied(program.base):
        head, scale = ties.output_weight(program.base), ties.scale_of(program)
        if head is not None and scale != 1:
            changes[head] = replace(changes.get(head, Change(head)), scale=scale)
            cut = (*cut, *((head,) if head not in cut else ()))
    for parameter in changes:
        if stored_name(work, parameter) is None and parameter not in work.names.fused:
            raise CheckpointError(
                f"{work.checkpoint.folder}: has no tensor {parameter}, which an adapter changes. If it is of a head"
                " that the base lacks, load the model with its head and the adapter, and merge_and_unload()."
            )
    work = replace(work, changes=changes, cut=cut)
    _require_whole(work)
    return work


def _require_whole(work: Work) -> None:
    """Refuse a vocabulary of another size if not all of it comes from the adapter, or if the way back is asked for."""
    for parameter, tensor in work.program.base.named_parameters():
        stored = stored_name(work, parameter) if parameter in work.names.direct else None
        if stored is None or file_of(work, stored).header.entries[stored].shape == tuple(tensor.shape):
            continue
        change = work.changes.get(parameter)
        if change is None or change.start is None:
            raise CheckpointError(
                f"{work.checkpoint.folder}: {parameter} has {list(tensor.shape)} with the adapter's vocabulary, and the"
                " adapter does not bring it. Save it again with save_embedding_layers=True"
            )
        if work.options.undo:
            raise CheckpointError(f"{work.checkpoint.folder}: undo=True can't give a vocabulary of another size back")


def _starts(work: Work) -> dict[str, Change]:
    """What adapters bring in the place of the base's: biases that they trained, embeddings of their own."""
    found: dict[str, Change] = {}
    for tensor in work.program.plan.trained:
        prefix = work.program.adapters[tensor.adapter].spec.key_prefix
        source = work.sources[tensor.adapter].fit.sources[prefix + tensor.key]
        found[tensor.name] = Change(tensor.name, start=(tensor.adapter, source))
    for adapter, source in work.sources.items():
        for key, parameter in source.fit.embeddings.items():
            if not _same(work, parameter, source, source.fit.sources[key]):
                if work.options.brought is None:
                    warnings.warn(
                        f"{source.files.where}: brings its own {parameter}, in the place of the base's", stacklevel=6
                    )
                found[parameter] = Change(parameter, start=(adapter, source.fit.sources[key]))
    return found


def _same(work: Work, parameter: str, source: Source, key: str) -> bool:
    stored = stored_name(work, parameter)
    if work.options.brought is not None:
        return parameter not in work.options.brought
    if stored is None:
        return False
    file, own = file_of(work, stored), source.tensors
    if file.header.entries[stored].shape != own.header.entries[key].shape:
        return False  # A vocabulary of another size.
    pairs = ((file.rows(stored, part), own.rows(key, part)) for part in own.parts(key))
    return all(torch.equal(old.to(new.dtype), new) for old, new in pairs)


def _copies(work: Work, edit: Edit) -> list[Change]:
    """A module that an adapter saved whole; of a combination, the one adapter's that did."""
    if edit.adapter == _COMBINED:
        edit = next(own for own in work.program.plan.edits if own.site == edit.site and own.adapter != _COMBINED)
    sources = work.sources[edit.adapter].fit.sources
    return [
        Change(parameter_name(edit.site, param.key), start=(edit.adapter, sources[file_key(work, edit, param)]))
        for param in edit.params
    ]


def _folds(work: Work, edits: Sequence[Edit], starts: Mapping[str, Change]) -> list[Change]:
    """The weight of a site, and its bias if a rule changes it."""
    site = weight_site(work, edits[0])
    weight = parameter_name(*owner_of(site))
    found = [replace(starts.get(weight, Change(weight)), edits=tuple(edits))]
    name = str(site.bias)
    bias = parameter_at(work.program.base, name) if site.bias is not None else None
    shape_only = parameter_at(work.program.base, weight)
    if (
        bias is not None
        and fold_bias(site, edits, bias, value_in(work.program.adapters), lambda: shape_only) is not None
    ):
        found.append(replace(starts.get(name, Change(name)), edits=tuple(edits), is_bias=True))
    return found
