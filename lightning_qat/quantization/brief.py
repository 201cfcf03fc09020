"""How a weight is fake-quantized in eager mode on a CPU, in few calls: recomputed and learned scales, most grids."""

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from lightning_qat.functional.bounded import eager_absmax_scale, eager_finished_scale, eager_positive_scale
from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.scaling import Sample
from lightning_qat.quantization.grid import Grid
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.scale import AbsMax, AbsMean

_BRIEF: Final = "_brief"


@final
@dataclass(frozen=True, eq=False)
class _Brief:
    """What of a quantizer stays between forwards; another grid or another dtype of the weight makes a new one.

    Args:
        grid: the present one.
        dtype: of the weight.
        serves: whether the scale can be found in few calls.
        dims: dimensions over which one scale extends.
        ends: bounds of the grid.
        divisor: what takes the largest absolute value to the end of the grid.
        multiple: of the mean absolute value; None where it is the largest one that counts.
        largest: upper bound of recomputed scales.
    """

    grid: Grid
    dtype: torch.dtype
    serves: bool
    dims: tuple[int, ...]
    ends: tuple[float, float]
    divisor: float
    multiple: float | None
    largest: float


def _brief(quantizer: FakeQuantizer, weight: Tensor) -> _Brief:
    spec, grid = quantizer.spec, quantizer.grid
    serves = (
        (isinstance(spec.scale, AbsMax | AbsMean) or spec.scale.learned)
        and quantizer.temperature is None
        and grid.symmetric
        and grid.step_factor == 1.0
        and spec.torch_scale_dtype == torch.float32
        and weight.dtype in (torch.float32, torch.float64)
        and weight.numel() > 0
    )
    dims = spec.granularity.dims(weight.dim(), quantizer.layout)
    largest = min(torch.finfo(weight.dtype).max / 256, torch.finfo(torch.float32).max)
    multiple = spec.scale.multiple if isinstance(spec.scale, AbsMean) else None
    return _Brief(grid, weight.dtype, serves, dims, grid.bounds, grid.offset - grid.lo, multiple, largest)


def brief_setting(quantizer: FakeQuantizer, weight: Tensor) -> Setting | None:
    """Return the setting that :meth:`FakeQuantizer.detached_setting` returns, or None where that is to be asked.

    Args:
        quantizer: of the weight, whose spec, layout and shape never change.
        weight: so shaped that scales broadcast to it, on a CPU.
    """
    brief = quantizer.__dict__.get(_BRIEF)
    if brief is None or brief.grid is not quantizer.grid or brief.dtype != weight.dtype:
        brief = quantizer.__dict__[_BRIEF] = _brief(quantizer, weight)
    if not brief.serves:
        return None
    parameter = quantizer._parameters.get("scale")
    if parameter is not None:
        step, no_nan = eager_positive_scale(parameter), False
    elif brief.multiple is None:
        step, no_nan = eager_absmax_scale(weight.detach(), brief.dims, brief.divisor, brief.largest)
    else:
        mean = Sample(weight.detach(), brief.dims).mean()
        scale = quantizer.grid.absmean_scale(mean, quantizer.hi).mul_(brief.multiple)
        step, no_nan = eager_finished_scale(scale, brief.largest)
    return Setting(
        step, None, None, quantizer.lo, quantizer.hi, quantizer.family, quantizer.spec.gradient, parameter is not None,
        no_nan, brief.ends, parameter, quantizer.present_softness,
    )  # fmt: skip
