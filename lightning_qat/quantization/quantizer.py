"""The module that fake-quantizes one tensor of a layer."""

from collections.abc import Callable
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from lightning_qat.functional.fake_quantize import fake_quantize, positive_scale, quantize
from lightning_qat.functional.scaling import Sample
from lightning_qat.quantization.gradient import LearnedSoft
from lightning_qat.quantization.granularity import Layout
from lightning_qat.quantization.grid import Grid, decode_grid
from lightning_qat.quantization.observer import Observer
from lightning_qat.quantization.scale import Bounds, Learned, MovingAverage
from lightning_qat.quantization.spec import QuantizerSpec
from lightning_qat.quantization.tensor import QuantizedTensor

_LEAST_TEMPERATURE = 0.03


def _without_bits(grid: Grid) -> tuple[float, float]:
    family, _, parameter = grid.encode()
    return family, parameter


@final
class FakeQuantizer(nn.Module):
    """Replaces a tensor by the nearest values of a grid; the gradient passes as the spec says.

    State: ``grid_code`` (the present grid, so that a checkpoint knows its bit width), for stored scales ``scale``
    (a parameter if learned), ``zero_point`` (asymmetric grids) and ``calibrated``, for ``LearnedSoft`` ``temperature``.
    All of it is float32 and stays so under ``.to(bfloat16)``, ``.half()`` and ``.double()``.

    Args:
        spec: grid, granularity, scale and gradient.
        shape: shape of the weight; ``()`` for an input.
        layout: how its dimensions are read.
        name: dotted name used in messages.

    Raises:
        ValueError: a granularity that does not fit the shape.

    >>> from lightning_qat.quantization import AbsMax, FakeQuantizer, Int, PerTensor, QuantizerSpec
    >>> quantizer = FakeQuantizer(QuantizerSpec(Int(2), PerTensor(), AbsMax()), (3,))
    >>> quantizer(torch.tensor([-1.0, 0.2, 0.4]))
    tensor([-1.0000,  0.0000,  0.5000])
    """

    grid_code: Tensor
    calibrated: Tensor
    zero_point: Tensor | None
    lo: Tensor
    hi: Tensor

    def __init__(
        self, spec: QuantizerSpec, shape: tuple[int, ...] = (), layout: Layout | None = None, *, name: str = "quantizer"
    ) -> None:
        super().__init__()
        self.spec, self.layout, self.name = spec, layout or Layout(), name
        self.owner = name.rpartition(".")[0]
        self.grid: Grid = spec.grid
        # Used in the forward: stays the same object while only the bit width changes, or torch.compile would recompile.
        self.family: Grid = spec.grid
        self.enabled = True
        self.observer: Observer | None = None
        self.stale = False  # the scale must be found anew before the next use
        problem = spec.granularity.problem(shape, self.layout) if shape else None
        if problem:
            raise ValueError(f'{name}: {problem}, or exclude the layer with Rule("{name.rpartition(".")[0]}", None)')
        self.register_buffer("grid_code", torch.tensor(self.grid.encode()))
        self.register_buffer("lo", torch.tensor(self.grid.lo), persistent=False)
        self.register_buffer("hi", torch.tensor(self.grid.hi), persistent=False)
        self._register_scale(spec.granularity.scale_shape(shape, self.layout) if shape else (1,))
        temperature = spec.gradient.temperature if isinstance(spec.gradient, LearnedSoft) else None
        self.temperature = None if temperature is None else nn.Parameter(torch.tensor([temperature]))

    def _register_scale(self, shape: tuple[int, ...]) -> None:
        self.register_buffer("zero_point", None)
        if not self.stored:
            return
        if self.spec.scale.learned:
            self.scale: nn.Parameter | Tensor = nn.Parameter(torch.ones(shape))
        else:
            self.register_buffer("scale", torch.ones(shape))
        if not self.grid.symmetric:
            self.register_buffer("zero_point", torch.zeros(shape))
        self.register_buffer("calibrated", torch.zeros(()))

    @property
    def stored(self) -> bool:
        """Whether the scale is kept, instead of being recomputed in every forward."""
        return not self.spec.scale.recomputed

    @property
    def learned(self) -> bool:
        """Whether the scale is a parameter."""
        return self.spec.scale.learned

    @property
    def needs_calibration(self) -> bool:
        """Whether a stored scale was not found yet. Reads a tensor: not for hot paths."""
        return self.stored and (self.stale or not bool(self.calibrated))

    def _bounds(self) -> Bounds:
        return Bounds(self.family, self.lo, self.hi, self.spec.torch_scale_dtype)

    def _sample(self, x: Tensor) -> tuple[Tensor, Sample]:
        grouped = self.spec.granularity.group(x, self.layout)
        return grouped, Sample(grouped.detach(), self.spec.granularity.dims(grouped.dim(), self.layout))

    def step_and_zero_point(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Return the step between levels and the zero point that apply to a sample."""
        if self.stored:
            scale = self.scale
            scale = positive_scale(scale, self.spec.torch_scale_dtype) if self.learned else scale
            zero_point = self.zero_point
        else:
            wide = sample.values if sample.values.dtype == torch.float64 else sample.values.float()
            scale, zero_point = self.spec.scale.find(Sample(wide, sample.dims), self._bounds())
        factor = self.family.step_factor
        return (scale if factor == 1.0 else scale * factor), zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, in its dtype; while observing or disabled, x itself."""
        if self.observer is not None:
            self.observer.update(x)
            return x
        if not self.enabled:
            return self._connected(x)
        if self.stale:
            self.find_scale(x)
        grouped, sample = self._sample(x)
        step, zero_point = self.step_and_zero_point(sample)
        out = fake_quantize(
            grouped, step, zero_point, lo=self.lo, hi=self.hi, rounding=self.family, rule=self.spec.gradient,
            learned=self.learned,
            temperature=None if self.temperature is None else self.temperature.abs().clamp(min=_LEAST_TEMPERATURE),
        )  # fmt: skip
        return self.spec.granularity.ungroup(out, tuple(x.shape), self.layout)

    def _connected(self, x: Tensor) -> Tensor:
        """Keep parameters in the graph while disabled: DDP waits for the gradient of every parameter."""
        if torch.is_grad_enabled():
            for parameter in self.parameters():
                if parameter.requires_grad:
                    x = x + (0.0 * parameter.sum()).to(x.dtype)
        return x

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """Return the integer codes whose dequantized value equals the fake-quantized x."""
        if self.stale:
            self.find_scale(x)
        grouped, sample = self._sample(x.detach())
        step, zero_point = self.step_and_zero_point(sample)
        levels = quantize(grouped, step, zero_point, lo=self.lo, hi=self.hi, rounding=self.family)
        codes = self.spec.granularity.ungroup((levels - self.grid.offset).to(torch.int8), tuple(x.shape), self.layout)
        return QuantizedTensor(
            codes, step.detach().clone(), None if zero_point is None else zero_point.detach().clone(),
            self.grid.offset, self.grid, self.spec.granularity, self.layout, x.dtype,
        )  # fmt: skip

    @torch.no_grad()
    def find_scale(self, x: Tensor | None = None) -> None:
        """Find a stored scale from a tensor, or from what the observer has seen.

        Raises:
            ValueError: an observer that saw no finite value.
        """
        self.stale = False
        if not self.stored:
            return
        if x is None:
            assert self.observer is not None, f"{self.name}: nothing to find a scale from"  # noqa: S101
            sample = self.observer.sample()
        else:
            grouped, sample = self._sample(x.detach())
            sample = Sample(grouped.float() if grouped.dtype in (torch.float16, torch.bfloat16) else grouped, sample.dims)
        scale, zero_point = self.spec.scale.find(sample, Bounds(self.grid, self.grid.lo, self.grid.hi, self._dtype()))
        self.scale.copy_(scale.reshape(self.scale.shape))
        if zero_point is not None and self.zero_point is not None:
            self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))
        self.calibrated.fill_(1.0)

    def _dtype(self) -> torch.dtype:
        return self.spec.torch_scale_dtype

    def new_observer(self) -> Observer:
        """Return an observer that suits this quantizer's scale."""
        start = self.spec.scale.init if isinstance(self.spec.scale, Learned) else self.spec.scale
        return Observer(start.momentum) if isinstance(start, MovingAverage) else Observer()

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Change the grid. A stored scale keeps its value: find it anew where that is not wanted.

        Raises:
            ValueError: a grid that needs a zero point where there is none, or the reverse.
        """
        if grid.symmetric != self.spec.grid.symmetric:
            raise ValueError(
                f"{self.name}: cannot change from {self.grid!r} to {grid!r}: one has a zero point and the other has none"
            )
        self.grid = grid
        if _without_bits(grid) != _without_bits(self.family):
            self.family = grid
        self.grid_code.copy_(torch.tensor(grid.encode()))
        self.lo.fill_(grid.lo)
        self.hi.fill_(grid.hi)

    def extra_repr(self) -> str:
        """Return the compact form of the spec, with the present grid."""
        return self.spec.label.replace(self.spec.grid.label, self.grid.label, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_float32(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if out.dtype == tensor.dtype:
                return out
            return torch.empty_like(tensor, device=out.device) if tensor.is_meta else tensor.to(out.device)

        was_meta = self.grid_code.is_meta
        super()._apply(keep_float32, recurse)
        if was_meta and not self.grid_code.is_meta:  # to_empty() leaves garbage
            self.reset()
        return self

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the scale; it is found anew from the next weight, or by calibration."""
        self.set_grid(self.grid)
        if self.temperature is not None and isinstance(self.spec.gradient, LearnedSoft):
            self.temperature.fill_(self.spec.gradient.temperature)
        if self.stored:
            self.scale.fill_(1.0)
            self.calibrated.zero_()
            self.stale = not self.layout.is_input
            if self.zero_point is not None:
                self.zero_point.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        code = state_dict.get(f"{prefix}grid_code")
        if code is None:  # a float checkpoint: the scale belongs to other weights now
            self.reset()
            return
        if not code.is_meta:
            self.set_grid(decode_grid(tuple(float(v) for v in code)))  # type: ignore[arg-type]
        self.stale = False
        super()._load_from_state_dict(state_dict, prefix, *args)
