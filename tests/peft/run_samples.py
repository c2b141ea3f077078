"""Run the samples of one of PEFT's documents, in a folder where the Hub's names are tiny local models.

python -m peftc.peft -m tests.peft.run_samples models.md
"""

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import IA3Model, LoraConfig, LoraModel, PeftMixedModel, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

SAMPLES = Path(__file__).with_name("samples.md")
IDS = torch.tensor([[5, 6, 7, 8]])
SMALL = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def samples(document: str) -> list[str]:
    """The code blocks of a document."""
    section = SAMPLES.read_text().split(f"## {document}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^```py\n(.*?)^```", section, flags=re.S | re.M)


def bert(cls: Any) -> Any:
    """As wide and deep as bert-base, whose sizes the samples name."""
    return cls(transformers.BertConfig(**SMALL, hidden_size=768, num_hidden_layers=12, intermediate_size=8))


def t5(width: int) -> Any:
    config = transformers.T5Config(**SMALL, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def opt() -> Any:
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, **sizes))


def falcon() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL, **sizes))


MODELS: dict[str, Callable[[], Any]] = {
    "facebook/opt-350m": opt,
    "tiiuae/falcon-40b": falcon,
    "t5-base": lambda: t5(768),
    # 36 layers of 1280, but next to nothing in them beside attention.
    "gpt2-large": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SMALL, n_embd=1280, n_layer=36, n_head=20, n_inner=4)
    ),
    "bert-base-cased": lambda: bert(transformers.BertForPreTraining),
    "kakaobrain/kogpt": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(**SMALL, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_inner=48)
    ),
}
ADAPTERS = {
    "ybelkada/opt-350m-lora": ("facebook/opt-350m", ["q_proj", "v_proj"]),
    "smangrul/falcon-40B-int4-peft-lora-sfttrainer-sample": ("tiiuae/falcon-40b", ["query_key_value"]),
    "first": ("facebook/opt-350m", ["q_proj"]),
    "second": ("facebook/opt-350m", ["v_proj"]),
}
NEEDED = {
    "base_tuner.md": ["facebook/opt-350m"],
    "configurations_and_models.md": ["facebook/opt-350m"],
    "models.md": ["facebook/opt-350m", "bert-base-cased", "gpt2-large", "t5-base"],
    "tuners.md": ["tiiuae/falcon-40b", "t5-base", "kakaobrain/kogpt"],
}


def prepare(names: list[str]) -> None:
    """Put the models, and the adapters on them, where the Hub's names say."""
    for name in names:
        MODELS[name]().save_pretrained(name)
    for name, (base, targets) in ADAPTERS.items():
        if base in names:
            model = transformers.AutoModelForCausalLM.from_pretrained(base)
            get_peft_model(model, LoraConfig(target_modules=targets, task_type=TaskType.CAUSAL_LM)).save_pretrained(
                name
            )
    if "t5-base" in names:
        words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "Predict", "if", "sentiment"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained("t5-base")


def around(document: str) -> dict[str, Any]:
    """What the samples use and do not define."""
    found: dict[str, Any] = {"torch": torch, "PeftMixedModel": PeftMixedModel, "inputs": IDS, "data": IDS}
    found |= {"path_to_adapter1": "first", "path_to_adapter2": "second", "rank": "cpu"}
    found["AutoModelForTokenClassification"] = transformers.AutoModelForTokenClassification
    found |= {"saved": lambda: transformers.AutoModelForCausalLM.from_pretrained("facebook/opt-350m"), "pushed": []}
    if document in ("base_tuner.md", "models.md"):
        model = get_peft_model(opt(), LoraConfig(task_type=TaskType.CAUSAL_LM))
        found |= {"model": model, "model_peft": model}
    if document == "tuners.md":
        found |= {"t5_model": t5(768), "tokenizer": transformers.AutoTokenizer.from_pretrained("t5-base")}
        found["tokenizer"].eos_token = "</s>"
        vars(sys.modules["transformers"])["ia3Config"] = (
            object()
        )  # A sample imports it, and no version of transformers has it.
        load = transformers.GPTJForCausalLM.from_pretrained

        def without_bits(*args: Any, load_in_8bit: bool = False, torch_dtype: Any = None, **kwargs: Any) -> Any:
            return load(*args, dtype=torch_dtype, **kwargs)

        vars(transformers)["GPTJForCausalLM"].from_pretrained = without_bits
    return found


def results(space: dict[str, Any]) -> dict[str, Any]:
    """What is left in the names of the samples."""
    found: dict[str, Any] = {}
    for name, value in space.items():
        if isinstance(value, PeftModel | LoraModel | IA3Model):
            found[name] = [type(value).__name__, sum(p.numel() for p in value.parameters() if p.requires_grad)]
        elif name in ("prompt_encoder", "prefix_encoder", "prompt_embedding"):
            found[name] = list(value(torch.arange(20)[None]).shape)
        elif name == "merged_model":
            found[name] = [type(value).__name__, type(value) is type(MODELS["tiiuae/falcon-40b"]())]
    return found


if __name__ == "__main__":
    import os

    document, root = sys.argv[1], os.getcwd()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare(NEEDED[document])
        space = around(document)
        made: list[dict[str, Any]] = []
        for code in samples(document):
            code = code.replace("base_model = ...", "base_model = saved()").replace("your-name/", "user/")
            code = code.replace("lora_model.push_to_hub", "pushed.append")
            exec(compile(code, document, "exec"), space)
            made.append(results(space))
        os.chdir(root)
    print(json.dumps(made))
