"""What quantization does to a model: functions, and torchmetrics that accumulate them over steps and ranks."""

from lightning_qat.metrics.error import SQNR, QuantizationMSE, RelativeError, quantization_mse, relative_error, sqnr
from lightning_qat.metrics.gradient import GradientNorm, gradient_norm
from lightning_qat.metrics.oscillation import (
    FlipRate,
    OscillationRate,
    OscillationState,
    flip_rate,
    oscillation_rate,
    sample_indices,
    start_oscillation,
    track_oscillation,
)
from lightning_qat.metrics.scale import ScaleSummary, scale_summary
from lightning_qat.metrics.size import EffectiveBits, ModelSize, effective_bits, model_size
from lightning_qat.metrics.usage import ClipRate, LevelEntropy, ZeroRate, clip_rate, level_entropy, zero_rate

__all__ = [
    "SQNR",
    "ClipRate",
    "EffectiveBits",
    "FlipRate",
    "GradientNorm",
    "LevelEntropy",
    "ModelSize",
    "OscillationRate",
    "OscillationState",
    "QuantizationMSE",
    "RelativeError",
    "ScaleSummary",
    "ZeroRate",
    "clip_rate",
    "effective_bits",
    "flip_rate",
    "gradient_norm",
    "level_entropy",
    "model_size",
    "oscillation_rate",
    "quantization_mse",
    "relative_error",
    "sample_indices",
    "scale_summary",
    "sqnr",
    "start_oscillation",
    "track_oscillation",
    "zero_rate",
]
