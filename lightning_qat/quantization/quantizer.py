"""The module that fake-quantizes one tensor of a layer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from lightning_qat.functional.bounded import (
    bounded_temperature,
    detached_scale,
    finish_scale,
    positive_scale,
    scale_floor,
    tells_no_nan,
)
from lightning_qat.functional.fake_quantize import Setting, fake_quantize
from lightning_qat.functional.gradients import number
from lightning_qat.functional.levels import quantize
from lightning_qat.functional.scaling import Sample
from lightning_qat.quantization._checks import check_kind
from lightning_qat.quantization.gradient import TEMPERATURE_RANGE, LearnedSoft
from lightning_qat.quantization.granularity import Layout
from lightning_qat.quantization.grid import Grid, decode_grid
from lightning_qat.quantization.loading import layer_is_left_out
from lightning_qat.quantization.observer import Observer
from lightning_qat.quantization.scale import Bounds, Learned, MovingAverage
from lightning_qat.quantization.spec import QuantizerSpec
from lightning_qat.quantization.tensor import QuantizedTensor
from lightning_qat.quantization.window import Window


def _without_bits(grid: Grid) -> tuple[float, float]:
    family, _, parameter = grid.encode()
    return family, parameter


def _float32(values: Sequence[float], device: str | None = None) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)  # whatever torch.set_default_dtype says


@final
class FakeQuantizer(nn.Module):
    """Replaces a tensor by the nearest values of a grid; the gradient passes as the spec says.

    State: for stored scales ``scale`` (a parameter if learned) and ``zero_point`` (asymmetric grids), for
    ``LearnedSoft`` ``temperature``, and a small tensor that encodes the present grid, so that a checkpoint knows its
    bit width. The grid and its bounds are no buffers: weight averaging would average them. All of it is float32 and
    stays so under ``.to(bfloat16)``, ``.half()`` and ``.double()``.

    Args:
        spec: grid, granularity, scale and gradient.
        shape: shape of the weight; ``()`` for an input.
        layout: how its dimensions are read; without one, those of a linear layer's weight or input.
        name: dotted name used in messages.

    Raises:
        TypeError: a spec that is none.
        ValueError: a granularity that does not fit the shape or the layout.

    >>> from lightning_qat.quantization import AbsMax, FakeQuantizer, Int, PerTensor, QuantizerSpec
    >>> quantizer = FakeQuantizer(QuantizerSpec(Int(2), PerTensor(), AbsMax()), (3,))
    >>> quantizer(torch.tensor([-1.0, 0.2, 0.4]))
    tensor([-1.0000,  0.0000,  0.5000])
    """

    zero_point: Tensor | None
    lo: Tensor
    hi: Tensor

    def __init__(
        self, spec: QuantizerSpec, shape: tuple[int, ...] = (), layout: Layout | None = None, *, name: str = "quantizer"
    ) -> None:
        super().__init__()
        check_kind("FakeQuantizer: spec", spec, QuantizerSpec)
        self.spec, self.name, self.owner = spec, name, name.rpartition(".")[0]
        self.layout = layout or Layout(channel_axis=0 if shape else None)
        self.grid: Grid = spec.grid
        # Used in the forward: stays the same object while only the bit width changes, or torch.compile would recompile.
        self.family: Grid = spec.grid
        self.enabled = True
        self.observer: Observer | None = None
        # While training: 1 leaves values within the grid's range as they are, towards 0 they become its levels.
        self.softness: Tensor | None = None
        self.window: Window | None = None
        if problem := spec.granularity.problem(shape, self.layout):
            raise ValueError(f'{name}: {problem}, or exclude the layer with Rule("{self.owner or "*"}", None)')
        self.calibrated = False
        self.stale = self.stored and not self.layout.is_input  # the scale must be found anew before the next use
        # Tensors, so that torch.compile does not specialize on them; on the CPU even where all else is on meta.
        self.lo, self.hi = (_float32([bound], device="cpu")[0] for bound in self.grid.bounds)
        self._register_scale(spec.granularity.scale_shape(shape, self.layout) if shape else (1,))
        temperature = spec.gradient.temperature if isinstance(spec.gradient, LearnedSoft) else None
        self.temperature = None if temperature is None else nn.Parameter(_float32([temperature]))

    def _register_scale(self, shape: tuple[int, ...]) -> None:
        self.register_buffer("zero_point", None)
        if not self.stored:
            return
        if self.spec.scale.learned:
            self.scale: nn.Parameter | Tensor = nn.Parameter(torch.ones(shape, dtype=torch.float32))
        else:
            self.register_buffer("scale", torch.ones(shape, dtype=torch.float32))
        if not self.grid.symmetric:
            self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.float32))

    @property
    def stored(self) -> bool:
        """Whether the scale is kept, instead of being recomputed in every forward."""
        return not self.spec.scale.recomputed

    @property
    def learned(self) -> bool:
        """Whether the scale is a parameter."""
        return self.spec.scale.learned

    @property
    def has_parameters(self) -> bool:
        """Whether the scale or the temperature is one."""
        return self.learned or self.temperature is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether a stored scale was not found yet."""
        return self.stored and (self.stale or not self.calibrated)

    @property
    def present_softness(self) -> Tensor | float | None:
        """How soft the rounding is in the next forward; None where it is hard."""
        return None if self.softness is None or not self.training else number(self.softness)

    def grouped(self, x: Tensor) -> Tensor:
        """Return x so shaped that scales broadcast to it."""
        return self.spec.granularity.group(x, self.layout)

    def _sample(self, x: Tensor) -> tuple[Tensor, Sample]:
        grouped = self.grouped(x)
        return grouped, Sample(grouped.detach(), self.spec.granularity.dims(grouped.dim(), self.layout))

    def step_and_zero_point(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Return the step between levels and the zero point that apply to a sample."""
        if self.stored:
            scale = positive_scale(self.scale, self._scale_dtype) if self.learned else self.scale
            zero_point = self._stored_zero_point()
        else:
            if sample.values.dtype not in (torch.float32, torch.float64):
                sample = Sample(sample.values.float(), sample.dims)
            scale, zero_point = self.spec.scale.find(sample, Bounds(self.family, self.lo, self.hi, self._scale_dtype))
        return (scale if (factor := self.family.step_factor) == 1.0 else scale * factor), zero_point

    def _stored_zero_point(self) -> Tensor | None:
        # rounded: weight averaging of a constant is off by a few units in the last place
        return None if self.zero_point is None else torch.round(self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return x fake-quantized, in its dtype; while observing or disabled, x itself."""
        if self.observer is not None:
            self.observer.update(x)
            return x
        if not self.enabled:
            return self._connected(x)
        if self.stale:
            self.find_scale(x)
        grouped, setting = self.setting(x)
        out = fake_quantize(
            grouped, setting.scale, setting.zero_point, lo=setting.lo, hi=setting.hi, rounding=setting.rounding,
            rule=setting.rule, learned=setting.learned, temperature=setting.temperature, no_nan=setting.no_nan,
            softness=setting.softness,
        )  # fmt: skip
        return self.spec.granularity.ungroup(out, tuple(x.shape), self.layout)

    def setting(self, x: Tensor, known: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Setting]:
        """Return x so shaped that scales broadcast to it, and how it is fake-quantized.

        Args:
            x: weight or input.
            known: step and zero point of the same x where they were found before; stored ones are read anyway.
        """
        grouped, setting = self.detached_setting(x, known)
        return grouped, setting.attached()

    def detached_setting(self, x: Tensor, known: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Setting]:
        """Return what :meth:`setting` does; a learned scale may be out of the graph, with its parameter beside it."""
        grouped, sample = self._sample(x)
        parameter = self.scale if self.learned and self.family.step_factor == 1.0 else None
        if parameter is not None:
            step, zero_point = detached_scale(parameter, self._scale_dtype), self._stored_zero_point()
        else:
            step, zero_point = self.step_and_zero_point(sample) if known is None or self.stored else known
        temperature = None if self.temperature is None else bounded_temperature(self.temperature, *TEMPERATURE_RANGE)
        no_nan = not self.stored and tells_no_nan(step, x, self.family.step_factor * scale_floor(self._scale_dtype))
        tensors = step, zero_point, temperature, self.lo, self.hi
        ends = None if torch.compiler.is_compiling() else self.grid.bounds  # else it would compile anew for other bits
        rest = no_nan, ends, parameter, self.present_softness
        return grouped, Setting(*tensors, self.family, self.spec.gradient, self.learned, *rest)

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
        """Find a stored scale from a tensor, or from what the observer has seen; non-finite values do not count.

        Raises:
            ValueError: an observer that saw no finite value.
        """
        if self.stored:
            sample = self._observed() if x is None else self._sample(x.detach())[1].finite()
            if sample.values.numel() > 0:
                self._store(*self.spec.scale.find(sample, Bounds(self.grid, *self.grid.bounds, self._scale_dtype)))
            self.calibrated = True
        self.stale = False

    @property
    def _scale_dtype(self) -> torch.dtype:
        return self.spec.torch_scale_dtype

    def _observed(self) -> Sample:
        assert self.observer is not None, f"{self.name}: nothing to find a scale from"  # noqa: S101
        if self.observer.num_batches == 0:
            raise ValueError(f"{self.name}: calibration saw no finite value here; was the layer used on these batches?")
        return self.observer.sample()

    def _store(self, scale: Tensor, zero_point: Tensor | None) -> None:
        self.drop()
        self.scale.copy_(finish_scale(scale, self._scale_dtype).reshape(self.scale.shape))
        if zero_point is not None and self.zero_point is not None:
            self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))

    def new_observer(self) -> Observer:
        """Return an observer that suits this quantizer's scale."""
        start = self.spec.scale.init if isinstance(self.spec.scale, Learned) else self.spec.scale
        return Observer(start.momentum) if isinstance(start, MovingAverage) else Observer()

    def outdate(self) -> None:
        """Let a stored scale be found anew before its next use: there is another weight."""
        self.stale = self.stored
        self.drop()

    def drop(self) -> None:
        """Forget quantized weights that an accumulation window keeps."""
        if self.window is not None:
            self.window.drop()

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation."""
        self.drop()
        return super().train(mode)

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Change the grid. A stored scale keeps its value: find it anew where that is not wanted.

        Raises:
            ValueError: a grid that needs a zero point where there is none, or the reverse; a grid without meaning
                for the scale of the spec.
        """
        if grid.symmetric != self.spec.grid.symmetric:
            raise ValueError(
                f"{self.name}: cannot change from {self.grid!r} to {grid!r}: one has a zero point, the other has none"
            )
        try:
            replace(self.spec, grid=grid)
        except ValueError as error:
            raise ValueError(f"{self.name}: cannot change from {self.grid!r} to {grid!r}: {error}") from None
        self.drop()
        self.grid = grid
        if _without_bits(grid) != _without_bits(self.family):
            self.family = grid
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

        was_meta = any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))
        super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]
        self.lo, self.hi = (bound if (moved := keep_float32(bound)).is_meta else moved for bound in (self.lo, self.hi))
        self.set_grid(self.grid)  # to_empty() leaves garbage
        if was_meta and not any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
            self.reset()
        return self

    def get_extra_state(self) -> Tensor:
        """Return the present grid and whether the scale was found, as a tensor of four numbers."""
        return _float32([*self.grid.encode(), float(self.calibrated)], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a grid."""
        family, bits, parameter, calibrated = state.tolist()
        if [family, bits, parameter] != _float32(self.grid.encode(), device="cpu").tolist():  # float32 rounds 1 / 3
            self.set_grid(decode_grid((family, bits, parameter)))
        self.calibrated = bool(calibrated)
        self.stale = self.stored and not self.calibrated and not self.layout.is_input

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the scale; it is found anew from the next weight, or by calibration."""
        self.set_grid(self.grid)
        if self.temperature is not None and isinstance(self.spec.gradient, LearnedSoft):
            self.temperature.fill_(self.spec.gradient.temperature)
        if self.stored:
            self.scale.fill_(1.0)
            self.calibrated = False
            self.stale = not self.layout.is_input
            if self.zero_point is not None:
                self.zero_point.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.drop()
        # A float checkpoint: the scale belongs to other weights now. Sharded loading leaves a placeholder there.
        extra = f"{prefix}_extra_state"
        if not isinstance(state_dict.get(extra), Tensor):
            if extra in state_dict and not prefix:  # Lightning loads shards tensor by tensor, in place: this is loaded
                self.calibrated, self.stale = True, False
            elif not (prefix and layer_is_left_out(prefix, args[2])):
                self.reset()
            return
        for name in self.state_dict():  # a checkpoint in 16 bits, assigned instead of copied, would change the dtype
            if isinstance(saved := state_dict.get(prefix + name), Tensor):
                state_dict[prefix + name] = saved.float()
        super()._load_from_state_dict(state_dict, prefix, *args)
