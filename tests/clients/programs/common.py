"""What the client programs share. They are written for peft and know nothing of peftc."""

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests.support.small import small_model

TARGETS = ["q_proj", "v_proj", "down_proj"]


def base(cls: str = "LlamaForCausalLM", **more: Any) -> Any:
    torch.manual_seed(0)
    model = small_model("llama", cls, **{"vocab_size": 99, **more})
    assert model is not None
    return model.train()


def plain(name: str) -> str:
    return name.replace(".base_layer", "").replace("module.", "")


def randomise(model: Any, seed: int = 1) -> Any:
    """Give all adapters values that depend on their sorted names alone: how they are drawn is each library's own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted((plain(name), parameter) for name, parameter in model.named_parameters()):
        if any(part in name for part in ("lora_", "ia3_", "prompt_encoder")):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def total(model: Any) -> float:
    """The sum of the logits of some ids."""
    training = model.training
    with torch.no_grad():
        value = float(model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.double().sum())
    model.train(training)
    return value


def losses(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def main(topics: dict[str, Callable[[], Any]]) -> None:
    """Write what every topic finds to the file that the command line names."""
    warnings.simplefilter("ignore")
    with open(sys.argv[1], "w") as out:
        json.dump({name: function() for name, function in topics.items()}, out)
