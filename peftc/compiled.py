"""`compile`, `plan`, `load`, and the model they give: CompiledModel."""

import copy
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, fx, nn

from peftc import lifecycle
from peftc.checkpoint import (
    adapter_state_dict,
    load_state,
    locate,
    prompt_edit,
    prompt_embeddings,
    prompt_encoder,
    read_adapter,
    save_adapter,
)
from peftc.errors import AdapterError
from peftc.graph.region import Capture, call, parameters_of
from peftc.merge import forget, merge, unmerge
from peftc.plan import Plan, make_plan, require_same
from peftc.registry import spec_classes
from peftc.rewrite import program as rewrite
from peftc.rewrite.program import Program
from peftc.rewrite.virtual import rows
from peftc.specs import AdapterSpec, load_spec, load_specs
from peftc.view.text import span

OnUnmatched = Literal["error", "warn"]


class CompiledModel(fx.GraphModule):
    """A model with adapters. Its own graph is the model's call; `base` is the rewritten model, of the class it had.

    Attributes that are not found here are those of `base` (`config`, `device`, `generate`, …). Made by `compile`.
    """

    program: Program
    base: nn.Module

    def __init__(self, program: Program) -> None:
        graph = fx.Graph()
        graph.output(call(graph, "base", parameters_of(program.base.forward)))
        # A stand-in for the base until the graph is compiled: torch.fx would compile every host in it anew.
        root = nn.Module()
        root.base = nn.Module()
        super().__init__(root, graph, class_name="CompiledModel")
        self.base = program.base
        self.__dict__["program"] = program
        self.training = program.base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or "_modules" not in self.__dict__:
                raise
            return getattr(self.base, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledModel":
        new = CompiledModel(copy.deepcopy(self.program, memo))
        new.__dict__.update(copy.deepcopy(self._own_state(), memo))
        return new

    def __copy__(self) -> "CompiledModel":
        new = CompiledModel(self.program)
        new.__dict__.update(self._own_state())
        return new

    def __reduce__(self) -> Any:
        return CompiledModel, (self.program,), self._own_state()

    def _own_state(self) -> dict[str, Any]:
        """Attributes and hooks that were put on this model, beside what its constructor makes."""
        made = CompiledModel(self.program).__dict__
        return {name: v for name, v in self.__dict__.items() if name not in made or name.endswith("_hooks")}

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    __str__ = __repr__

    @property
    def plan(self) -> Plan:
        """The plan of all adapters attached now."""
        return self.program.plan

    @property
    def peft_config(self) -> dict[str, AdapterSpec]:
        """Spec by adapter name, in load order, with defaults resolved."""
        return dict(self.plan.adapters)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in load order."""
        return list(self.program.active)

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are folded into the weights now."""
        return list(self.program.merged)

    def get_base_model(self) -> nn.Module:
        """The rewritten base model."""
        return self.base

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, adapters included."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers and their ratio in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def site_code(self) -> dict[str, str]:
        """The generated code of every host; hosts with equal code together (`layers.{0–29}.self_attn.q_proj, …`)."""
        groups: dict[str, dict[str, list[str]]] = {}
        for region in self.program.regions:
            module = self.base.get_submodule(region.host)
            if isinstance(module, fx.GraphModule):
                shape = ".".join("#" if part.isdigit() else part for part in region.host.split("."))
                groups.setdefault(module.code.strip(), {}).setdefault(shape, []).append(region.host)
        return {", ".join(span(hosts) for hosts in shapes.values()): code for code, shapes in groups.items()}

    def print_code(self) -> None:
        """Print `site_code`."""
        for where, code in self.site_code().items():
            print(f"# {where or type(self.base).__name__}\n{code}\n")

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Activate exactly these adapters, and train them; the others are frozen. They apply in load order.

        Raises AdapterError on an unknown name, MergeError while merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        lifecycle.require_known(self.program, names)
        lifecycle.require_unmerged(self.program, "set_adapter")
        rewrite.activate(self.program, names, names)

    @contextmanager
    def disable_adapter(self) -> Generator[None]:
        """A context in which the graphs are those of the base model: no adapter op, no cost.

        Unlike PEFT's, it takes trained biases (`bias="all"`) out as well, so the outputs are the base model's.
        Raises MergeError while merged.
        """
        lifecycle.require_unmerged(self.program, "disable_adapter")
        before, self.program.enabled = self.program.enabled, False
        rewrite.emit(self.program, self.program.active)
        try:
            yield
        finally:
            self.program.enabled = before
            rewrite.emit(self.program, self.program.active)

    def add_adapter(self, adapter_name: str, peft_config: Any, *, on_unmatched: OnUnmatched = "error") -> None:
        """Attach a new, untrained adapter, inactive and frozen. `peft_config`: whatever `compile` takes as one spec.

        Raises AdapterError if the name is taken, SpecError, NoMatchError, ConflictError; nothing is changed then.
        """
        lifecycle.add(self.program, adapter_name, load_spec(peft_config, spec_classes()), on_unmatched)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        *,
        is_trainable: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        token: Any = None,
        allow_pickle: bool = False,
    ) -> None:
        """Attach an adapter from a folder or a Hub repository, inactive; frozen unless `is_trainable`.

        Raises CheckpointError, SpecError, AdapterError, ConflictError; nothing is changed then.
        """
        folder = locate(model_id, subfolder=subfolder, revision=revision, token=token)
        files = read_adapter(folder, is_trainable=is_trainable, allow_pickle=allow_pickle)
        lifecycle.load(self.program, adapter_name, *files)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off. If no other was active, the one loaded first becomes so.

        Raises AdapterError on an unknown name, MergeError while merged.
        """
        lifecycle.delete(self.program, adapter_name)

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, *, untie: bool = False) -> None:
        """Fold adapters (default: the active ones) into the base weights; their ops leave the graphs.

        Each weight is computed in float64 (float32 for half precision) and rounded once; originals are kept, so
        `unmerge_adapter` is bit-exact. Raises MergeError, with nothing changed: NaN or Inf, a site without a fold, a
        tied weight (unless `untie`), or something merged already. AdapterError if one is unknown or not active.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        names = self.active_adapters if names is None else list(names)
        lifecycle.require_known(self.program, names)
        merge(self.program, names, untie)

    def unmerge_adapter(self) -> None:
        """Put the original tensors back and the adapters' ops in again. Raises MergeError if nothing is merged."""
        unmerge(self.program)

    def merge_and_unload(self, adapter_names: str | Sequence[str] | None = None, *, untie: bool = False) -> nn.Module:
        """Fold adapters (default: the active ones, or those merged already) and return the plain model.

        The returned model has the original's classes and no trace of peftc; biases that an adapter trained stay.
        This CompiledModel has no adapters afterwards. Raises as `merge_adapter` does.
        """
        if not self.program.merged or adapter_names is not None:
            self.merge_adapter(adapter_names, untie=untie)
        rewrite.require_unwrapped(self.program)
        forget(self.program)
        # What active adapters trained in place stays.
        for name in self.program.journal.training:
            self.program.journal.trained.pop(name)
        self.program.journal.replaced.clear()
        return self._undo()

    def unload(self) -> nn.Module:
        """Remove every adapter and return the base: same classes, tensors, flags and outputs as the original.

        With `inplace=True` it is the very model that was compiled; else it shares its tensors with that one, so copy
        it before training either. This CompiledModel has no adapters afterwards.
        """
        if self.program.merged:
            self.unmerge_adapter()
        return self._undo()

    def _undo(self) -> nn.Module:
        rewrite.require_unwrapped(self.program)
        base = rewrite.undo(self.program)
        empty, _ = make_plan(base, {}, self.plan.capture, self.plan.autocast_adapter_dtype)
        self.__dict__["program"] = Program(base, empty, (), unloaded=True)
        return base

    def adapter_state_dict(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """The live tensors of an adapter under the keys of PEFT's files. Raises AdapterError on an unknown name."""
        lifecycle.require_known(self.program, [adapter_name])
        return adapter_state_dict(self.program, adapter_name)

    @property
    def prompt_encoder(self) -> dict[str, nn.Module]:
        """The prompt encoders by adapter name: what a prompt method trains."""
        edits = {name: prompt_edit(self.program, name) for name in self.plan.adapters}
        return {name: prompt_encoder(self.program, edit) for name, edit in edits.items() if edit is not None}

    def get_prompt_embedding_to_save(self, adapter_name: str = "default") -> Tensor:
        """The rows of a prompt adapter as saved: (rows, token_dim), or (rows, num_layers·2·token_dim) of a prefix.

        Raises AdapterError if `adapter_name` is unknown or no prompt method.
        """
        lifecycle.require_known(self.program, [adapter_name])
        edit = prompt_edit(self.program, adapter_name)
        if edit is None:
            raise AdapterError(f"{adapter_name!r} is {self.peft_config[adapter_name].peft_type}, which has no prompt")
        return prompt_embeddings(self.program, edit).detach().cpu()

    def get_prompt(self, batch_size: int) -> Tensor:
        """The rows of the first active prompt adapter, for every sequence: (batch_size, rows, width), differentiable.

        A prefix comes flat, as it is saved. Raises AdapterError if no prompt adapter is active.
        """
        edits = [edit for name in self.active_adapters if (edit := prompt_edit(self.program, name)) is not None]
        if not edits:
            raise AdapterError(
                f"no active adapter has a prompt; active are {', '.join(self.active_adapters) or 'none'}"
            )
        made = rows(prompt_encoder(self.program, edits[0]), int(edits[0].constants["rows"]))
        return made.expand(batch_size, -1, -1)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Write adapters (default: all) as PEFT does: `default` into the folder, others into subfolders of their name.

        Raises CheckpointError if the folder can't be written, AdapterError on an unknown name.
        """
        names = list(self.plan.adapters) if selected_adapters is None else list(selected_adapters)
        lifecycle.require_known(self.program, names)
        for name in names:
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            save_adapter(folder, self.program, name)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        *,
        is_trainable: bool = False,
        config: Any = None,
        capture: Capture = "modules",
        inplace: bool = False,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        revision: str | None = None,
        token: Any = None,
        allow_pickle: bool = False,
    ) -> "CompiledModel":
        """Compile `model` with an adapter from a folder or a Hub repository: for inference, unless `is_trainable`.

        `config` takes the place of the folder's `adapter_config.json`. Raises CheckpointError, SpecError.
        """
        folder = locate(model_id, subfolder=subfolder, revision=revision, token=token)
        given = None if config is None else load_spec(config, spec_classes())
        spec, tensors, encoder = read_adapter(
            folder, config=given, is_trainable=is_trainable, allow_pickle=allow_pickle
        )
        made, regions = _planned(model, {adapter_name: spec}, capture, autocast_adapter_dtype)
        rewrite.require_applicable(made, "warn")
        compiled = cls(rewrite.build(model, made, regions, inplace, fresh=False))
        try:
            load_state(compiled.program, adapter_name, tensors, encoder)
        except BaseException:
            compiled.unload()
            raise
        return compiled if is_trainable else compiled.eval()


def compile(
    model: nn.Module,
    spec: Any,
    adapter_name: str = "default",
    *,
    capture: Capture = "modules",
    inplace: bool = False,
    on_unmatched: OnUnmatched = "error",
    autocast_adapter_dtype: bool = True,
) -> CompiledModel:
    """Compile `model` with the adapters of `spec`. The model is not changed, unless `inplace`.

    `spec`: a spec, a dict, a path to `adapter_config.json` or YAML, an object with PEFT's `to_dict()`, a mapping of
    adapter names to any of these (the first becomes active), or a Plan, which is applied exactly as it is.
    `capture`: `modules` (any model), or `symbolic` (one flat graph, for models that torch.fx traces).
    `inplace`: rewrite the model itself instead of a structural copy; `unload()` then gives it back intact.
    `on_unmatched`: `warn` goes on without selectors that match nothing. `autocast_adapter_dtype`: adapters of float16
    and bfloat16 weights are float32.

    Raises SpecError, NoMatchError, ConflictError, CaptureError, AdapterError (a bad name, or a model compiled already),
    PlanError (the model is not the planned one). Nothing is changed then.
    """
    if isinstance(spec, Plan):
        made, regions = _planned(model, spec.adapters, spec.capture, spec.autocast_adapter_dtype)
        require_same(spec, made)
        made = spec
    else:
        specs = load_specs(spec, adapter_name, spec_classes())
        made, regions = _planned(model, specs, capture, autocast_adapter_dtype)
    rewrite.require_applicable(made, on_unmatched)
    return CompiledModel(rewrite.build(model, made, regions, inplace, fresh=True))


def plan(
    model: nn.Module,
    spec: Any,
    adapter_name: str = "default",
    *,
    capture: Capture = "modules",
    autocast_adapter_dtype: bool = True,
) -> Plan:
    """What `compile` would change, without changing anything or reading a weight. Arguments as there.

    Misses and conflicts are in the plan, where `compile` raises. Raises SpecError, NoMatchError (no default targets for
    the model type), CaptureError.
    """
    return _planned(model, load_specs(spec, adapter_name, spec_classes()), capture, autocast_adapter_dtype)[0]


def _planned(model: nn.Module, specs: Mapping[str, AdapterSpec], capture: Capture, autocast: bool) -> Any:
    if isinstance(model, CompiledModel):
        raise AdapterError("the model is compiled already: use its add_adapter or its .plan, or unload it first")
    return make_plan(model, specs, capture, autocast)


# peftc.load(model, "a folder or a Hub repository")
load = CompiledModel.from_pretrained
