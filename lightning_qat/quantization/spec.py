"""Specs: which four pieces make a quantizer, and which quantizers a layer gets."""

from dataclasses import dataclass, field
from typing import Final, final

import torch

from lightning_qat.quantization.gradient import Clipped, Gradient
from lightning_qat.quantization.granularity import Granularity, PerChannel, PerGroup, PerToken
from lightning_qat.quantization.grid import Binary, Grid
from lightning_qat.quantization.scale import AbsMax, AbsMean, Entropy, Learned, Percentile, Scale
from lightning_qat.quantization.transform import Transform

_SCALE_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _check_type(where: str, value: object, kind: type, examples: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{where}={value!r} is not a {kind.__name__}; choose one of {examples}")


@final
@dataclass(frozen=True)
class QuantizerSpec:
    """A quantizer as a product of four independent choices.

    Args:
        grid: which values exist.
        granularity: which elements share a scale.
        scale: how the scale is found.
        gradient: what backward does with rounding.
        scale_dtype: ``float32``, or ``float16`` / ``bfloat16``: the scale is rounded to it in the forward, for formats
            that store such scales; it is kept and trained in float32.

    Raises:
        TypeError: a piece of the wrong kind.
        ValueError: a combination without meaning; the message says which exist.

    >>> from lightning_qat.quantization.grid import Int
    >>> QuantizerSpec(Int(4)).label
    'int4:channel:learned(mse):clipped'
    """

    grid: Grid
    granularity: Granularity = field(default_factory=PerChannel)
    scale: Scale = field(default_factory=Learned)
    gradient: Gradient = field(default_factory=Clipped)
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_type(
            "QuantizerSpec: grid", self.grid, Grid,
            "Int(bits), Binary(), Ternary(), HalfInt(bits), Pi(bits, k)",
        )  # fmt: skip
        _check_type(
            "QuantizerSpec: granularity", self.granularity, Granularity,
            "PerTensor(), PerChannel(), PerToken(), PerGroup(size)",
        )  # fmt: skip
        _check_type(
            "QuantizerSpec: scale", self.scale, Scale,
            "AbsMax(), AbsMean(), Percentile(q), MinimumError(), Entropy(), MovingAverage(), Learned()",
        )  # fmt: skip
        _check_type(
            "QuantizerSpec: gradient", self.gradient, Gradient,
            "StraightThrough(), Clipped(), Soft(t), LearnedSoft(t), ElementwiseScaling(delta)",
        )  # fmt: skip
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in _SCALE_DTYPES:
            raise ValueError(f"QuantizerSpec: scale_dtype={self.scale_dtype!r}; choose one of {sorted(_SCALE_DTYPES)}")
        self._check_combination()

    def _check_combination(self) -> None:
        if isinstance(self.granularity, PerToken) and not self.scale.recomputed:
            raise ValueError(
                f"QuantizerSpec: {self.scale!r} cannot be stored per token, because tokens come and go; "
                "PerToken() goes with AbsMax() and AbsMean(), stored scales go with PerTensor()"
            )
        if not self.grid.symmetric and not self.scale.takes_zero_point:
            raise ValueError(
                f"QuantizerSpec: {self.scale!r} finds no zero point for {self.grid!r}; asymmetric grids go with "
                "AbsMax(), Percentile(q), MinimumError(), Entropy() and Learned(init=one of these)"
            )
        start = self.scale.init if isinstance(self.scale, Learned) else self.scale
        if isinstance(self.grid, Binary) and isinstance(start, Entropy):
            raise ValueError(
                "QuantizerSpec: Entropy() cannot choose a scale for Binary(), whose codes do not depend on it; "
                "take AbsMean() or MinimumError()"
            )
        if not self.grid.symmetric and isinstance(start, Percentile) and start.percentile <= 50:
            raise ValueError(
                f"QuantizerSpec: {start!r} leaves an empty range on {self.grid!r}, where both tails are cut; "
                "choose a percentile in (50, 100]"
            )

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The storage dtype of scales as a torch dtype."""
        return _SCALE_DTYPES[self.scale_dtype]

    @property
    def label(self) -> str:
        """Compact form for tables and logs."""
        parts = [self.grid.label, self.granularity.label, self.scale.label, self.gradient.label]
        return ":".join(parts + ([] if self.scale_dtype == "float32" else [self.scale_dtype]))


@final
@dataclass(frozen=True)
class LayerSpec:
    """What a layer gets: a quantizer for its weight, one for its input, and transforms around them.

    Args:
        weight: quantizer of the weight, or None to leave it in float.
        input: quantizer of the input, or None.
        transforms: applied in order before the quantizers: ``Center()``, ``Hadamard(seed)``, ``Normalize()``.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: a granularity that does not exist for weights or inputs, or nothing to do.
    """

    weight: QuantizerSpec | None = None
    input: QuantizerSpec | None = None
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.transforms, list):  # as YAML gives it
            object.__setattr__(self, "transforms", tuple(self.transforms))
        for name, spec in (("weight", self.weight), ("input", self.input)):
            if spec is not None:
                _check_type(f"LayerSpec: {name}", spec, QuantizerSpec, "QuantizerSpec(...), None")
        _check_type("LayerSpec: transforms", self.transforms, tuple, "a tuple of Center(), Hadamard(seed), Normalize()")
        for transform in self.transforms:
            _check_type("LayerSpec: transforms", transform, Transform, "Center(), Hadamard(seed), Normalize()")
        if self.weight is None and self.input is None:
            raise ValueError(
                "LayerSpec: neither weight nor input is given; to leave a layer in float use Rule(..., None)"
            )
        if self.weight is not None and not self.weight.granularity.for_weights:
            raise ValueError(
                f"LayerSpec: weight.granularity={self.weight.granularity!r} has no meaning for a weight, which has no "
                "tokens; choose PerTensor(), PerChannel() or PerGroup(size)"
            )
        self._check_transforms()
        self._check_input()

    def _check_transforms(self) -> None:
        moving = [transform for transform in self.transforms if transform.changes_weight]
        if self.weight is None and moving:
            raise ValueError(
                f"LayerSpec: {moving[0]!r} transforms the weight, too, but weight=None leaves that in float; give a "
                "weight quantizer, or leave the transform out"
            )

    def _check_input(self) -> None:
        if self.input is None:
            return
        if not self.input.granularity.for_inputs:
            raise ValueError(
                f"LayerSpec: input.granularity={self.input.granularity!r} would scale the dimension that is summed "
                "over; choose PerTensor(), PerToken() or PerGroup(size)"
            )
        if isinstance(self.input.granularity, PerGroup) and not isinstance(self.input.scale, AbsMax | AbsMean):
            raise ValueError(
                f"LayerSpec: input.scale={self.input.scale!r} cannot be stored per group of an input; "
                "PerGroup(size) inputs go with AbsMax() and AbsMean(), stored scales with PerTensor()"
            )

    @property
    def label(self) -> str:
        """Compact form for tables and logs."""
        parts = [f"weight {self.weight.label}"] if self.weight else []
        parts += [f"input {self.input.label}"] if self.input else []
        parts += [transform.label for transform in self.transforms]
        return ", ".join(parts)
