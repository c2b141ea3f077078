"""modules_to_save: a whole module is trained and saved, as a copy that stands in its place while the adapter is active."""

from typing import Any, ClassVar

from torch import nn

from peftc.architectures import role_of
from peftc.graph.hooked import given_class
from peftc.graph.sites import ModuleSite, dtype_name
from peftc.rule import Rule
from peftc.specs import AdapterSpec

MODULES_TO_SAVE = "modules_to_save"


class SavedModule(Rule[Any]):
    """The rule of such an edit. It has no algebra: the copy is called instead, and merging puts its tensors in place."""

    name = MODULES_TO_SAVE
    ops = ("module",)
    spec = AdapterSpec
    container: ClassVar[str | None] = MODULES_TO_SAVE
    whole = True

    def slots(self, spec: Any, site: Any) -> tuple[str, ...]:
        return ("module",)


SAVED = SavedModule()


def saved_site(model: nn.Module, fqn: str) -> ModuleSite:
    """Module `fqn`, to be saved whole, as a site."""
    module = model.get_submodule(fqn)
    first = next(module.parameters(), None)
    return ModuleSite(
        fqn=fqn,
        op="module",
        module=given_class(type(module)).__name__,
        dtype=dtype_name(first.dtype) if first is not None else "float32",
        device=str(first.device) if first is not None else "cpu",
        role=role_of(model)(fqn),
    )
