"""Every meaningful combination of the four pieces, and how to build a quantizer that is ready to use."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Binary,
    Clipped,
    ElementwiseScaling,
    Entropy,
    FakeQuantizer,
    Gradient,
    Granularity,
    Grid,
    HalfInt,
    Int,
    Layout,
    Learned,
    LearnedSoft,
    MinimumError,
    MovingAverage,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Pi,
    QuantizerSpec,
    Scale,
    Soft,
    StraightThrough,
    Ternary,
)
from tests._reference import ReferenceGrid

GRIDS: tuple[Grid, ...] = (
    *(Int(bits) for bits in range(2, 9)),
    *(Int(bits, narrow=True) for bits in range(2, 9)),
    *(Int(bits, symmetric=False) for bits in range(2, 9)),
    Binary(),
    *(Ternary(threshold) for threshold in (0.5, 0.3, 0.75)),
    *(HalfInt(bits) for bits in range(2, 9)),
    *(Pi(bits, k) for bits in range(2, 6) for k in range(2, 6)),
)
FEW_GRIDS: tuple[Grid, ...] = (
    Int(2), Int(4, narrow=True), Int(8), Int(4, symmetric=False), Binary(), Ternary(), Ternary(0.3), HalfInt(3),
    Pi(3, 4),
)  # fmt: skip
STARTS: tuple[Scale, ...] = (AbsMax(), AbsMean(), Percentile(97.0), MinimumError(), Entropy(), MovingAverage(0.9))
SCALES: tuple[Scale, ...] = (*STARTS, *(Learned(start) for start in STARTS))
KINDS: tuple[Scale, ...] = (
    *STARTS,
    Learned(AbsMax()),
)  # where it does not matter how a learned scale began
GRADIENTS: tuple[Gradient, ...] = (
    StraightThrough(), Clipped(), Clipped(0.5), Soft(0.4), LearnedSoft(0.4), ElementwiseScaling(0.2),
)  # fmt: skip
WEIGHT_GRANULARITIES: tuple[Granularity, ...] = (PerTensor(), PerChannel(), PerGroup(4))
INPUT_GRANULARITIES: tuple[Granularity, ...] = (PerTensor(), PerToken(), PerGroup(4))
WEIGHT, INPUT = Layout(0), Layout(None)
PLACES: tuple[tuple[Granularity, Layout], ...] = (
    *((granularity, WEIGHT) for granularity in WEIGHT_GRANULARITIES),
    *((granularity, INPUT) for granularity in INPUT_GRANULARITIES),
)
SHAPE = (4, 8)


def reference(grid: Grid) -> ReferenceGrid:
    """The same grid for the reference formulas."""
    assert dataclasses.is_dataclass(grid)
    return ReferenceGrid(kind=type(grid).__name__, **dataclasses.asdict(grid))


def is_meaningful(grid: Grid, granularity: Granularity, scale: Scale, layout: Layout) -> bool:
    """The rules of the design, in one place and in other words than in the package."""
    start = scale.init if isinstance(scale, Learned) else scale
    stored = scale not in (AbsMax(), AbsMean())
    if layout.is_input and stored and granularity != PerTensor():
        return False  # tokens come and go
    if grid in {Int(bits, symmetric=False) for bits in range(2, 9)} and isinstance(start, AbsMean | MovingAverage):
        return False  # no zero point comes from them
    return not (grid == Binary() and start == Entropy())  # its codes do not depend on the scale


def meaningful(grid: Grid, scales: tuple[Scale, ...] = KINDS) -> Iterator[tuple[Granularity, Layout, Scale]]:
    """Every place and scale that goes with a grid."""
    for granularity, layout in PLACES:
        for scale in scales:
            if is_meaningful(grid, granularity, scale, layout):
                yield granularity, layout, scale


def build(spec: QuantizerSpec, x: Tensor, layout: Layout = WEIGHT) -> FakeQuantizer:
    """A quantizer for tensors like x, its scale found from x."""
    quantizer = FakeQuantizer(spec, () if layout.is_input else tuple(x.shape), layout)
    quantizer.find_scale(x)
    return quantizer


def step_and_zero_point(quantizer: FakeQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The step and the zero point that apply to x, broadcast to its shape; a zero point of 0 where there is none."""
    quantized = quantizer.quantize(x)
    granularity, layout = quantizer.spec.granularity, quantizer.layout

    def spread(part: Tensor) -> Tensor:
        grouped = granularity.group(torch.zeros_like(x, dtype=part.dtype), layout)
        return granularity.ungroup(part.expand_as(grouped).clone(), tuple(x.shape), layout)

    zero_point = torch.zeros_like(quantized.scale) if quantized.zero_point is None else quantized.zero_point
    return spread(quantized.scale), spread(zero_point)
