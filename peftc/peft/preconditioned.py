"""PEFT's optimisers that look at both factors of LoRA: LoRA-FA, and the Riemannian one."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftc.errors import AdapterError
from peftc.peft.rooted import root_in

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_riemannian_optimizer"]

_A, _B = ".lora_A.", ".lora_B."
# What LoRA-FA adds to the diagonal before it inverts.
_LEAST = 1e-8


def _factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of every site, by the name of B: of those whose change is B·A."""
    named = dict(model.named_parameters())
    pairs = {name.replace(_A, _B): parameter for name, parameter in named.items() if _A in name}
    both = {name: (a, named[name]) for name, a in pairs.items() if name in named}
    return {name: (a, b) for name, (a, b) in both.items() if b.flatten(1).shape[1] == a.shape[0]}


def _inverse(factor: Tensor, least: float) -> Tensor:
    """(F·Fᵀ + least·1)⁻¹ of a factor (r, n)."""
    gram = factor @ factor.T
    return torch.linalg.pinv(gram + least * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


class LoraFAOptimizer(Optimizer):
    """AdamW, where the gradients of some parameters B are turned into those that change B·A most as a full gradient would.

    `factors`: by B, its A and the scaling, as `create_lorafa_optimizer` says them.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise AdapterError(
                f"LoraFAOptimizer: lr={lr} and eps={eps} can't be negative, and betas={betas} are from 0 on and below 1"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self.factors: dict[nn.Parameter, tuple[nn.Parameter, float]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; what `closure` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._adam(group, parameter, self._direction(parameter))
        return loss

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None, "only such are asked for"
        found = self.factors.get(parameter)
        if found is None:
            return gradient
        a, scaling = found
        turned = _wide(gradient).flatten(1) @ _inverse(_wide(a).flatten(1), _LEAST) / scaling**2
        return turned.reshape(gradient.shape).to(gradient.dtype)

    def _adam(self, group: dict[str, Any], parameter: nn.Parameter, gradient: Tensor) -> None:
        state, (one, two), size = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - one)
        state["exp_avg_sq"].mul_(two).addcmul_(gradient, gradient, value=1 - two)
        if group["correct_bias"]:
            size *= math.sqrt(1 - two ** state["step"]) / (1 - one ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: Any, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A is frozen, and B learns with AdamW by
    gradient · (A·Aᵀ)⁻¹ / scaling².

    The scaling is that of every module; `r` and `lora_alpha`, which PEFT asks for, don't count. Other parameters that train
    learn with AdamW as ever. Raises AdapterError (a ValueError) if `use_rslora` contradicts an active adapter.

    Example: optimizer = create_lorafa_optimizer(model, r=128, lora_alpha=32, lr=7e-5)
    """
    root = root_in(model)
    if use_rslora is not None:
        specs = root.program.plan.adapters
        other = [name for name in root.program.active if getattr(specs[name], "use_rslora", False) is not use_rslora]
        if other:
            raise AdapterError(
                f"use_rslora={use_rslora}: adapter {other[0]!r} says otherwise in its config; leave it out"
            )
        warnings.warn("use_rslora: the configs say it; leave it out", FutureWarning, stacklevel=2)
    scalings = _scalings(root.program)
    pairs = {name: pair for name, pair in _factors(model).items() if id(pair[1]) in scalings}
    for name, parameter in model.named_parameters():
        if _A in name:
            parameter.requires_grad_(False)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    group = {"params": [parameter for _, parameter in trained], "lr": lr, "weight_decay": weight_decay}
    made = LoraFAOptimizer([group], lr=lr)
    made.factors = {b: (a, scalings[id(b)]) for a, b in pairs.values()}
    return made


def _scalings(program: Any) -> dict[int, float]:
    """The scaling of every tensor of adapters that have one, by identity."""
    parts = (part for adapter in program.adapters.values() for part in adapter.parts.values())
    return {
        id(tensor): float(part.edit.constants["scaling"])
        for part in parts
        if "scaling" in part.edit.constants
        for tensor in part.tensors().values()
    }


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimiser that turns the gradients of A into (Bᵀ·B + reg·1)⁻¹ · gradient, and those of B into
    gradient · (A·Aᵀ + reg·1)⁻¹, before it steps (Zhang and Pilanci 2024, arXiv:2402.02347).

    Of linears' factors that train; all else learns as ever. `kwargs` are the optimiser's. Raises AdapterError (a
    ValueError) if there are no such factors, or the optimiser needs a closure; TypeError if it is none.

    Example: optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-4)
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"optimizer_cls: expected a class of optimisers, got {optimizer_cls!r}")
    pairs = [(a, b) for a, b in _factors(model).values() if a.ndim == b.ndim == 2]
    pairs = [(a, b) for a, b in pairs if a.requires_grad and b.requires_grad]
    if not pairs:
        raise AdapterError(
            "create_riemannian_optimizer: no lora_A and lora_B train; it is for LoRA on linears. Activate such an adapter"
            " (set_adapter)"
        )
    if issubclass(optimizer_cls, torch.optim.LBFGS):
        raise AdapterError("create_riemannian_optimizer: LBFGS steps by a closure; take AdamW, or SGD")

    class Riemannian(optimizer_cls):
        """The optimiser on turned gradients."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            """One step."""
            if closure is not None:
                raise AdapterError("the Riemannian optimiser takes no closure, which would make the gradients anew")
            for a, b in pairs:
                _turn(a, b, reg)
            return super().step()

    make: Any = Riemannian
    return make([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr, **kwargs)


def _turn(a: nn.Parameter, b: nn.Parameter, reg: float) -> None:
    if a.grad is not None:
        a.grad.copy_(_inverse(_wide(b).T, reg) @ _wide(a.grad))
    if b.grad is not None:
        b.grad.copy_(_wide(b.grad) @ _inverse(_wide(a), reg))
