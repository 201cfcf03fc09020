"""Callbacks: each does one thing and composes with the others."""

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.distillation import Distillation
from lightning_qat.callbacks.progressive import ProgressiveBitWidth
from lightning_qat.callbacks.qat import QATCallback

__all__ = ["Calibration", "Distillation", "ProgressiveBitWidth", "QATCallback"]
