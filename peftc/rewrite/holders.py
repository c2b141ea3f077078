"""The modules that hold what adapters add, under PEFT's names."""

from typing import Any, cast

from torch import Tensor, nn

from peftc.errors import AdapterError
from peftc.rewrite.walking import Added

# The name of the one parameter of a leaf, see `Vectors`.
VALUE = "value"


class Holder(nn.Module):
    """Holds parameters of one adapter under their PEFT names. Generated code reads them and never calls it; scripts may.

    So a hook on it would never run, and one of accelerate's that offloads would leave the code to compute with the
    memory of nothing: that is refused, with AdapterError.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook" and getattr(value, "offload", False):
            raise AdapterError(
                "accelerate can't offload the parameters of an adapter: generated code reads them past its hooks."
                " Offloading has begun, so load the model again, and compile it without offloading."
            )
        super().__setattr__(name, value)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """Raises AdapterError: it would never run."""
        raise AdapterError(
            "a hook on the tensors of an adapter would not run: generated code reads them, and they are never called. Put"
            " it on the adapted module"
        )

    register_forward_pre_hook = register_forward_hook

    def forward(self, x: Tensor) -> Tensor:
        """What a factor of a linear does with `x` (…, in). Raises NotImplementedError of other tensors."""
        weight = self._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            raise NotImplementedError("this holds tensors of an adapter, and is no linear")
        return nn.functional.linear(x, weight, self._parameters.get("bias"))

    @property
    def in_features(self) -> int:
        """Of a factor of a linear."""
        return self.get_parameter("weight").shape[1]

    @property
    def out_features(self) -> int:
        """Of a factor of a linear."""
        return self.get_parameter("weight").shape[0]


class Group(Added, nn.Module):
    """Holds what adapters add at one of several weights of a module."""


class Container(Added, nn.ModuleDict):
    """What adapters add to a module under one name, by adapter."""

    def _get_name(self) -> str:
        return "ModuleDict"  # As PEFT's print.

    def __setitem__(self, key: str, module: nn.Module) -> None:
        if isinstance(self._modules.get(key), Holder) and module is not self._modules[key]:
            raise AdapterError(
                f"{key}: generated code reads the tensors that are there, and not another module's: copy values into its"
                " parameters"
            )
        super().__setitem__(key, module)


class _Through(dict[str, Any]):
    """Parameters by adapter name; each is also the one parameter of a module of its own, `leaves[name]`."""

    leaves: dict[str, nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.leaves = {}

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        leaves = self.__dict__.setdefault("leaves", {})  # A pickle brings them later.
        leaves.setdefault(name, Holder())._parameters[VALUE] = value

    # The leaf stays: code reads it, and FSDP1 takes parameters out and puts others in, in every call.

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.leaves[name]._parameters[VALUE]

    def pop(self, name: str, *default: Any) -> Any:
        if name in self.leaves:
            self.leaves[name]._parameters.pop(VALUE, None)
        return super().pop(name, *default)


class Vectors(Added, nn.ParameterDict):
    """Parameters whose names end in an adapter's (`ia3_l.default`), which no code may depend on.

    So code reads each from a leaf, a module with one parameter `value`. Whatever exchanges the parameter here (loading
    with assign, functional_call, sharding) exchanges it in the leaf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_parameters"] = _Through()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        leaves = (
            cast(_Through, self._parameters).leaves if isinstance(self.__dict__.get("_parameters"), _Through) else {}
        )
        if name in leaves and isinstance(value, Tensor) and name not in self._parameters:
            leaves[name].__dict__[VALUE] = value  # What FSDP1 gives in the parameter's place for a while.

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        leaf = cast(_Through, self._parameters).leaves.get(name)
        if leaf is not None:
            leaf.__dict__.pop(VALUE, None)

    def leaf(self, adapter: str) -> nn.Module:
        """The leaf of an adapter's parameter."""
        return cast(_Through, self._parameters).leaves[adapter]


def code_path(key: str) -> str:
    """Where generated code finds the parameter with checkpoint key `key`, relative to its part."""
    return key if "." in key else f"{key}.{VALUE}"
