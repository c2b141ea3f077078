"""The graph of a compiled model: its call, its copies, and what can be read off it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, fx, nn

from peftc.architectures import role_of
from peftc.errors import AdapterError, nearest_hint
from peftc.graph.region import call, parameters_of
from peftc.graph.sites import index_sites
from peftc.plan import Plan
from peftc.plan.explain import site_lines
from peftc.rewrite.build import parked
from peftc.rewrite.calling import calling
from peftc.rewrite.checkpointing import let_gradients_through
from peftc.rewrite.generating import generating
from peftc.rewrite.learning import watch_first_step, watch_steps, with_penalty
from peftc.rewrite.mixed import mixed
from peftc.rewrite.passes import Ran
from peftc.rewrite.program import Program
from peftc.rewrite.provenance import annotated, inserted_lines
from peftc.rewrite.route import refuse_names
from peftc.specs import AdapterSpec
from peftc.view.groups import span, unnumbered


@dataclass(frozen=True, eq=False)
class BaseModel:
    """What `base_model` is to all who ask for it: PEFT's users find the base as its `model`, those of transformers call it
    and read its attributes as those of the model's body.
    """

    model: nn.Module

    def _body(self) -> Any:
        base: Any = vars(self)["model"]
        return getattr(base, "base_model", base)

    def __getattr__(self, name: str) -> Any:
        if "model" not in vars(self):
            raise AttributeError(name)
        return getattr(self._body(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call of the body."""
        return self._body()(*args, **kwargs)


def called(
    program: Program,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: Sequence[str] | None,
    several: bool = False,
) -> Any:
    """What `run`, the model's call or its `generate` (which calls it `several` times), gives; `names`: of its rows."""
    if several and names is not None:
        _require_one_each(run, args, kwargs, names)
    with calling(program, args, kwargs, names) as tell:
        if names is None:
            output = run(*args, **kwargs)
        else:
            with mixed(program, names, several=several):
                output = run(*args, **kwargs)
        tell(output)
        return output


def _require_one_each(
    generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> None:
    """Raise AdapterError if there are not as many names as prompts. The calls inside have a row for every beam, too."""
    own = getattr(getattr(generate, "__self__", None), "main_input_name", "input_ids")
    given = (args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", own, "inputs_embeds")))
    prompts = next((one for one in given if isinstance(one, Tensor)), None)
    if prompts is not None and not isinstance(names, str) and len(names) != len(prompts):
        raise AdapterError(f"adapter_names: {len(names)} for {len(prompts)} prompts; give one for each of them")


def trainable(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a model."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def trainable_line(model: nn.Module) -> str:
    """The two numbers and their ratio in PEFT's words."""
    own, total = trainable(model)
    return f"trainable params: {own:,} || all params: {total:,} || trainable%: {100 * own / total:.4f}"


class CompiledGraph(fx.GraphModule):
    """A GraphModule around the rewritten model `base`: what of a CompiledModel is no adapter's business."""

    program: Program
    base: nn.Module

    def __init__(self, program: Program) -> None:
        graph = fx.Graph()
        node = call(graph, "base", parameters_of(program.base.forward))
        rest = next((n for n in graph.nodes if str(n.target).startswith("**")), None)
        if rest is not None:
            with graph.inserting_before(node):
                node.replace_input_with(rest, graph.call_function(refuse_names, (rest,)))
        graph.output(node)
        # A stand-in for the base until the graph is compiled: torch.fx would compile every host in it anew.
        root = nn.Module()
        root.base = nn.Module()
        super().__init__(root, graph, class_name="CompiledModel")
        self.base = program.base
        self.__dict__["program"] = program
        self.training = program.base.training
        watch_steps(program)
        watch_first_step(program)

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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or "_modules" not in self.__dict__:
                raise
            return getattr(self.base, name)

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's call. `adapter_names`: the adapter of every row of the batch, `__base__` for none.

        In train(), the `loss` of what is returned has the penalty (see `penalty`) in it; not where rows are named.

        Rows with an adapter get what they would get alone with it, in training too; which adapters are active does not
        count. For every method but those of virtual tokens, modules_to_save included. Raises AdapterError, MergeError.
        """
        output = called(self.program, super().__call__, args, kwargs, adapter_names)
        return with_penalty(self.program, output) if self.training and adapter_names is None else output

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """`generate` of the base model; `adapter_names` as in a call, one per prompt.

        Of a program (capture='export') if it takes what a step of generation has. Raises AdapterError.
        """
        generate = getattr(self.base, "generate")  # noqa: B009 - nn.Module's attributes are tensors or modules by type
        with generating(self.program):
            return called(self.program, generate, args, kwargs, adapter_names, several=True)

    def _require_python(self, what: str, why: str) -> None:
        """Raise AdapterError if the model runs as one program, where `what` has no effect or a wrong one."""
        if self.plan.capture == "export":
            raise AdapterError(
                f"{what}: {why}; this model runs as one program, captured with capture='export'. Compile it with"
                " capture='modules', load the adapter there and do it then."
            )

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As of the base model. The reentrant kind needs no `enable_input_require_grads` here, whatever the input is."""
        self._require_python("gradient_checkpointing_enable", "which acts where modules are called")
        enable = getattr(self.base, "gradient_checkpointing_enable")  # noqa: B009 - as in generate
        enable(*args, **kwargs)
        let_gradients_through(self.base)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As of the base model. Raises AdapterError, with nothing changed, if an adapter changes or saves an embedding."""
        self._require_python("resize_token_embeddings", "after which the graph's sizes would be wrong")
        base: Any = self.base
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]
        touched = [
            site.fqn
            for site in self.plan.sites.values()
            if any(self.program.modules[site.owner] is end for end in ends)
        ]
        touched += [name.rpartition(".")[0] for name in self.program.overlay.present]
        if touched:
            raise AdapterError(
                f"{touched[0]}: adapters have tensors of its size, so the vocabulary can't be resized now. Resize the model"
                " first, and compile it then."
            )
        return base.resize_token_embeddings(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # The copy is known before it is filled: what it holds may refer to it (a bound method, a hook).
        new = memo[id(self)] = self._blank()
        CompiledGraph.__init__(new, copy.deepcopy(self.program, memo))
        new.__dict__.update(copy.deepcopy(self._own_state(), memo))
        return new

    def __copy__(self) -> Self:
        new = self._made(self.program)
        new.__dict__.update(self._own_state())
        return new

    def __reduce__(self) -> Any:
        return type(self).__mro__[1], (self.program,), self._own_state()

    def _made(self, program: Program) -> Self:
        new = self._blank()
        CompiledGraph.__init__(new, program)
        return new

    def _blank(self) -> Self:
        # torch.fx gives every GraphModule a class of its own; the one that was written is above it.
        written: Any = type(self).__mro__[1]
        return written.__new__(written)

    def _own_state(self) -> dict[str, Any]:
        """Attributes and hooks that were put on this model, beside what its constructor makes."""
        made = self._made(self.program).__dict__
        return {name: v for name, v in self.__dict__.items() if name not in made or name.endswith("_hooks")}

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    __str__ = __repr__

    @property
    def base_model(self) -> "BaseModel":
        """The base model where code written for PEFT looks for it: `.base_model.model`."""
        return BaseModel(self.base)

    def get_base_model(self) -> nn.Module:
        """The rewritten base model."""
        return self.base

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, adapters included."""
        return trainable(self)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers and their ratio in PEFT's words."""
        print(trainable_line(self))  # noqa: T201 (what it is for)

    def site_code(self) -> dict[str, str]:
        """The generated code of every host; hosts with equal code together (`layers.{0–29}.self_attn.q_proj, …`)."""
        groups: dict[str, dict[str, list[str]]] = {}
        for host, binding in self.program.installed.items():
            groups.setdefault(binding.code.text.strip(), {}).setdefault(unnumbered(host), []).append(host)
        return {", ".join(span(hosts) for hosts in shapes.values()): code for code, shapes in groups.items()}

    @property
    def passes(self) -> dict[str, tuple[Ran, ...]]:
        """By host, the passes that made the graph it runs now, in order, with the number of nodes before and after each."""
        return {host: binding.code.ran for host, binding in self.program.installed.items()}

    def graph_of(self, fqn: str) -> fx.Graph:
        """A copy of the graph that host `fqn` runs now, to look at or to run passes on.

        Raises AdapterError if no active adapter changes it. Example: print(compiled.graph_of("model.layers.0.mlp.up_proj"))
        """
        binding = self.program.installed.get(fqn)
        if binding is None:
            raise AdapterError(f"{fqn!r} runs no rewritten graph now.{nearest_hint(fqn, self.program.installed)}")
        return copy.deepcopy(binding.code.graph)

    def print_code(self) -> None:
        """Print the code of every host, with what inserted its lines: the adapter, the rule and the rule's own line."""
        bound = {binding.code.text.strip(): binding for binding in self.program.installed.values()}
        for where, code in self.site_code().items():
            print(f"# {where or type(self.base).__name__}\n{annotated(code, bound[code])}\n")  # noqa: T201 (what it is for)

    def explain(self, fqn: str) -> str:
        """What is at module or parameter `fqn`: which adapters change it and how, which don't and why, and which nodes of
        its graph came from what.

        Raises AdapterError, with the nearest names, if there is no such place. Example: print(compiled.explain("lm_head"))
        """
        with parked(self.program) as base:
            index = index_sites(base, role_of(base))
        known = {**index.modules, **index.inner}
        if fqn not in known:
            inside = [name for name in known if name.endswith(f".{fqn}")][:3]
            hint = f" There are {', '.join(map(repr, inside))}." if inside else nearest_hint(fqn, known)
            raise AdapterError(f"no module or parameter {fqn!r}.{hint}")
        lines, installed = site_lines(self.plan, index, fqn), self.program.installed
        site = self.plan.sites.get(fqn)
        binding = installed.get(site.owner if site is not None else fqn)
        if binding is None and site is not None:
            binding = installed.get("")  # The one graph of a whole model.
        if binding is not None:
            lines += inserted_lines(binding, None if site is None else fqn)
        elif site is not None:
            here = [edit.adapter for edit in self.plan.edits if edit.site == fqn]
            merged = [name for name in self.merged_adapters if name in here]
            lines.append(f"  merged: {', '.join(merged)}" if merged else "  none of them is active")
        return "\n".join(lines)
