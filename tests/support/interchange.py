"""Adapters to exchange with peft: the models and configs, and either library's side of each."""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftc
from tests.support.compare import FLOAT64, SEVERAL_LAYERS, assert_close, first_tensor
from tests.support.models import Attending, Everything, inputs_for, tiny, token_ids

CONFIGS = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
LAYERS = ["embed", "linear", "transposed", "conv1d", "conv2d", "conv3d"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SEQ_CLS = "AutoModelForSequenceClassification"
MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": Everything,
    "attention": Attending,
    "tied llama": lambda: tiny("llama", tie_word_embeddings=True),
    "bert classifier": lambda: tiny("bert", SEQ_CLS),
    "llama classifier": lambda: tiny("llama", SEQ_CLS, pad_token_id=0),
    "roberta tagger": lambda: tiny("roberta", "AutoModelForTokenClassification"),
    **{name: lambda name=name: tiny(name) for name in ("llama", "gpt2", "bert", "t5", "bart", "vit", "mixtral")},
}


def lora(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **fields}


def ia3(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "IA3", **fields}


# The model, and the fields of the config.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("layers", lora(target_modules=[name])) for name in LAYERS},
    "patterns": (
        "layers",
        lora(
            target_modules=LAYERS,
            rank_pattern={"conv.d": 2, "linear": 5},
            alpha_pattern={"^conv2d": 3, "embed": 7.5},
            use_rslora=True,
        ),
    ),
    "lora_bias": ("layers", lora(target_modules=["linear", "transposed", "conv1d", "conv3d"], lora_bias=True)),
    "all biases": ("layers", lora(target_modules=["linear", "conv1d"], bias="all")),
    "adapted biases": ("gpt2", lora(target_modules=["c_attn", "mlp.c_proj"], bias="lora_only")),
    "modules_to_save": (
        "layers",
        lora(target_modules=["linear"], modules_to_save=["head", "norm", "conv2d", "embed"]),
    ),
    "nn.MultiheadAttention": ("attention", lora(target_modules=["attn", "head"])),
    "defaults": ("gpt2", lora()),
    "wte": ("gpt2", lora(target_modules=["wte", "wpe", "c_attn"])),
    "layers_to_transform": (
        "llama",
        lora(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2], layers_pattern=["layers"]),
    ),
    "all-linear": ("llama", lora(target_modules="all-linear", exclude_modules=["k_proj"], task_type="CAUSAL_LM")),
    "regex": ("tied llama", lora(target_modules=r".*(embed_tokens|[12].*v_proj)")),
    "embed_tokens": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "lm_head": ("llama", lora(target_modules=["lm_head", "q_proj"])),
    "tied embed_tokens": ("tied llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "tied lm_head": ("tied llama", lora(target_modules=["lm_head"])),
    "tied both": ("tied llama", lora(target_modules=["embed_tokens", "lm_head"])),
    "tied and saved": ("tied llama", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "tied, one saved": ("tied llama", lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "encoder head": ("bert classifier", lora(target_modules=["query"], task_type="SEQ_CLS")),
    "decoder head": ("llama classifier", lora(target_modules=["q_proj"], task_type="SEQ_CLS")),
    "token head": ("roberta tagger", lora(target_modules=["query"], task_type="TOKEN_CLS")),
    "image head": ("vit", lora(target_modules=["q_proj", "projection"], modules_to_save=["classifier"])),
    "bart": ("bart", lora(target_modules="all-linear", task_type="SEQ_2_SEQ_LM")),
    "t5": ("t5", lora(target_modules=["encoder.embed_tokens", "q", "wo"], task_type="SEQ_2_SEQ_LM")),
    "experts": ("mixtral", lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "one expert weight": (
        "mixtral",
        lora(target_modules=[], target_parameters=EXPERTS[1:], rank_pattern={"down_proj": 3}),
    ),
    "ia3 of outputs": (
        "layers",
        ia3(target_modules=["linear", "transposed", "conv2d", "conv3d"], feedforward_modules=[]),
    ),
    "ia3 of inputs": (
        "layers",
        ia3(
            target_modules=["linear", "transposed", "conv2d", "conv3d"],
            feedforward_modules=["linear", "transposed", "conv2d", "conv3d"],
            modules_to_save=["head"],
        ),
    ),
    "ia3 llama": ("llama", ia3()),
    "ia3 gpt2": ("gpt2", ia3(modules_to_save=["ln_f"])),
    "ia3 t5": ("t5", ia3(task_type="SEQ_2_SEQ_LM")),
    "ia3 head": ("bert classifier", ia3(task_type="SEQ_CLS")),
}
_PROMPTS: dict[str, dict[str, Any]] = {
    "prompt": {"peft_type": "PROMPT_TUNING"},
    "prefix": {"peft_type": "PREFIX_TUNING"},
    "projected prefix": {"peft_type": "PREFIX_TUNING", "prefix_projection": True, "encoder_hidden_size": 24},
    "p-tuning": {"peft_type": "P_TUNING", "encoder_hidden_size": 24},
    "p-tuning lstm": {
        "peft_type": "P_TUNING",
        "encoder_hidden_size": 12,
        "encoder_reparameterization_type": "LSTM",
    },
}
PROMPTED = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert classifier": "SEQ_CLS", "gpt2": "CAUSAL_LM"}
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name} {model}": (model, {"num_virtual_tokens": 4, "task_type": task, **fields})
    for name, fields in _PROMPTS.items()
    for model, task in PROMPTED.items()
} | {
    "prompt of the encoder only": (
        "t5",
        {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": 4,
            "task_type": "SEQ_2_SEQ_LM",
            "num_transformer_submodules": 1,
        },
    )
}
ALL = {**CASES, **PROMPTS}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 2, "down_proj": 5},
    "alpha_pattern": {"embed_tokens": 7, "0.*q_proj": 1},
}
# The serving form: with the rank that all sites get.
SERVED: dict[str, tuple[str, dict[str, Any], int]] = {
    "patterns": ("llama", lora(target_modules=["q_proj", "down_proj", "embed_tokens"], **PATTERNS), 5),
    "patterns and rslora": (
        "llama",
        lora(target_modules=r".*(q_proj|down_proj|embed_tokens)", use_rslora=True, **PATTERNS),
        5,
    ),
    "rslora": ("gpt2", lora(target_modules=["c_attn", "wte"], use_rslora=True), 4),
    "smaller ranks": ("llama", lora(target_modules=["q_proj", "lm_head"], rank_pattern={"q_proj": 2, "lm_head": 3}), 3),
    "layers": ("llama", lora(target_modules=["q_proj"], layers_to_transform=[2], layers_pattern=["layers"]), 4),
    "excluded": ("llama", lora(target_modules="all-linear", exclude_modules=["q_proj", "layers.1.mlp.up_proj"]), 4),
    "from a factored weight": ("llama", lora(target_modules=["q_proj"], init_lora_weights="olora"), 8),
}


class Bench:
    """A model of a case, and the adapter in either library, moved away from its start."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        # peft keeps prompts in float32, and Mixtral's experts run a product that has no float64.
        self.double = name != "mixtral" and "num_virtual_tokens" not in fields
        self.tolerance = FLOAT64 if self.double else SEVERAL_LAYERS
        self.model: Any = MODELS[name]().eval().to(torch.float64 if self.double else torch.float32)
        self.fields = dict(fields)

    def theirs(self) -> Any:
        return perturbed(quietly(peft.get_peft_model, copy.deepcopy(self.model), self.config()), 7)

    def config(self) -> Any:
        fields = dict(self.fields)
        return CONFIGS[fields.pop("peft_type")](**fields)

    def ours(self, seed: int = 8) -> peftc.CompiledModel:
        return perturbed(peftc.compile(self.model, self.fields), seed)

    def output(self, model: Any) -> Tensor:
        if isinstance(self.model, Everything):
            given = {"ids": token_ids()}
        elif isinstance(self.model, Attending):
            given = {"x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))}
        else:
            given = inputs_for(self.model.config.model_type)
        with torch.no_grad():
            return first_tensor(
                model(**{k: v.double() if self.double and v.is_floating_point() else v for k, v in given.items()})
            )

    def assert_adapts(self, y: Tensor) -> None:
        """`y` is not what the bare model gives."""
        base = self.output(self.model)
        assert y.shape != base.shape or float((y - base).abs().max() / base.abs().max()) > 1e-4

    def assert_in_peftc(self, folder: Path, expected: Tensor, **options: Any) -> peftc.CompiledModel:
        """What peftc loads gives `expected`."""
        loaded = peftc.load(self.model, folder, **options)
        assert_close(self.output(loaded), expected, "in peftc", self.tolerance)
        return loaded

    def assert_in_peft(self, folder: Path, expected: Tensor) -> Any:
        """What peft loads, with no key missing or left over, gives `expected`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()
            left = loaded.load_adapter(folder, "default").unexpected_keys
        # peft puts the one tensor of a prompt in place by hand, and lists it as unexpected.
        assert left == (["prompt_embeddings"] if "num_virtual_tokens" in self.fields else [])
        assert_close(self.output(loaded), expected, "in peft", self.tolerance)
        return loaded


def quietly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call peft without its remarks on ties, Conv1D and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def perturbed(model: Any, seed: int) -> Any:
    """`model` in eval mode, everything it trains moved away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model.eval()


def config_in(folder: Path) -> dict[str, Any]:
    """The config in `folder`; lists without their order and repetitions, which have no meaning."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    return {name: set(value) if isinstance(value, list) else value for name, value in fields.items()}


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], pickled: bool = False) -> None:
    """An adapter's folder as it came from elsewhere."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    own = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    if pickled:
        torch.save(own, folder / "adapter_model.bin")
    else:
        save_file(own, folder / "adapter_model.safetensors")
