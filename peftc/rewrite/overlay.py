"""Overlays: while an adapter is active, a tensor of its own stands for the base's.

Biases that it trains, embeddings that its file brings. The two exchange their values, so that all who hold the parameter
(ties, optimisers, graphs) see what stands there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from peftc.graph.finding import parameter_at
from peftc.rewrite.sharding import exchanged, managed, put, reshard


@dataclass
class Overlay:
    """`present`: by name of a tensor of the base, whose value is in the model; None is the base's own. `aside`: the values
    that are not, by name and owner.
    """

    present: dict[str, str | None] = field(default_factory=dict[str, str | None])
    aside: dict[tuple[str, str | None], Tensor] = field(default_factory=dict[tuple[str, str | None], Tensor])

    def brings(self, name: str, adapter: str) -> bool:
        """Whether `adapter` came with a tensor `name` of its own."""
        return self.present.get(name) == adapter or (name, adapter) in self.aside

    def bring(self, base: nn.Module, name: str, adapter: str, value: Tensor | None = None) -> None:
        """Give `adapter` a tensor `name` of its own: `value`, or a copy of the base's."""
        reshard(base)
        parameter = parameter_at(base, name)
        self.present.setdefault(name, None)
        own = self.base_value(base, name) if value is None else value
        self.aside[name, adapter] = own.to(device=parameter.device, dtype=parameter.dtype, copy=True)

    def base_value(self, base: nn.Module, name: str) -> Tensor:
        """The base's own tensor `name`."""
        return parameter_at(base, name).detach() if self.present.get(name) is None else self.aside[name, None]

    def place(self, base: nn.Module, adapters: Mapping[str, str | None]) -> None:
        """Put tensors by name into the model, those of the adapter named or with None the base's own."""
        wanted = {name: adapter for name, adapter in adapters.items() if self.present[name] != adapter}
        if wanted:
            reshard(base)
        held = managed(base) if wanted else {}
        for name, adapter in wanted.items():
            parameter = parameter_at(base, name)
            value = self.aside.pop((name, adapter)).to(device=parameter.device, dtype=parameter.dtype)
            if id(parameter) in held:  # FSDP2 gathers from the memory that it knows.
                self.aside[name, self.present[name]] = parameter.detach().clone()
                put(parameter, value)
            else:
                self.aside[name, self.present[name]] = exchanged(parameter, value)
            self.present[name] = adapter

    def show(self, base: nn.Module, active: tuple[str, ...]) -> None:
        """Let the tensors of the adapters `active` be in the model; of several for one, that of the last."""
        owners = {name: [adapter for adapter in active if self.brings(name, adapter)] for name in self.present}
        self.place(base, {name: own[-1] if own else None for name, own in owners.items()})

    def drop(self, base: nn.Module, adapter: str) -> None:
        """Forget what `adapter` brought."""
        for name in [name for name in self.present if self.brings(name, adapter)]:
            if self.present[name] == adapter:
                self.place(base, {name: None})
            del self.aside[name, adapter]
            if not any(other is not None for key, other in self.aside if key == name):
                del self.present[name]

    def keep(self) -> None:
        """Make what is in the model now the base's."""
        self.present.clear()
        self.aside.clear()
