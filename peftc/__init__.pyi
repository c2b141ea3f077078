"""peftc: a declarative graph-rewriting compiler for parameter-efficient fine-tuning."""

from peftc.api import calibrate, compile, get_peft_model_state_dict, load, load_spec, plan, set_peft_model_state_dict
from peftc.checkpoint import LoadResult
from peftc.compiled import CompiledModel
from peftc.errors import AdapterError, CaptureError, CheckpointError, ConflictError, ExportError, MergeError, NoMatchError, PeftcError, PlanError, RuleError, SpecError
from peftc.export import preflight, verify
from peftc.graph.ops import Form, Op, Shape, register_op, unregister_op
from peftc.plan import Plan
from peftc.product import Product
from peftc.prompts.rule import PromptRule
from peftc.prompts.specs import PromptSpec
from peftc.registry import register, unregister
from peftc.rewrite.calibration import Calibration
from peftc.rewrite.passes import Pass
from peftc.rewrite.program_passes import program_passes
from peftc.rule import Argument, Param, Rule
from peftc.specs import AdapterSpec, Pattern
from peftc.stream import merge_checkpoint, unmerge_checkpoint
from peftc_rules.adalora.config import AdaLoraConfig
from peftc_rules.adamss.config import AdamssConfig
from peftc_rules.adaption_prompt import AdaptionPromptConfig
from peftc_rules.beft import BeftConfig
from peftc_rules.boft import BOFTConfig
from peftc_rules.c3a import C3AConfig
from peftc_rules.cartridge import CartridgeConfig
from peftc_rules.cpt import CPTConfig
from peftc_rules.deft import DeftConfig
from peftc_rules.delora import DeloraConfig
from peftc_rules.fourierft import FourierFTConfig
from peftc_rules.frod.rules import FrodConfig
from peftc_rules.glora import GloraConfig
from peftc_rules.gralora import GraloraConfig
from peftc_rules.hira import HiraConfig
from peftc_rules.hra import HRAConfig
from peftc_rules.ia3 import IA3Config
from peftc_rules.ln_tuning import LNTuningConfig
from peftc_rules.loha import LoHaConfig
from peftc_rules.lokr import LoKrConfig
from peftc_rules.lora.config import LoraConfig
from peftc_rules.miss import MissConfig
from peftc_rules.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peftc_rules.oft import OFTConfig
from peftc_rules.osf import OSFConfig
from peftc_rules.p_tuning import PromptEncoderConfig
from peftc_rules.peanut import PeanutConfig
from peftc_rules.poly import PolyConfig
from peftc_rules.prefix_tuning import PrefixTuningConfig
from peftc_rules.prompt_tuning import PromptTuningConfig
from peftc_rules.psoft import PsoftConfig
from peftc_rules.pvera import PveraConfig
from peftc_rules.randlora import RandLoraConfig
from peftc_rules.road import RoadConfig
from peftc_rules.shira import ShiraConfig
from peftc_rules.supertuning import SupertuningConfig
from peftc_rules.tinylora import TinyLoraConfig
from peftc_rules.trainable_tokens.config import TrainableTokensConfig
from peftc_rules.unilora import UniLoraConfig
from peftc_rules.vblora import VBLoRAConfig
from peftc_rules.vera import VeraConfig
from peftc_rules.waveft import WaveFTConfig

__all__ = [
    "AdaLoraConfig",
    "AdamssConfig",
    "AdapterError",
    "AdapterSpec",
    "AdaptionPromptConfig",
    "Argument",
    "BOFTConfig",
    "BeftConfig",
    "C3AConfig",
    "CPTConfig",
    "Calibration",
    "CaptureError",
    "CartridgeConfig",
    "CheckpointError",
    "CompiledModel",
    "ConflictError",
    "DeftConfig",
    "DeloraConfig",
    "ExportError",
    "Form",
    "FourierFTConfig",
    "FrodConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoadResult",
    "LoraConfig",
    "MergeError",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "NoMatchError",
    "OFTConfig",
    "OSFConfig",
    "Op",
    "Param",
    "Pass",
    "Pattern",
    "PeanutConfig",
    "PeftcError",
    "Plan",
    "PlanError",
    "PolyConfig",
    "PrefixTuningConfig",
    "Product",
    "PromptEncoderConfig",
    "PromptRule",
    "PromptSpec",
    "PromptTuningConfig",
    "PsoftConfig",
    "PveraConfig",
    "RandLoraConfig",
    "RoadConfig",
    "Rule",
    "RuleError",
    "Shape",
    "ShiraConfig",
    "SpecError",
    "SupertuningConfig",
    "TinyLoraConfig",
    "TrainableTokensConfig",
    "UniLoraConfig",
    "VBLoRAConfig",
    "VeraConfig",
    "WaveFTConfig",
    "calibrate",
    "compile",
    "get_peft_model_state_dict",
    "load",
    "load_spec",
    "merge_checkpoint",
    "plan",
    "preflight",
    "program_passes",
    "register",
    "register_op",
    "set_peft_model_state_dict",
    "unmerge_checkpoint",
    "unregister",
    "unregister_op",
    "verify",
]
