"""Pure functions on tensors: rounding, fake quantization, scale search, Hadamard rotation, packing."""

from lightning_qat.functional.bounded import finish_scale, positive_scale
from lightning_qat.functional.fake_quantize import fake_quantize
from lightning_qat.functional.gradients import elementwise_scaling, staircase_slope, staircase_temperature_slope
from lightning_qat.functional.hadamard import hadamard_rotate, hadamard_unrotate, random_signs, walsh_hadamard
from lightning_qat.functional.kernels import compiled_kernels
from lightning_qat.functional.learned_scale import lsq_scale_gradient
from lightning_qat.functional.levels import dequantize, quantize
from lightning_qat.functional.packing import pack, packed_size, unpack
from lightning_qat.functional.rounding import round_binary, round_ternary, round_uniform

__all__ = [
    "compiled_kernels",
    "dequantize",
    "elementwise_scaling",
    "fake_quantize",
    "finish_scale",
    "hadamard_rotate",
    "hadamard_unrotate",
    "lsq_scale_gradient",
    "pack",
    "packed_size",
    "positive_scale",
    "quantize",
    "random_signs",
    "round_binary",
    "round_ternary",
    "round_uniform",
    "staircase_slope",
    "staircase_temperature_slope",
    "unpack",
    "walsh_hadamard",
]
