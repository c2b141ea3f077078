"""PEFT's names for the methods whose adapters are on modules."""

from collections.abc import Mapping
from typing import NamedTuple

from peftc.peft.types import PeftType


class Method(NamedTuple):
    """A method's module in `peft.tuners`, which is the name of its rules too, its classes of models and of layers, and
    what the names of its tensors begin with.
    """

    module: str
    model: str
    layer: str
    prefix: str


METHODS: Mapping[PeftType, Method] = {
    PeftType.LORA: Method("lora", "LoraModel", "LoraLayer", "lora_"),
    PeftType.IA3: Method("ia3", "IA3Model", "IA3Layer", "ia3_"),
    PeftType.LOHA: Method("loha", "LoHaModel", "LoHaLayer", "hada_"),
    PeftType.LOKR: Method("lokr", "LoKrModel", "LoKrLayer", "lokr_"),
    PeftType.OFT: Method("oft", "OFTModel", "OFTLayer", "oft_"),
    PeftType.BOFT: Method("boft", "BOFTModel", "BOFTLayer", "boft_"),
    PeftType.HRA: Method("hra", "HRAModel", "HRALayer", "hra_"),
    PeftType.MISS: Method("miss", "MissModel", "MissLayer", "miss_"),
    PeftType.ROAD: Method("road", "RoadModel", "RoadLayer", "road_"),
    PeftType.GRALORA: Method("gralora", "GraloraModel", "GraloraLayer", "gralora_"),
    PeftType.C3A: Method("c3a", "C3AModel", "C3ALayer", "c3a_"),
    PeftType.HIRA: Method("hira", "HiraModel", "HiraLayer", "hira_"),
    PeftType.DELORA: Method("delora", "DeloraModel", "DeloraLayer", "delora_"),
    PeftType.VERA: Method("vera", "VeraModel", "VeraLayer", "vera_lambda_"),
    PeftType.LN_TUNING: Method("ln_tuning", "LNTuningModel", "LNTuningLayer", "ln_tuning_"),
    PeftType.ADALORA: Method("adalora", "AdaLoraModel", "AdaLoraLayer", "lora_"),
    PeftType.FOURIERFT: Method("fourierft", "FourierFTModel", "FourierFTLayer", "fourierft_"),
    PeftType.RANDLORA: Method("randlora", "RandLoraModel", "RandLoraLayer", "randlora_"),
    PeftType.VBLORA: Method("vblora", "VBLoRAModel", "VBLoRALayer", "vblora_"),
    PeftType.SHIRA: Method("shira", "ShiraModel", "ShiraLayer", "shira_"),
    PeftType.BEFT: Method("beft", "BeftModel", "BeftLayer", "beft_"),
    PeftType.DEFT: Method("deft", "DeftModel", "DeftLayer", "deft_"),
    PeftType.GLORA: Method("glora", "GloraModel", "GloraLayer", "glora_"),
    PeftType.OSF: Method("osf", "OSFModel", "OSFLayer", "osf_"),
    PeftType.PEANUT: Method("peanut", "PeanutModel", "PeanutLayer", "peanut_"),
    PeftType.POLY: Method("poly", "PolyModel", "PolyLayer", "poly_"),
    PeftType.PSOFT: Method("psoft", "PsoftModel", "PsoftLayer", "psoft_"),
    PeftType.PVERA: Method("pvera", "PveraModel", "PveraLayer", "pvera_lambda_"),
    PeftType.SUPERTUNING: Method("supertuning", "SupertuningModel", "SupertuningLayer", "supertuning_"),
    PeftType.TINYLORA: Method("tinylora", "TinyLoraModel", "TinyLoraLayer", "tinylora_"),
    PeftType.UNILORA: Method("unilora", "UniLoraModel", "UniLoraLayer", "unilora_"),
    PeftType.WAVEFT: Method("waveft", "WaveFTModel", "WaveFTLayer", "waveft_"),
    PeftType.FROD: Method("frod", "FrodModel", "FrodLayer", "frod_"),
    PeftType.ADAMSS: Method("adamss", "AdamssModel", "AdamssLayer", "adamss_"),
    PeftType.TRAINABLE_TOKENS: Method(
        "trainable_tokens", "TrainableTokensModel", "TrainableTokensLayer", "trainable_tokens_"
    ),
}
