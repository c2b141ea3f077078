"""Modules around a base that has adapters, and what is asked of any of them, or of the base itself."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftc.compiled_graph import called
from peftc.graph.sites import transformers_config
from peftc.peft.configs import PeftConfig, spec_of
from peftc.peft.roots import Root, attach, release, require_root, root_of


class Rooted(nn.Module):
    """A module around a base that has adapters, which its root keeps. Attributes that are not found here are the base's."""

    # Where it holds the next module inside; and what names of the base begin with here.
    _inner: str
    _before: str

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self._inner or "_modules" not in self.__dict__:
                raise
            return getattr(getattr(self, self._inner), name)

    def _base(self) -> nn.Module:
        raise NotImplementedError

    @property
    def root(self) -> Root:
        """What stands behind. Raises AdapterError after unloading."""
        return require_root(self._base())

    @property
    def peft_config(self) -> dict[str, Any]:
        """Config by adapter name. What files say of an adapter's origin follows changes of its config."""
        return self.root.configs

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters, in load order."""
        return list(self.root.program.active)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate exactly these adapters, and train them unless `inference_mode`. What is merged is unmerged first."""
        self.root.unmerge()
        self.root.activate(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters train, active or not, or freeze them."""
        self.root.compiled.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off. Raises AdapterError on an unknown name."""
        self.root.delete(adapter_name)


def attach_first(model: nn.Module, config: Any, name: str, autocast: bool) -> Root:
    """Give a model its first adapter here, or one more, which is active then."""
    if isinstance(model, Rooted):
        warnings.warn(
            "the model has adapters already; they stay, and the new one is added to them. unload() first if only the new"
            " one is meant",
            stacklevel=4,
        )
        model = model.root.program.base
    if not isinstance(config, PeftConfig):
        spec_of(config)  # Raises TypeError for what is no config at all.
    name_base(model, config)
    root = attach(model, {name: config}, autocast=autocast)
    root.activate(name, inference_mode=bool(getattr(config, "inference_mode", False)))
    return root


def name_base(model: nn.Module, config: Any) -> None:
    """Let a config say what its base is, as PEFT does."""
    path = getattr(transformers_config(model), "name_or_path", None)
    if isinstance(config, PeftConfig) and path:
        config.base_model_name_or_path = path


def call(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], several: bool = False) -> Any:
    """A call of `base`, or of its `generate` if `several`; `adapter_names` among `kwargs`: the adapters of rows."""
    names, root = kwargs.pop("adapter_names", None), root_of(base)
    run = cast(Any, base).generate if several else base
    if root is None and names is None:
        return run(*args, **kwargs)
    return called(require_root(base).program, run, args, kwargs, names, several)


def unloaded(base: nn.Module, unload: Callable[[Root], nn.Module]) -> nn.Module:
    """What `unload` makes of the root of `base`, which is let go of then; `base`, if it has no adapters."""
    root = root_of(base)
    if root is None:
        return base
    model = unload(root)
    release(root)
    return model


def root_in(model: Any) -> Root:
    """The root of a PeftModel, a tuner model, or a model with injected adapters; torch.compile may have wrapped it.

    Raises AdapterError if it has no adapters.
    """
    inner = getattr(model, "_orig_mod", model)
    return inner.root if isinstance(inner, Rooted) else require_root(inner)


def in_base(model: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a PeftModel (of a tuner model, or of a base) by the names of its base."""
    inner = getattr(model, "_orig_mod", model)
    before = inner._before if isinstance(inner, Rooted) else ""
    return {key.removeprefix(before): value for key, value in state_dict.items()}
