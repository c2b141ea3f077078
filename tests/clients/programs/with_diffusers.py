"""diffusers with adapters: a UNet alone, and a pipeline of a UNet and a text encoder."""

import json
import os
import tempfile
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.clients.programs.common import main, randomise

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
IMAGE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))


def unet() -> Any:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=4,
    )
    return model.eval()


def total(model: Any, **more: Any) -> float:
    with torch.no_grad():
        return float(model(IMAGE, 10, HIDDEN, **more).sample.double().sum())


def merged(model: Any) -> int:
    return sum(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))


def adapted() -> Any:
    model = unet()
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), "one")
    return randomise(model)


def one_adapter() -> Any:
    model = adapted()
    found: list[Any] = [total(unet()), total(model), model.active_adapters()]
    found += [total(model, cross_attention_kwargs={"scale": 0.5}), total(model)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_lora_adapter(folder, adapter_name="one")
        (name,) = os.listdir(folder)
        return [*found, name, sorted(load_file(f"{folder}/{name}"))]


def several() -> Any:
    state = get_peft_model_state_dict(adapted(), adapter_name="one")
    model = unet()
    model.load_lora_adapter(dict(state), prefix=None, adapter_name="a")
    found: list[Any] = [total(model)]
    model.load_lora_adapter({key: 2 * value for key, value in state.items()}, prefix=None, adapter_name="b")
    found += [model.active_adapters()]
    model.set_adapters(["a", "b"], [0.7, 0.2])
    found += [total(model)]
    model.set_adapters("a")
    model.disable_adapters()
    found += [total(model)]
    model.enable_adapters()
    found += [total(model)]
    model.delete_adapters("b")
    return [*found, sorted(model.peft_config), total(model)]


def fusing() -> Any:
    model = adapted()
    model.fuse_lora(lora_scale=0.5)
    found: list[Any] = [total(model), merged(model)]
    model.unfuse_lora()
    model.set_adapters("one")
    found += [total(model), merged(model)]
    model.unload_lora()
    found += [total(model), sum(isinstance(layer, BaseTunerLayer) for layer in model.modules())]
    model.add_adapter(LoraConfig(r=2, target_modules=TARGETS), "new")
    return [*found, total(model), sorted(model.peft_config)]


def pipeline(folder: str) -> Any:
    torch.manual_seed(1)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    with open(f"{folder}/vocab.json", "w") as file:
        json.dump(words, file)
    with open(f"{folder}/merges.txt", "w") as file:
        file.write("#version: 0.2\n")
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=8, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=16),
        unet=unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, **more: Any) -> float:
    generator = torch.Generator().manual_seed(5)
    made = pipe("a b", num_inference_steps=2, height=8, width=8, output_type="latent", generator=generator, **more)
    return float(made.images.double().sum())


def whole_pipeline() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        source = pipeline(folder)
        source.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
        source.text_encoder.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TEXT))
        randomise(source.unet)
        randomise(source.text_encoder, 2)
        layers = {
            "unet_lora_layers": get_peft_model_state_dict(source.unet),
            "text_encoder_lora_layers": get_peft_model_state_dict(source.text_encoder),
        }
        StableDiffusionPipeline.save_lora_weights(folder, **layers)
        name = "pytorch_lora_weights.safetensors"
        found: list[Any] = [sorted(load_file(f"{folder}/{name}"))]
        pipe = pipeline(folder)
        found += [drawn(pipe)]
        pipe.load_lora_weights(folder, weight_name=name, adapter_name="x")
        found += [drawn(pipe), pipe.get_active_adapters(), drawn(pipe, cross_attention_kwargs={"scale": 0.3})]
        pipe.load_lora_weights(folder, weight_name=name, adapter_name="y")
        pipe.set_adapters(["x", "y"], adapter_weights=[0.5, 0.25])
        found += [drawn(pipe), pipe.get_list_adapters()]
        pipe.delete_adapters("y")
        pipe.set_adapters("x")
        pipe.fuse_lora(lora_scale=0.7)
        found += [drawn(pipe)]
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        return [*found, drawn(pipe)]


TOPICS = {function.__name__: function for function in (one_adapter, several, fusing, whole_pipeline)}

if __name__ == "__main__":
    main(TOPICS)
