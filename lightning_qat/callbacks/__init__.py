"""Callbacks: each does one thing and composes with the others."""

from lightning_qat.callbacks.activation_checkpointing import ActivationCheckpointing
from lightning_qat.callbacks.advice import Bounds
from lightning_qat.callbacks.bit_allocation import BitAllocation
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.distillation import Distillation
from lightning_qat.callbacks.export import ExportCallback
from lightning_qat.callbacks.feature_match import FeatureMatch
from lightning_qat.callbacks.freezing import OscillationFreezing
from lightning_qat.callbacks.gptq import GPTQ
from lightning_qat.callbacks.gradual import GradualQuantization
from lightning_qat.callbacks.lora import LoRA
from lightning_qat.callbacks.masks import BatchMask, DelimiterMask, KindWeights, TargetMask
from lightning_qat.callbacks.orthogonal import OrthogonalUpdates
from lightning_qat.callbacks.parameter_group import ParameterGroup
from lightning_qat.callbacks.penalty import Penalty
from lightning_qat.callbacks.plateau import PlateauBitWidth
from lightning_qat.callbacks.progressive import ProgressiveBitWidth
from lightning_qat.callbacks.qat import QATCallback
from lightning_qat.callbacks.reasoning import ReasoningMatch
from lightning_qat.callbacks.recommended import faster_others, recommended_callbacks
from lightning_qat.callbacks.regularization import Regularization
from lightning_qat.callbacks.statistics import QuantizationStatistics
from lightning_qat.callbacks.two_stage import TwoStageSchedule

__all__ = [
    "GPTQ",
    "ActivationCheckpointing",
    "BatchMask",
    "BitAllocation",
    "Bounds",
    "Calibration",
    "DelimiterMask",
    "Distillation",
    "ExportCallback",
    "FeatureMatch",
    "GradualQuantization",
    "KindWeights",
    "LoRA",
    "OrthogonalUpdates",
    "OscillationFreezing",
    "ParameterGroup",
    "Penalty",
    "PlateauBitWidth",
    "ProgressiveBitWidth",
    "QATCallback",
    "QuantizationStatistics",
    "ReasoningMatch",
    "Regularization",
    "TargetMask",
    "TwoStageSchedule",
    "faster_others",
    "recommended_callbacks",
]
