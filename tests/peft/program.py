"""A program written for peft, which knows nothing of peftc: what it finds, by topic, as JSON.

python -m tests.peft.program out.json                       # with peft
python -m peftc.peft -m tests.peft.program out.json         # with peftc in its place
"""

import copy
import json
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file

from tests.support.small import small_model

IDS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])
TOPICS: dict[str, Callable[[], Any]] = {}


def topic(function: Callable[[], Any]) -> Callable[[], Any]:
    TOPICS[function.__name__] = function
    return function


def base(cls: str = "LlamaForCausalLM", **more: Any) -> Any:
    torch.manual_seed(0)
    return small_model("llama", cls, **more)


def plain(name: str) -> str:
    return name.replace(".base_layer", "")


def randomise(model: Any, seed: int = 1) -> Any:
    """Give all adapters values that depend on their sorted names alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted((plain(name), parameter) for name, parameter in model.named_parameters()):
        if any(part in name for part in ("lora_", "ia3_", "prompt_encoder", "modules_to_save")):
            value = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = value + 1 if "ia3_" in name else value
    return model


def lora(**more: Any) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **more)
    return randomise(get_peft_model(base(), config))


def total(model: Any, **more: Any) -> float:
    return float(model(IDS, **more).logits.double().sum())


def learning(model: Any) -> list[str]:
    return [plain(name) for name, parameter in model.named_parameters() if parameter.requires_grad]


def two() -> Any:
    model = lora()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
    return randomise(model, 2)


@topic
def names() -> Any:
    model = lora()
    return {
        "classes": [type(model).__name__, type(model.base_model).__name__, type(model.base_model.model).__name__],
        "parameters": sorted(plain(name) for name, _ in model.named_parameters()),
        "state": sorted(plain(name) for name in model.state_dict()),
        "learning": learning(model),
        "counts": model.get_nb_trainable_parameters(),
    }


@topic
def calls() -> Any:
    model = lora()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    gradients = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
    with model.disable_adapter():
        off = total(model)
    generated = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).tolist()
    return [total(model), float(loss), gradients, off, generated]


@topic
def attributes() -> Any:
    model = lora()
    config = model.peft_config["default"]
    return [
        model.active_adapter, model.active_adapters, model.active_peft_config.r, config.peft_type.value,
        config.is_prompt_learning, model.has_active_enabled_adapter, model.modules_to_save,
        sorted(model.base_model.targeted_module_names), model.config.hidden_size, str(model.dtype),
        sorted(config.target_modules), config.inference_mode, model.get_base_model() is model.base_model.model,
    ]  # fmt: skip


@topic
def layers() -> Any:
    model = lora()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    found = [
        isinstance(layer, BaseTunerLayer), isinstance(layer, LoraLayer), isinstance(layer.base_layer, torch.nn.Linear),
        hasattr(layer.get_base_layer(), "base_layer"), dict(layer.r), dict(layer.scaling), dict(layer.lora_alpha),
        layer.merged, list(layer.lora_A.keys()), tuple(layer.lora_A["default"].weight.shape), layer.in_features,
        layer.active_adapters, layer.disable_adapters, float(layer.get_delta_weight("default").sum()),
    ]  # fmt: skip
    layer.set_scale("default", 0.5)
    layer.scale_layer(3.0)
    found += [layer.scaling["default"], total(model)]
    layer.unscale_layer()
    return [*found, layer.scaling["default"], sum(isinstance(m, BaseTunerLayer) for m in model.modules())]


@topic
def merging() -> Any:
    model = lora()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.merge_adapter()
    found = [total(model), layer.merged, layer.merged_adapters, float(layer.base_layer.weight.sum())]
    model.unmerge_adapter()
    found += [layer.merged, total(model)]
    merged = model.merge_and_unload()
    return [*found, type(merged).__name__, total(merged), [n for n, _ in merged.named_parameters() if "lora" in n]]


@topic
def several() -> Any:
    model = two()
    found: list[Any] = [model.active_adapter, sorted(model.peft_config)]
    model.set_adapter("b")
    found += [total(model), learning(model)]
    model.base_model.set_adapter(["default", "b"])
    found += [total(model), model.base_model.active_adapters]
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "w", combination_type="cat")
    model.set_adapter("w")
    found += [total(model), total(model.eval(), adapter_names=["default", "b"])]
    model.delete_adapter("w")
    return [*found, sorted(model.peft_config)]


@topic
def files() -> Any:
    model = two()
    model.peft_config["default"].base_model_name_or_path = "somewhere"  # Scripts change configs.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written = sorted(os.listdir(folder))
        with open(f"{folder}/adapter_config.json") as file:
            config = json.load(file)
        keys = sorted(load_file(f"{folder}/adapter_model.safetensors"))
        loaded = PeftModel.from_pretrained(base(), folder)
        trained = PeftModel.from_pretrained(base(), folder, is_trainable=True)
        trained.load_adapter(f"{folder}/b", "b")
    said = [config["base_model_name_or_path"], config["inference_mode"], sorted(config["target_modules"])]
    found = [type(loaded).__name__, total(loaded), learning(loaded), loaded.peft_config["default"].inference_mode]
    return [written, said, keys, found, loaded.training, learning(trained), sorted(trained.peft_config)]


@topic
def state_dicts() -> Any:
    model, other = lora(), get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    state = get_peft_model_state_dict(model)
    result = set_peft_model_state_dict(other, state)
    whole = lora()
    whole.load_state_dict(model.state_dict())
    return [sorted(state), list(result.unexpected_keys), total(other), total(whole)]


@topic
def copies() -> Any:
    model = two()
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    found = [total(copied), total(pickled)]
    copied.set_adapter("b")
    pickled.set_adapter("b")
    return [*found, model.active_adapter, copied.active_adapter, total(copied), total(pickled), total(model)]


@topic
def ia3() -> Any:
    given = base()
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    before = total(given)
    model = randomise(get_peft_model(given, config))
    found = [type(model.base_model).__name__, total(model), learning(model)]
    return [*found, model.unload() is given, total(given) == before]


def prompts(cls: Any) -> Any:
    model = randomise(get_peft_model(base(), cls(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    found = [
        type(model).__name__, type(model.base_model).__name__, total(model), learning(model),
        sorted(key for key in model.state_dict() if "prompt" in key), model.word_embeddings.weight.shape[0],
        model.transformer_backbone_name, model.prompt_tokens["default"].tolist(), model.active_peft_config.token_dim,
        tuple(model.get_prompt_embedding_to_save("default").shape), model.peft_config["default"].is_prompt_learning,
    ]  # fmt: skip
    again = randomise(get_peft_model(base(), cls(task_type="CAUSAL_LM", num_virtual_tokens=3)), 5)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("word_embeddings")}
    again.load_state_dict(state, strict=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base(), folder)
    return [*found, total(again), total(loaded)]


@topic
def prompt_tuning() -> Any:
    return prompts(PromptTuningConfig)


@topic
def prefix_tuning() -> Any:
    return prompts(PrefixTuningConfig)


@topic
def p_tuning() -> Any:
    return prompts(PromptEncoderConfig)


@topic
def heads() -> Any:
    given = base("LlamaForSequenceClassification", pad_token_id=0, num_labels=3)
    model = get_peft_model(given, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_proj"]))
    head = model.base_model.model.score
    own = [name for name in learning(model) if "lora" not in name]
    return [type(model).__name__, isinstance(head, ModulesToSaveWrapper), isinstance(head, BaseTunerLayer), own]


@topic
def injecting() -> Any:
    model = base()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=3), model, "x")
    randomise(model)
    state = get_peft_model_state_dict(model, adapter_name="x")
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(False)
    return [sorted(model.peft_config), type(model).__name__, sorted(state), total(model), total(copied)]


@topic
def mixed_methods() -> Any:
    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], r=3), mixed=True)
    model.add_adapter("i", LoraConfig(target_modules=["k_proj"], r=2))
    model.set_adapter(["default", "i"])
    return [type(model).__name__, type(model.base_model).__name__, sorted(model.peft_config), model.active_adapters]


@topic
def transformers_adapters() -> Any:
    model = base()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights=False), "one")
    found = [model.active_adapters(), sorted(model.get_adapter_state_dict("one"))]
    model.add_adapter(LoraConfig(target_modules=["v_proj"], r=3), "two")
    found += [model.active_adapters()]
    model.set_adapter("one")
    found += [total(randomise(model))]
    model.disable_adapters()
    found += [total(model)]
    model.enable_adapters()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found += [sorted(load_file(f"{folder}/adapter_model.safetensors"))]
        loaded = base()
        loaded.load_adapter(folder, adapter_name="again")
    found += [total(loaded), sorted(loaded.peft_config), total(model)]
    model.delete_adapter("one")
    return [*found, sorted(model.peft_config)]


WRONG: dict[str, Callable[[], Any]] = {
    "unknown adapter": lambda: lora().set_adapter("nope"),
    "deleting what is not there": lambda: lora().delete_adapter("nope"),
    "targets that match nothing": lambda: get_peft_model(base(), LoraConfig(target_modules=["nope"])),
    "no such folder": lambda: PeftModel.from_pretrained(base(), "/nowhere/at/all"),
    "no such task": lambda: LoraConfig(task_type="X"),
    "no rank": lambda: get_peft_model(base(), LoraConfig(r=0, target_modules=["q_proj"])),
    "no such field": lambda: LoraConfig(rr=1),  # type: ignore[call-arg]
}


@topic
def errors() -> Any:
    """The class that scripts catch."""
    found: dict[str, str] = {}
    for name, call in WRONG.items():
        try:
            call()
            found[name] = "none"
        except Exception as error:
            found[name] = next(cls.__name__ for cls in (ValueError, TypeError, Exception) if isinstance(error, cls))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1], "w") as out:
        json.dump({name: function() for name, function in TOPICS.items()}, out)
