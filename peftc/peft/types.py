"""PEFT's enums, warnings, errors and constants."""

import enum

from peftc.checkpoint.files import BIN_NAME as WEIGHTS_NAME
from peftc.checkpoint.files import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from peftc.errors import NoMatchError as NoMatchingPeftModuleError
from peftc.errors import PeftcError as PeftError
from peftc.specs.io import CONFIG_NAME

__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "WEIGHTS_NAME",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "PromptEncoderReparameterizationType",
    "PromptTuningInit",
    "TaskType",
]

# The version of PEFT whose names and defaults these are.
VERSION = "0.21.2"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]


class _Text(str, enum.Enum):  # noqa: UP042 - str() of a member is as in PEFT
    """Members are strings, equal to their values. `in` takes values too."""

    @classmethod
    def _missing_(cls, value: object) -> "_Text | None":
        return next((member for member in cls if isinstance(value, str) and member.value == value.upper()), None)


class PeftType(_Text):
    """The methods that PEFT (0.21.2) knows; which of them peftc has, `peftc.registry.spec_classes()` says."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(_Text):
    """What a model is for. Example: LoraConfig(task_type=TaskType.CAUSAL_LM)"""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PromptTuningInit(_Text):
    """How the rows of prompt tuning begin."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(_Text):
    """How multitask prompt tuning begins: as prompt tuning, or from what several tasks have learned."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(_Text):
    """What makes the rows of p-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


class PeftWarning(UserWarning):
    """What scripts written for PEFT filter warnings by."""
