"""Granularities: which elements share a scale."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class Layout:
    """How the dimensions of a tensor are to be read.

    Args:
        channel_axis: output dimension of a weight (0; 1 for transposed convolutions), None for an input.
        num_features: how many trailing dimensions of an input belong to one token (1 for linear layers;
            channels and space for convolutions).

    Raises:
        ValueError: a negative axis or no features.
    """

    channel_axis: int | None = 0
    num_features: int = 1

    def __post_init__(self) -> None:
        if self.channel_axis is not None and self.channel_axis < 0:
            raise ValueError(f"Layout: channel_axis={self.channel_axis} is not allowed; count from the front")
        if self.num_features < 1:
            raise ValueError(f"Layout: num_features={self.num_features} is not allowed; choose 1 or more")

    @property
    def is_input(self) -> bool:
        """Whether this is the layout of an input."""
        return self.channel_axis is None


class Granularity(ABC):
    """Maps a tensor to a grouped view, in which the elements that share a scale lie along :meth:`dims`."""

    for_weights: ClassVar[bool] = True
    for_inputs: ClassVar[bool] = True

    def group(self, x: Tensor, layout: Layout) -> Tensor:
        """Return x so shaped that a scale with kept dimensions broadcasts to it."""
        return x

    def ungroup(self, grouped: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
        """Undo :meth:`group`."""
        return grouped

    @abstractmethod
    def dims(self, grouped_dims: int, layout: Layout) -> tuple[int, ...]:
        """Return the dimensions of the grouped view over which one scale extends."""

    def scale_shape(self, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
        """Return the shape of a stored scale for a tensor of this shape."""
        dims = self.dims(len(shape), layout)
        return tuple(1 if d in dims else n for d, n in enumerate(shape))

    def problem(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        """Return why this granularity cannot serve a tensor of this shape, or None; inputs have the shape ()."""
        if layout.is_input and not self.for_inputs:
            return f"{self!r} is for weights; for inputs choose PerTensor(), PerToken() or PerGroup(size)"
        if not layout.is_input and not self.for_weights:
            return f"{self!r} is for inputs; for weights choose PerTensor(), PerChannel() or PerGroup(size)"
        return None

    @property
    @abstractmethod
    def label(self) -> str:
        """Compact name used in logs."""


@final
@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor, stored with shape [1]."""

    @override
    def dims(self, grouped_dims: int, layout: Layout) -> tuple[int, ...]:
        return tuple(range(grouped_dims))

    @override
    def scale_shape(self, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
        return (1,)

    @property
    @override
    def label(self) -> str:
        return "tensor"


@final
@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale per output channel of a weight: [out, in] -> [out, 1]; rows of an embedding."""

    for_inputs: ClassVar[bool] = False

    @override
    def dims(self, grouped_dims: int, layout: Layout) -> tuple[int, ...]:
        return tuple(d for d in range(grouped_dims) if d != layout.channel_axis)

    @override
    def problem(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        if len(shape) == 1:
            return f"a weight of shape {shape} would get a scale for each element; choose PerTensor()"
        return super().problem(shape, layout)

    @property
    @override
    def label(self) -> str:
        return "channel"


@final
@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale per token of an input, [..., features] -> [..., 1]; convolutions: per sample."""

    for_weights: ClassVar[bool] = False

    @override
    def dims(self, grouped_dims: int, layout: Layout) -> tuple[int, ...]:
        return tuple(range(max(0, grouped_dims - layout.num_features), grouped_dims))

    @property
    @override
    def label(self) -> str:
        return "token"


@final
@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per group of consecutive elements along the input dimension.

    Weights [out, in, ...] -> [out, in * ... / size, 1]; inputs [..., in] -> [..., in / size, 1].

    Args:
        size: positive number of elements in a group; it must divide the input dimension.

    Raises:
        ValueError: if size is not a positive integer.
    """

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"PerGroup: size={self.size!r} is not allowed; choose a positive integer such as 32")

    @override
    def group(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.channel_axis is None:
            return x.reshape(*x.shape[:-1], self._count(x.shape, layout), self.size)
        rows = x.shape[layout.channel_axis]
        return x.movedim(layout.channel_axis, 0).reshape(rows, self._count(x.shape, layout), self.size)

    @override
    def ungroup(self, grouped: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
        axis = layout.channel_axis
        if not axis:
            return grouped.reshape(shape)
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return grouped.reshape(moved).movedim(0, axis)

    @override
    def dims(self, grouped_dims: int, layout: Layout) -> tuple[int, ...]:
        return (grouped_dims - 1,)

    @override
    def scale_shape(self, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
        axis = layout.channel_axis or 0
        return (shape[axis], self._count(shape, layout), 1)

    def _count(self, shape: tuple[int, ...], layout: Layout) -> int:
        width = self._width(shape, layout)
        if width % self.size:  # the shape of an input is known no earlier than in the forward
            raise ValueError(f"PerGroup: {self.problem(shape, layout)}")
        return width // self.size

    def _width(self, shape: tuple[int, ...], layout: Layout) -> int:
        if layout.channel_axis is None:
            return shape[-1]
        width = 1
        for axis, n in enumerate(shape):
            width *= 1 if axis == layout.channel_axis else n
        return width

    @override
    def problem(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        if layout.is_input and layout.num_features != 1:
            return "groups of an input exist for linear layers only; choose PerTensor() or PerToken()"
        width = self._width(shape, layout) if shape else self.size
        if width % self.size == 0:
            return super().problem(shape, layout)
        divisors = [d for d in range(1, width + 1) if width % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - self.size))[:5])
        return f"in_features={width} is not a multiple of group_size={self.size}; choose one of {near}"

    @property
    @override
    def label(self) -> str:
        return f"group{self.size}"
