"""regrid(): give the quantizers of a prepared model another precision."""

import fnmatch
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from lightning_qat.conversion.prepare import quantizers, refresh_scales
from lightning_qat.quantization.grid import Grid, with_bits
from lightning_qat.quantization.quantizer import FakeQuantizer


@final
@dataclass(frozen=True, eq=False)
class Regridded:
    """A quantizer whose grid changed."""

    name: str
    quantizer: FakeQuantizer
    before: Grid
    after: Grid


def regrid(model: nn.Module, precision: object, *, match: str = "*", inputs: bool = False) -> list[Regridded]:
    """Change the grids of a prepared model, in place; scales of weights are found anew from the present weights.

    Stored scales of inputs are converted by the ratio of the ranges: :func:`calibrate` finds better ones.

    Args:
        model: a prepared model.
        precision: bits (of the family of each layer's recipe), or a grid.
        match: glob over dotted layer names.
        inputs: whether quantizers of inputs change, too.

    Returns:
        The quantizers that changed; empty where all have that precision already.

    Raises:
        ValueError: a pattern that matches no quantizer, or bits that the family of a grid does not have.
    """
    matched = {name: q for name, q in quantizers(model).items() if fnmatch.fnmatchcase(_layer(name), match)}
    chosen = {name: q for name, q in matched.items() if inputs or not q.layout.is_input}
    if not chosen:
        layers = sorted({_layer(name) for name in quantizers(model)})
        raise ValueError(f"match={match!r} matches no quantized layer; there are {layers[:8]}")
    changed = []
    for name, quantizer in chosen.items():
        before, after = quantizer.grid, _target(quantizer, precision)
        if before == after:
            continue
        quantizer.set_grid(after)
        if quantizer.layout.is_input:
            _rescale(quantizer, before, after)
        else:
            quantizer.stale = quantizer.stored
        changed.append(Regridded(name, quantizer, before, after))
    refresh_scales(model)
    return changed


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _target(quantizer: FakeQuantizer, precision: object) -> Grid:
    if isinstance(precision, Grid):
        return precision
    assert isinstance(precision, int)  # noqa: S101 - schedules hold bits or grids
    return with_bits(quantizer.spec.grid, precision)


@torch.no_grad()
def _rescale(quantizer: FakeQuantizer, before: Grid, after: Grid) -> None:
    if quantizer.stored and quantizer.calibrated:
        ratio = (before.hi - before.lo) * before.step_factor / ((after.hi - after.lo) * after.step_factor)
        quantizer.scale.mul_(ratio)
        if quantizer.zero_point is not None:
            quantizer.zero_point.copy_(torch.round(after.lo + (quantizer.zero_point - before.lo) / ratio))
