"""Quantizers as products of four pieces: grid, granularity, scale, gradient."""

from lightning_qat.quantization import recipes
from lightning_qat.quantization.gradient import (
    Clipped,
    ElementwiseScaling,
    Gradient,
    LearnedSoft,
    Soft,
    StraightThrough,
)
from lightning_qat.quantization.granularity import Granularity, Layout, PerChannel, PerGroup, PerTensor, PerToken
from lightning_qat.quantization.grid import Binary, Grid, HalfInt, Int, Pi, Ternary
from lightning_qat.quantization.observer import Observer
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.recipe import Recipe, Rule
from lightning_qat.quantization.scale import (
    AbsMax,
    AbsMean,
    Entropy,
    Learned,
    MinimumError,
    MovingAverage,
    Percentile,
    Scale,
)
from lightning_qat.quantization.spec import LayerSpec, QuantizerSpec
from lightning_qat.quantization.tensor import QuantizedTensor
from lightning_qat.quantization.transform import Center, Hadamard, Normalize, Transform

__all__ = [
    "AbsMax",
    "AbsMean",
    "Binary",
    "Center",
    "Clipped",
    "ElementwiseScaling",
    "Entropy",
    "FakeQuantizer",
    "Gradient",
    "Granularity",
    "Grid",
    "Hadamard",
    "HalfInt",
    "Int",
    "LayerSpec",
    "Layout",
    "Learned",
    "LearnedSoft",
    "MinimumError",
    "MovingAverage",
    "Normalize",
    "Observer",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Percentile",
    "Pi",
    "QuantizedTensor",
    "QuantizerSpec",
    "Recipe",
    "Rule",
    "Scale",
    "Soft",
    "StraightThrough",
    "Ternary",
    "Transform",
    "recipes",
]
