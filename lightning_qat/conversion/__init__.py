"""Conversion: the only code that edits a model."""

from lightning_qat.conversion.allocate import allocate_bits
from lightning_qat.conversion.allocation import Allocation
from lightning_qat.conversion.bake import bake, codes
from lightning_qat.conversion.calibrate import calibrate
from lightning_qat.conversion.checkpoint import load_checkpoint
from lightning_qat.conversion.fold import fold_batchnorm, reestimate_batchnorm
from lightning_qat.conversion.gptq import Compensated, gptq
from lightning_qat.conversion.lora import add_lora, merge_lora
from lightning_qat.conversion.peft import adopt_peft
from lightning_qat.conversion.prepare import float_weights, prepare, unprepare
from lightning_qat.conversion.recompute import keep_activations, recompute_activations
from lightning_qat.conversion.report import ConversionReport, ReportRow
from lightning_qat.conversion.rotations import fold_rotations, online_rotations, rotate_between
from lightning_qat.conversion.sensitivity import (
    FisherError,
    LossChange,
    OutputDivergence,
    OutputError,
    Sensitivity,
)
from lightning_qat.conversion.window import accumulation_window

__all__ = [
    "Allocation",
    "Compensated",
    "ConversionReport",
    "FisherError",
    "LossChange",
    "OutputDivergence",
    "OutputError",
    "ReportRow",
    "Sensitivity",
    "accumulation_window",
    "add_lora",
    "adopt_peft",
    "allocate_bits",
    "bake",
    "calibrate",
    "codes",
    "float_weights",
    "fold_batchnorm",
    "fold_rotations",
    "gptq",
    "keep_activations",
    "load_checkpoint",
    "merge_lora",
    "online_rotations",
    "prepare",
    "recompute_activations",
    "reestimate_batchnorm",
    "rotate_between",
    "unprepare",
]
