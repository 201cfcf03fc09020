"""What holds when in a run: precisions by position, numbers by share of the run. Pure functions of the step count."""

from lightning_qat.schedules.precision import (
    ByFraction,
    Change,
    Cosine,
    Linear,
    Precision,
    Schedule,
    Staircase,
    as_schedule,
)
from lightning_qat.schedules.ramp import CosineRamp, LinearRamp, QuadraticRamp, Ramp, value_at

__all__ = [
    "ByFraction",
    "Change",
    "Cosine",
    "CosineRamp",
    "Linear",
    "LinearRamp",
    "Precision",
    "QuadraticRamp",
    "Ramp",
    "Schedule",
    "Staircase",
    "as_schedule",
    "value_at",
]
