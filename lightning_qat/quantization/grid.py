"""Grids: which values exist, in units of the scale."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_qat.functional.rounding import round_binary_, round_ternary_, round_uniform_
from lightning_qat.quantization._checks import check_flag, check_number


def _check_integer(where: str, value: int, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= largest:
        hint = " (for 1 bit use Binary(), for 1.58 bits Ternary())" if where.endswith("bits") else ""
        raise ValueError(f"{where}={value!r} is not allowed; choose an integer from 2 to {largest}{hint}")


class Grid(ABC):
    """A set of levels, with an integer zero point if ``symmetric`` is False. Formulas take numbers or tensors."""

    symmetric: bool = True
    has_zero: ClassVar[bool] = True
    offset: ClassVar[float] = 0.0
    half_cell: ClassVar[float] = 0.5

    @property
    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest level, in units of the scale."""

    @property
    def lo(self) -> float:
        """Smallest level."""
        return self.bounds[0]

    @property
    def hi(self) -> float:
        """Largest level."""
        return self.bounds[1]

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return int(self.hi - self.lo) + 1

    @property
    def bits_per_weight(self) -> float:
        """Information content of one code in bits, log2 of the number of levels."""
        return math.log2(self.num_levels)

    @property
    def step_factor(self) -> float:
        """Factor between the stored scale and the step between levels; 1 except for :class:`Pi`."""
        return 1.0

    def round(self, u: Tensor) -> Tensor:
        """Return the nearest level of the unbounded grid."""
        return self.round_(u.clone())

    def round_(self, u: Tensor) -> Tensor:
        """Round in place; levels beyond the bounds may come of it, or not: all who round clamp."""
        return u.round_() if self.has_zero else round_uniform_(u, 0.5)  # a literal: see Ternary

    def border_distance(self, u: Tensor) -> Tensor:
        """Return the signed distance of u to the border inside its cell, within -half_cell..half_cell."""
        shifted = u - self.offset
        return shifted - torch.floor(shifted) - 0.5

    def absmax_scale(self, amax: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
        """Return the scale at which amax falls on the end of the grid (of half-integers: half a step further out)."""
        return amax / (self.offset - lo)

    def absmean_scale(self, mean: Tensor, hi: Tensor | float) -> Tensor:
        r"""Return :math:`2 mean / \sqrt{hi}`, the start of LSQ (arXiv:1902.08153 section 2.1)."""
        return 2 * mean / hi**0.5

    @property
    @abstractmethod
    def label(self) -> str:
        """Compact name used in logs, such as ``int4``."""

    @abstractmethod
    def encode(self) -> tuple[float, float, float]:
        """Return (family, bits, parameter) as plain numbers, the form stored in checkpoints."""


@final
@dataclass(frozen=True)
class Int(Grid):
    """Signed integers.

    | bits | levels         | narrow=True  |
    |------|----------------|--------------|
    | 2    | -2 .. 1        | -1 .. 1      |
    | 4    | -8 .. 7        | -7 .. 7      |
    | 8    | -128 .. 127    | -127 .. 127  |

    Args:
        bits: 2 to 8.
        narrow: leave out the smallest level, so that the grid is symmetric around zero.
        symmetric: False adds an integer zero point (affine quantization); the range is stretched to contain 0.

    Raises:
        ValueError: bits outside 2..8, flags that are no bool, or narrow together with symmetric=False.

    Source: arXiv:1712.05877. With AbsMax the scale is amax / 2^(bits-1): all codes are used; a largest positive
    value is clipped by one step. Narrow grids take amax / hi.
    """

    bits: int
    narrow: bool = False
    symmetric: bool = True

    def __post_init__(self) -> None:
        _check_integer("Int: bits", self.bits, 8)
        check_flag("Int: narrow", self.narrow)
        check_flag("Int: symmetric", self.symmetric)
        if self.narrow and not self.symmetric:
            raise ValueError("Int: narrow=True needs symmetric=True; an asymmetric grid already uses every code")

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return -(2.0 ** (self.bits - 1)) + self.narrow, 2.0 ** (self.bits - 1) - 1

    @property
    @override
    def label(self) -> str:
        return f"int{self.bits}" + ("-narrow" if self.narrow else "") + ("" if self.symmetric else "-asymmetric")

    @override
    def encode(self) -> tuple[float, float, float]:
        return (0.0, float(self.bits), self.narrow + 2.0 * (not self.symmetric))


@final
@dataclass(frozen=True)
class Binary(Grid):
    """The two levels -1 and +1; zero maps to +1. AbsMax scale amax, AbsMean scale mean (the error minimum).

    Source: BitNet, arXiv:2310.11453 eq. 1-3; centering is the transform ``Center()``.
    """

    has_zero: ClassVar[bool] = False
    half_cell: ClassVar[float] = 1.0

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return -1.0, 1.0

    @property
    @override
    def num_levels(self) -> int:
        return 2

    @property
    @override
    def label(self) -> str:
        return "binary"

    @override
    def round_(self, u: Tensor) -> Tensor:
        return round_binary_(u)

    @override
    def border_distance(self, u: Tensor) -> Tensor:
        return u

    @override
    def absmean_scale(self, mean: Tensor, hi: Tensor | float) -> Tensor:
        return mean

    @override
    def encode(self) -> tuple[float, float, float]:
        return (1.0, 1.0, 0.0)


@final
@dataclass(frozen=True)
class Ternary(Grid):
    """The three levels -1, 0, 1. AbsMax scale amax, AbsMean scale mean.

    Args:
        threshold: values up to this many scales map to 0; in (0, 1).

    Raises:
        ValueError: threshold outside (0, 1).

    Source: BitNet b1.58, arXiv:2402.17764 eq. 1-3 (0.5); ternary weight networks, arXiv:1605.04711 (others).
    """

    threshold: float = 0.5
    _rounds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("Ternary: threshold", self.threshold, "a value in (0, 1) such as 0.5", holds=lambda t: 0 < t < 1)
        # torch.compile(dynamic=True) has variables in the place of numbers, and fails on one that two layers share.
        object.__setattr__(self, "_rounds", self.threshold == 0.5)

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return -1.0, 1.0

    @property
    @override
    def label(self) -> str:
        return "ternary" if self.threshold == 0.5 else f"ternary{self.threshold:g}"

    @override
    def round_(self, u: Tensor) -> Tensor:
        return u.round_() if self._rounds else round_ternary_(u, self.threshold)

    @override
    def border_distance(self, u: Tensor) -> Tensor:
        return torch.where(u < 0, u + self.threshold, u - self.threshold)

    @override
    def absmean_scale(self, mean: Tensor, hi: Tensor | float) -> Tensor:
        return mean

    @override
    def encode(self) -> tuple[float, float, float]:
        return (2.0, 2.0, self.threshold)


@final
@dataclass(frozen=True)
class HalfInt(Grid):
    """Half-integer levels, symmetric and without zero.

    | bits | levels                 |
    |------|------------------------|
    | 2    | -1.5 -0.5 0.5 1.5      |
    | 4    | -7.5 .. 7.5            |
    | 8    | -127.5 .. 127.5        |

    Args:
        bits: 2 to 8.

    Raises:
        ValueError: bits outside 2..8.

    Source: stretched elastic quantization, ParetoQ, arXiv:2502.02631 section 3.2. AbsMax scale 2 amax / 2^bits.
    """

    bits: int
    has_zero: ClassVar[bool] = False
    offset: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        _check_integer("HalfInt: bits", self.bits, 8)

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return 0.5 - 2.0 ** (self.bits - 1), 2.0 ** (self.bits - 1) - 0.5

    @property
    @override
    def label(self) -> str:
        return f"halfint{self.bits}"

    @override
    def encode(self) -> tuple[float, float, float]:
        return (3.0, float(self.bits), 0.0)


@final
@dataclass(frozen=True)
class Pi(Grid):
    r"""The levels of ``Int(bits)`` with a step of :math:`\alpha \pi / k`; the stored scale is alpha.

    Args:
        bits: 2 to 5.
        k: divisor of pi, 2 to 5.

    Raises:
        ValueError: bits or k outside 2..5.

    With a learned or searched alpha this is the same family as ``Int(bits)``: only the start and the effective
    learning rate of the step, :math:`(\pi / k)^2`, differ. PiQ3 is ``Pi(3, 4)``, PiQ2 is ``Pi(2, 3)`` with a rotation.
    """

    bits: int
    k: int

    def __post_init__(self) -> None:
        _check_integer("Pi: bits", self.bits, 5)
        _check_integer("Pi: k", self.k, 5)

    @property
    @override
    def bounds(self) -> tuple[float, float]:
        return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1

    @property
    @override
    def step_factor(self) -> float:
        return math.pi / self.k

    @property
    @override
    def label(self) -> str:
        return f"pi{self.bits}k{self.k}"

    @override
    def encode(self) -> tuple[float, float, float]:
        return (4.0, float(self.bits), float(self.k))


def decode_grid(values: tuple[float, float, float]) -> Grid:
    """Return the grid that :meth:`Grid.encode` described.

    Raises:
        ValueError: for a family that this version does not know.

    >>> decode_grid(Int(4, narrow=True).encode())
    Int(bits=4, narrow=True, symmetric=True)
    """
    family, bits, parameter = int(values[0]), int(values[1]), values[2]
    if family == 0:
        return Int(bits, narrow=bool(int(parameter) & 1), symmetric=not int(parameter) & 2)
    if family == 1:
        return Binary()
    if family == 2:  # stored in float32: give back the decimal that was typed
        return Ternary(round(parameter, 6))
    if family in (3, 4):
        return HalfInt(bits) if family == 3 else Pi(bits, int(parameter))
    raise ValueError(f"grid family {family} is unknown; this version knows 0 (Int) to 4 (Pi)")


def with_bits(grid: Grid, bits: int) -> Grid:
    """Return the grid of the same family at another width; 1 bit of any family is ``Binary()``.

    Raises:
        ValueError: where the family has no such width.

    >>> with_bits(Int(8, narrow=True), 4)
    Int(bits=4, narrow=True, symmetric=True)
    """
    if bits == 1:
        return Binary()
    return replace(grid, bits=bits) if isinstance(grid, Int | HalfInt | Pi) else Int(bits)
