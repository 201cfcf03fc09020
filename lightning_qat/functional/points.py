"""What fake quantization asks of grids and of gradients, and what it tells them."""

from typing import Protocol

from torch import Tensor

from lightning_qat.functional.gradients import within


class Rounding(Protocol):
    """What fake quantization needs to know of a grid: how to round, and where the level borders are."""

    @property
    def half_cell(self) -> float:
        """Half the distance between neighboring levels, in units of the scale."""

    @property
    def offset(self) -> float:
        """Shift of the levels against the integers, 0 or 0.5."""

    def round_(self, u: Tensor) -> Tensor:
        """Replace u by the nearest level of the unbounded grid."""

    def border_distance(self, u: Tensor) -> Tensor:
        """Return the signed distance to the border of the cell that u lies in."""


class GradientRule(Protocol):
    """How the gradient passes the rounding."""

    @property
    def needs_input(self) -> bool:
        """Whether backward reads the input; if not, nothing is kept for it."""

    @property
    def only_clips(self) -> bool:
        """Whether the gradient passes the inside of the clip range as it is."""

    def input_gradient(self, grad: Tensor, point: "Point") -> Tensor:
        """Return the gradient with respect to the latent value."""

    def temperature_gradient(self, grad: Tensor, point: "Point") -> Tensor:
        """Return the summands of the gradient with respect to the temperature."""


class Point:
    """What backward knows about the point it differentiates at (all tensors of the input's shape).

    Args:
        x: latent values.
        u: :math:`x / s + z`, non-finite values replaced as in the forward.
        q: level that u was mapped to.
        step: the scale s.
        lo: smallest level.
        hi: largest level.
        rounding: the grid.
        temperature: learned temperature or None.
    """

    def __init__(
        self, x: Tensor, u: Tensor, q: Tensor, step: Tensor, lo: Tensor | float, hi: Tensor | float, rounding: Rounding,
        temperature: Tensor | None,
    ) -> None:  # fmt: skip
        self.x, self.u, self.q, self.step, self.lo, self.hi = x, u, q, step, lo, hi
        self.rounding, self.temperature = rounding, temperature

    def clip(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return values where u lies within the clip range, else 0, without a mask where masks are slow."""
        return within(values, self.u, self.lo, self.hi, out=out)
