"""gptq(): latent weights of a prepared model start where rounding keeps the outputs of the layers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.calibrate import default_forward
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.slots import slots_of
from lightning_qat.conversion.state import layers, prepared_state, refresh_scales
from lightning_qat.conversion.undisturbed import eagerly, evaluating, undisturbed_loaders, undisturbed_randomness
from lightning_qat.conversion.view import TRANSFORMS, adapter, base_class, is_view, view_names, weight_quantizer
from lightning_qat.functional.compensation import (
    Levels,
    compensated_levels,
    least_squares_scale,
    moved_into_cells,
    output_error,
)
from lightning_qat.quantization.granularity import PerChannel
from lightning_qat.quantization.quantizer import FakeQuantizer

_REFITS: Final = 3


@final
@dataclass(frozen=True)
class Compensated:
    """What :func:`gptq` did to a layer.

    Args:
        before: squared error of the layer's outputs by rounding to nearest, relative to their mean square.
        after: the same by compensated rounding.
        changed: share of the weights that round to another level now.
    """

    before: float
    after: float
    changed: float


def gptq(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    damping: float = 0.01,
    rounds: int = 8,
) -> dict[str, Compensated]:
    """Round the weights of linear layers so that errors compensate each other, and refit scales per channel.

    Each latent weight moves just as far as it must to round to its new level, so that training goes on from weights
    close to the trained ones. Layers are rounded in ``rounds`` groups, in the order of the model; each group sees the
    inputs that quantized earlier groups give. Left as they are: layers other than ``nn.Linear``, scales that are
    recomputed (AbsMax, AbsMean: they would move with the weights), transforms, shared and sharded weights, weights with
    LoRA adapters that are stored in fewer bits or whose adapters have trained, and the output projection of
    ``nn.MultiheadAttention``, which is read without a forward, so that its inputs are out of reach.

    The model runs in evaluation mode without gradients; random numbers and loaders are undisturbed, see
    :func:`calibrate`. All processes of a distributed run end with equal weights, found from the data of all. It costs
    ``rounds`` forward passes per batch and the square of the input width in memory for each layer of a group.

    Args:
        model: a prepared model.
        batches: what to run; read ``rounds`` times.
        forward: as for :func:`calibrate`.
        damping: of the Gram matrix, relative; positive.
        rounds: positive.

    Returns:
        What was done, by dotted layer name; empty where no layer qualifies.

    Raises:
        TypeError: if model is no module.
        ValueError: a model that is not prepared, arguments out of range, no batches, layers that no data reached.

    Source: GPTQ, arXiv:2210.17323; as a start for training our own, near to EfficientQAT, arXiv:2407.11062.
    """
    check_model("gptq", model)
    check_arguments(damping, rounds)
    if prepared_state(model) is None:
        raise ValueError("gptq: the model is not prepared; call prepare(model, recipe) first")
    refresh_scales(model)
    targets = compensable(model)
    found: dict[str, Compensated] = {}
    batches = list(batches)
    run = partial(_run_all, model, batches, forward or default_forward)
    with ExitStack() as stack:
        for context in (undisturbed_randomness(), undisturbed_loaders([batches]), evaluating(model), eagerly(model)):
            stack.enter_context(context)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_switched_off(targets.values()))
        for group in _groups(targets, rounds):
            for name, gram in _grams(group, run).items():
                found[name] = _compensate(name, group[name], gram, damping)
                weight_quantizer(group[name], "weight").enabled = True
    return found


def check_arguments(damping: float, rounds: int) -> None:
    """Check the arguments of :func:`gptq`.

    Raises:
        ValueError: one out of range.
    """
    if not 0 < damping < float("inf"):
        raise ValueError(f"gptq: damping={damping!r} is not allowed; choose a positive number such as 0.01")
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"gptq: rounds={rounds!r} is not allowed; choose a positive integer such as 8")


def compensable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that :func:`gptq` rounds, by dotted name."""
    owners: dict[int, int] = {}
    for module in layers(model).values():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {name: module for name, module in layers(model).items() if _qualifies(module, owners)}


def _qualifies(module: nn.Module, owners: dict[int, int]) -> bool:
    if not is_view(module) or view_names(module) != ("weight",) or module._modules.get(TRANSFORMS):
        return False
    weight, base = module._parameters.get("weight"), base_class(type(module))
    if base.forward is not nn.Linear.forward or weight is None or is_sharded(weight) or weight.is_meta:
        return False
    known = slots_of(module)
    if known is None or known.unreachable:
        return False
    return weight_quantizer(module, "weight").stored and owners[id(weight)] == 1 and _is_whole(module)


def _is_whole(module: nn.Module) -> bool:
    """Whether the stored weight is what is quantized: adapters, if any, add nothing yet, and it is not packed."""
    low_rank = adapter(module, "weight")
    return low_rank is None or (low_rank.base == "same" and not bool(low_rank.b.any()))


def _groups(targets: dict[str, nn.Module], rounds: int) -> Iterator[dict[str, nn.Module]]:
    names = list(targets)
    size = -(-len(names) // rounds) if names else 1
    for start in range(0, len(names), size):
        yield {name: targets[name] for name in names[start : start + size]}


@contextmanager
def _switched_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    quantizers = [weight_quantizer(module, "weight") for module in modules]
    flags = [quantizer.enabled for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, flag in zip(quantizers, flags, strict=True):
            quantizer.enabled = flag


def _run_all(model: nn.Module, batches: list[Any], forward: Callable[[nn.Module, Any], Any]) -> None:
    for batch in batches:
        forward(model, batch)


class _Gram:
    """Adds up outer products of a layer's inputs; a forward pre-hook."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(x.device.type, enabled=False):
            product = x.t() @ x
        self.total = product if self.total is None else self.total.add_(product)
        self.count += len(x)

    def mean(self, name: str) -> Tensor:
        """Return the mean over all processes."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._add_up(dist.get_world_size())
        if self.total is None or not self.count:
            raise ValueError(
                f"gptq: no data reached {name}; pass more batches, a forward= that uses the layer, or leave it in "
                "float with a rule"
            )
        return self.total / self.count

    def _add_up(self, num_processes: int) -> None:
        parts: list[Any] = [None] * num_processes
        dist.all_gather_object(parts, (None if self.total is None else self.total.cpu(), self.count))
        seen = [(total, count) for total, count in parts if total is not None]
        if seen:
            device = seen[0][0].device if self.total is None else self.total.device
            self.total = torch.stack([total for total, _ in seen]).sum(0).to(device)
            self.count = sum(count for _, count in seen)


def _grams(group: dict[str, nn.Module], run: Callable[[], None]) -> dict[str, Tensor]:
    sums = {name: _Gram() for name in group}
    with ExitStack() as stack:
        for name, module in group.items():
            stack.callback(module.register_forward_pre_hook(sums[name]).remove)
        run()
    return {name: total.mean(name) for name, total in sums.items()}


def _compensate(name: str, module: nn.Module, gram: Tensor, damping: float) -> Compensated:
    parameter, quantizer = module._parameters["weight"], weight_quantizer(module, "weight")
    assert parameter is not None  # noqa: S101 - _qualifies() saw it
    weight = parameter.detach() if parameter.dtype == torch.float64 else parameter.detach().float()
    gram = gram.to(weight.dtype)
    levels = _levels(quantizer, parameter.detach())
    nearest = levels.of(weight)
    try:
        chosen, levels = _best(weight, gram, levels, damping, refit=isinstance(quantizer.spec.granularity, PerChannel))
    except ValueError as error:
        raise ValueError(f"gptq: {name}: {error}") from None
    signal = ((weight @ gram) * weight).sum().clamp(min=torch.finfo(gram.dtype).tiny)
    before = output_error(weight, _levels(quantizer, weight).values(nearest), gram).sum() / signal
    if isinstance(quantizer.spec.granularity, PerChannel):
        quantizer._store(levels.scale[:, :1] / quantizer.family.step_factor, None)
        levels = _levels(quantizer, parameter.detach())
    parameter.copy_(moved_into_cells(weight, chosen, levels))
    after = output_error(weight, levels.values(levels.of(parameter.detach().to(weight.dtype))), gram).sum() / signal
    return Compensated(float(before), float(after), float((chosen != nearest).float().mean()))


def _levels(quantizer: FakeQuantizer, weight: Tensor) -> Levels:
    grouped, setting = quantizer.setting(weight)
    shape, granularity = tuple(weight.shape), quantizer.spec.granularity

    def spread(values: Tensor) -> Tensor:
        return granularity.ungroup(values.detach().expand(grouped.shape).contiguous(), shape, quantizer.layout)

    zero_point = None if setting.zero_point is None else spread(setting.zero_point)
    return Levels(spread(setting.scale), zero_point, setting.lo, setting.hi, setting.rounding)


def _best(weight: Tensor, gram: Tensor, levels: Levels, damping: float, *, refit: bool) -> tuple[Tensor, Levels]:
    """Round and refit the scales in turn; each output keeps the best of what was tried, the start included."""
    chosen, best = levels.of(weight), levels
    error = output_error(weight, levels.values(chosen), gram)
    for attempt in range(_REFITS + 1):
        tried = compensated_levels(weight, gram, levels, damping=damping)
        steps = tried if levels.zero_point is None else tried - levels.zero_point
        fitted = least_squares_scale(weight, steps, gram).abs() if refit else levels.scale
        fitted = torch.where(fitted > 0, fitted, levels.scale).expand_as(weight)
        candidate = Levels(fitted, levels.zero_point, levels.lo, levels.hi, levels.rounding)
        reached = output_error(weight, candidate.values(tried), gram)
        better = reached < error
        error, chosen = torch.where(better, reached, error), torch.where(better, tried, chosen)
        scale = torch.where(better, fitted, best.scale)
        best = Levels(scale, levels.zero_point, levels.lo, levels.hi, levels.rounding)
        if not refit or attempt == _REFITS:
            break
        levels = candidate
    return chosen, best
