"""regrid(): give the quantizers of a prepared model another precision."""

import fnmatch
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_qat.conversion.state import quantizers, refresh_scales
from lightning_qat.conversion.view import TRANSFORMS
from lightning_qat.functional.levels import dequantize, quantize
from lightning_qat.functional.scaling import Sample
from lightning_qat.quantization.grid import Grid, with_bits
from lightning_qat.quantization.quantizer import FakeQuantizer


@final
@dataclass(frozen=True, eq=False)
class Regridded:
    """A quantizer whose grid changed.

    Args:
        name: its dotted name.
        quantizer: the quantizer.
        before: the grid that it had.
        after: the grid that it has.
    """

    name: str
    quantizer: FakeQuantizer
    before: Grid
    after: Grid

    @property
    def has_rescaled_input(self) -> bool:
        """Whether this is an input whose stored scale was converted by the ratio of the ranges."""
        return self.quantizer.layout.is_input and self.quantizer.stored and self.quantizer.calibrated


def layer_of(name: str) -> str:
    """Return the dotted name of the layer that a quantizer belongs to, without what torch.compile puts between.

    >>> layer_of("net._orig_mod.fc.weight_quantizer")
    'net.fc'
    """
    return ".".join(part for part in name.split(".")[:-1] if part != "_orig_mod")


def matching_quantizers(model: nn.Module, match: str, *, inputs: bool = False) -> dict[str, FakeQuantizer]:
    """Return the quantizers whose layer matches, by dotted name; a shared one if any of its layers does.

    Args:
        model: a prepared model.
        match: glob over dotted layer names.
        inputs: whether quantizers of inputs count, too.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    found: dict[int, tuple[str, FakeQuantizer]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, FakeQuantizer) or (module.layout.is_input and not inputs):
            continue
        if fnmatch.fnmatchcase(layer_of(name), match):
            found.setdefault(id(module), (name, module))
    if not found:
        layers = sorted({layer_of(name) for name in quantizers(model)})
        raise ValueError(f"match={match!r} matches no quantized layer; there are {layers[:8]}")
    return dict(found.values())


def target_grid(quantizer: FakeQuantizer, precision: object) -> Grid:
    """Return the grid that a precision means for a quantizer: itself, or so many bits of the family of its recipe.

    Raises:
        TypeError: neither bits nor a grid.
        ValueError: bits that the family does not have.
    """
    if isinstance(precision, Grid):
        return precision
    if not isinstance(precision, int):
        raise TypeError(f"{quantizer.name}: precision={precision!r} is neither bits (1 to 8) nor a grid such as Int(4)")
    try:
        return with_bits(quantizer.spec.grid, precision)
    except ValueError as error:
        raise ValueError(f"{quantizer.name}: {quantizer.spec.grid!r} cannot have {precision} bits: {error}") from None


def check_precisions(
    model: nn.Module, precisions: Iterable[object], *, match: str = "*", inputs: bool = False
) -> dict[str, FakeQuantizer]:
    """Check that all precisions are possible for the matching quantizers, before a long run begins.

    Returns:
        The matching quantizers.

    Raises:
        ValueError: a pattern that matches nothing, or a precision that a quantizer cannot have, with its layer's name.
    """
    chosen = matching_quantizers(model, match, inputs=inputs)
    wanted = list(precisions)
    for name, quantizer in chosen.items():
        for precision in wanted:
            check_grid(quantizer, target_grid(quantizer, precision), model.get_submodule(name.rpartition(".")[0]), name)
    return chosen


def check_grid(quantizer: FakeQuantizer, grid: Grid, layer: nn.Module, name: str) -> None:
    """Check that a quantizer can change to a grid.

    Args:
        quantizer: of a weight or an input.
        grid: the new one.
        layer: whose weight or input it is.
        name: dotted name of the quantizer, or of the weight.

    Raises:
        ValueError: a zero point on one side only, a grid without meaning for the scale, or one without zero where zeros
            must stay.
    """
    problem = "one has a zero point, the other has none" if grid.symmetric != quantizer.spec.grid.symmetric else ""
    try:
        replace(quantizer.spec, grid=grid)
    except ValueError as error:
        problem = problem or str(error)
    if problem:
        raise ValueError(f"{quantizer.name}: cannot change from {quantizer.spec.grid!r} to {grid!r}: {problem}")
    _check_zero(layer, name, grid)


def _check_zero(layer: nn.Module, name: str, grid: Grid) -> None:
    if grid.has_zero or name.endswith("input_quantizer"):
        return
    pruned = any(key.endswith("_mask") for key in layer._buffers)
    if pruned or getattr(layer, "padding_idx", None) is not None:
        reason = "its pruned weights" if pruned else "the row of its padding_idx"
        raise ValueError(f"{layer_of(name)}: {grid!r} has no zero, so that {reason} could not stay zero")


def regrid(model: nn.Module, precision: object, *, match: str = "*", inputs: bool = False) -> list[Regridded]:
    """Change the grids of a prepared model, in place; scales of weights are found anew from the present weights.

    Stored scales of inputs are converted by the ratio of the ranges; :func:`refine_inputs` compares that with the
    next batch.

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
    chosen = check_precisions(model, (precision,), match=match, inputs=inputs)
    changed = []
    for name, quantizer in chosen.items():
        before, after = quantizer.grid, target_grid(quantizer, precision)
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


@torch.no_grad()
def _rescale(quantizer: FakeQuantizer, before: Grid, after: Grid) -> None:
    if quantizer.stored and quantizer.calibrated:
        ratio = (before.hi - before.lo) * before.step_factor / ((after.hi - after.lo) * after.step_factor)
        quantizer.scale.mul_(ratio)
        if quantizer.zero_point is not None:
            moved = torch.round(after.lo + (quantizer.zero_point - before.lo) / ratio)
            quantizer.zero_point.copy_(moved.clamp(after.lo, after.hi))


@contextmanager
def refine_inputs(model: nn.Module, changed: Iterable[Regridded]) -> Iterator[None]:
    """Let the next forward inside the context find stored scales of inputs anew, before it uses them.

    Of the scale by ratio and the one found from the batch, each layer keeps the one with the smaller squared error on
    the batch; in a distributed run on the batches of all processes, so that all keep the same.

    Args:
        model: a prepared model.
        changed: what :func:`regrid` returned.
    """
    handles = [
        model.get_submodule(each.name.rpartition(".")[0]).register_forward_pre_hook(
            partial(_Refinement(), each.quantizer), with_kwargs=True, prepend=True
        )
        for each in changed
        if each.has_rescaled_input
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Refinement:
    """A forward pre-hook that acts once."""

    def __init__(self) -> None:
        self.done = False

    def __call__(
        self, quantizer: FakeQuantizer, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.done:
            self.done = True
            values = {id(x): x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()}
            refine_scale(quantizer, [_transformed(layer, x) for x in values.values()])


def _transformed(layer: nn.Module, x: Tensor) -> Tensor:
    transforms: Any = layer._modules.get(TRANSFORMS) or ()
    for transform in transforms:
        x = transform.input(x)
    return x


@torch.no_grad()
def refine_scale(quantizer: FakeQuantizer, inputs: list[Tensor]) -> None:
    """Find the stored scale of an input from data, and keep it if its squared error is smaller than the present one's.

    Args:
        quantizer: of an input, with a stored scale.
        inputs: what the layer receives on this process.
    """
    observer = quantizer.new_observer()
    for x in inputs:
        observer.update(x)
    observer.synchronize()
    if observer.num_batches == 0:
        return
    sample = observer.sample()
    scale, zero_point = quantizer.scale.clone(), _copy(quantizer.zero_point)
    before = _squared_error(quantizer, sample)
    quantizer.observer = observer
    try:
        quantizer.find_scale()
    finally:
        quantizer.observer = None
    if not _squared_error(quantizer, sample) < before:
        quantizer.scale.copy_(scale)
        if quantizer.zero_point is not None and zero_point is not None:
            quantizer.zero_point.copy_(zero_point)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _squared_error(quantizer: FakeQuantizer, sample: Sample) -> float:
    step, zero_point = (_on_cpu(part) for part in quantizer.step_and_zero_point(sample))
    assert step is not None  # noqa: S101 - a quantizer has one
    grid = quantizer.grid
    levels = quantize(sample.values, step, zero_point, lo=grid.lo, hi=grid.hi, rounding=grid)
    error = (dequantize(levels, step, zero_point) - sample.values).double().square()
    return float((error if sample.counts is None else error * sample.counts).sum())


def _on_cpu(tensor: Tensor | None) -> Tensor | None:  # where observers keep what they saw
    return None if tensor is None else tensor.detach().cpu()
