"""Conversion: the only code that edits a model."""

from lightning_qat.conversion.bake import bake, codes
from lightning_qat.conversion.calibrate import calibrate
from lightning_qat.conversion.checkpoint import load_checkpoint
from lightning_qat.conversion.fold import fold_batchnorm, reestimate_batchnorm
from lightning_qat.conversion.prepare import float_weights, prepare, unprepare
from lightning_qat.conversion.report import ConversionReport, ReportRow

__all__ = [
    "ConversionReport",
    "ReportRow",
    "bake",
    "calibrate",
    "codes",
    "float_weights",
    "fold_batchnorm",
    "load_checkpoint",
    "prepare",
    "reestimate_batchnorm",
    "unprepare",
]
