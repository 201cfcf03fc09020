"""BatchNorm folded into the layer before it, without touching the meaning of its integer codes."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.bake import CODES, bake, codes
from lightning_qat.conversion.calibrate import default_forward
from lightning_qat.conversion.prepare import prepared_state
from lightning_qat.quantization.granularity import Granularity, PerChannel, PerGroup
from lightning_qat.quantization.grid import Int
from lightning_qat.quantization.tensor import QuantizedTensor

Forward = Callable[[nn.Module, Any], Any]
_FOLDABLE: Final = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LARGEST_ERROR: Final = 0.02
"""Relative. A rounding of 1e-7 may flip the code of a quantized input, which shows."""
_LARGEST_ERROR_IN_EPSILONS: Final = 32
"""What 16-bit models may differ by: every layer rounds to 8 or 11 bits, and the folded one does so elsewhere."""


@torch.no_grad()
def fold_batchnorm(model: nn.Module, batch: Any, forward: Forward | None = None) -> nn.Module:
    r"""Return a baked copy in which each BatchNorm that directly follows a layer is part of its scales and bias.

    With :math:`f = \gamma / \sqrt{\sigma^2 + \epsilon}` per output channel, the step becomes :math:`s |f|` (one scale
    per channel where there was one per tensor) and the bias :math:`\beta + (b - \mu) f`. Codes stay as they are; where
    f is negative they are negated, for which a code that has no negative gets an integer zero point; where f is 0 they
    become 0. The output equals that of the evaluated model up to rounding of floats, which is checked on the batch.
    Scales trained in float16 are not representable in it afterwards.

    Args:
        model: prepared or baked; it stays as it is.
        batch: real input. It shows which layer feeds which BatchNorm and nothing else.
        forward: called with (model, batch); the default is that of ``calibrate``.

    Returns:
        The copy, in evaluation mode, with ``nn.Identity`` where BatchNorm was.

    Raises:
        TypeError: if model is no module.
        ValueError: a model that is neither prepared nor baked; an f of 0 on a grid without zero.
        RuntimeError: outputs that differ by more than rounding.
    """
    check_model("fold_batchnorm", model)
    baked = bake(model) if prepared_state(model) is not None else copy.deepcopy(model)
    codes(baked)  # raises for a float model
    run = forward or default_forward
    baked.eval()
    expected, pairs = _observe(baked, batch, run)
    names = {module: name for name, module in baked.named_modules()}
    for layer, norm in pairs:
        _fold(layer, norm, names[layer])
        owner, _, slot = names[norm].rpartition(".")
        baked.get_submodule(owner)._modules[slot] = nn.Identity()
    _check(expected, run(baked, batch))
    return baked


def _observe(model: nn.Module, batch: Any, run: Forward) -> tuple[Any, list[tuple[nn.Module, nn.Module]]]:
    """Run the model, and return its output and the pairs of layer and BatchNorm that can become one."""
    layers = [module for module in model.modules() if _is_foldable(module)]
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.running_mean is not None]
    watch = Uses()
    handles = [layer.register_forward_hook(watch.made) for layer in layers]
    handles += [norm.register_forward_pre_hook(watch.enter) for norm in norms]
    handles += [norm.register_forward_hook(watch.leave) for norm in norms]
    try:
        with watch:
            output = run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in tree_leaves(output):
        watch.used(leaf)
    return output, watch.pairs(model)


def _is_foldable(module: nn.Module) -> bool:
    grouped = isinstance(module, _TRANSPOSED) and module.groups != 1
    return isinstance(module, _FOLDABLE) and type(module).forward in _FORWARDS and not grouped


_FORWARDS: Final = tuple(kind.forward for kind in _FOLDABLE)


class Uses(TorchFunctionMode):
    """Counts who uses the outputs of layers: one BatchNorm and nobody else makes a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[int, tuple[nn.Module, Tensor]] = {}
        self.calls: dict[nn.Module, int] = {}
        self.readers: dict[int, list[Any]] = {}
        self.inside: nn.Module | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the tensors among the arguments; reading an attribute such as the shape is no use."""
        if self.inside is None and getattr(func, "__name__", "") != "__get__":
            for leaf in tree_leaves((args, kwargs)):
                self.used(leaf)
        return func(*args, **(kwargs or {}))

    def used(self, value: Any) -> None:
        """Note that something other than a BatchNorm reads a value."""
        if isinstance(value, Tensor) and id(value) in self.makers:
            self.readers.setdefault(id(value), []).append(None)

    def made(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of layers."""
        self.calls[module] = self.calls.get(module, 0) + 1
        if isinstance(output, Tensor):
            self.makers[id(output)] = (module, output)  # kept, so that the id stays its own

    def enter(self, module: Any, args: Any) -> None:
        """Forward pre-hook of BatchNorm."""
        self.calls[module] = self.calls.get(module, 0) + 1
        self.inside = module
        if args and id(args[0]) in self.makers:
            self.readers.setdefault(id(args[0]), []).append(module)

    def leave(self, module: Any, args: Any, output: Any) -> None:
        """Forward hook of BatchNorm."""
        self.inside = None

    def pairs(self, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """Return the pairs whose weight nobody shares, whose channels agree, and that ran once."""
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        found = []
        for key, (layer, output) in self.makers.items():
            readers = self.readers.get(key, [])
            if len(readers) != 1 or readers[0] is None:
                continue
            channels = output.shape[-1 if isinstance(layer, nn.Linear) else 1]
            norm = readers[0]
            alone = owners[id(layer._parameters["weight"])] == 1
            in_place = not isinstance(layer, nn.Linear) or output.dim() == 2
            if alone and in_place and channels == norm.num_features and self.calls[layer] == self.calls[norm] == 1:
                found.append((layer, norm))
        return found


def _fold(layer: nn.Module, norm: Any, name: str) -> None:
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    factor = gamma / torch.sqrt(variance + norm.eps)
    weight: Any = layer._parameters["weight"]
    old: Any = layer._parameters.get("bias")
    bias = beta + ((0.0 if old is None else old.double()) - mean) * factor
    tensor: QuantizedTensor | None = vars(layer).get(CODES, {}).get("weight")
    if tensor is None:
        axis = 1 if isinstance(layer, _TRANSPOSED) else 0
        value = (weight.double() * _along(factor, axis, weight.dim())).to(weight.dtype)
    else:
        folded = scaled_by_channel(tensor, factor, name=name)
        vars(layer)[CODES] = {**vars(layer)[CODES], "weight": folded}
        value = folded.dequantize()
    layer.register_parameter("weight", nn.Parameter(value, requires_grad=weight.requires_grad))
    layer.register_parameter("bias", nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad))


def _along(values: Tensor, axis: int, dims: int) -> Tensor:
    return values.reshape([-1 if d == axis else 1 for d in range(dims)])


def scaled_by_channel(tensor: QuantizedTensor, factor: Tensor, *, name: str = "weight") -> QuantizedTensor:
    """Return a quantized weight whose output channels are multiplied by factors of any sign.

    Args:
        tensor: the weight.
        factor: float64 of shape [channels].
        name: used in messages.

    Raises:
        ValueError: a factor of 0 on a grid without zero, or a step that leaves the range of floats.

    >>> from lightning_qat.quantization import PerTensor, Ternary
    >>> codes = torch.tensor([[1, -1], [1, 0]])
    >>> weight = QuantizedTensor(codes, torch.tensor([0.5]), None, 0.0, Ternary(), PerTensor())
    >>> scaled_by_channel(weight, torch.tensor([2.0, -4.0])).dequantize()
    tensor([[ 1., -1.],
            [-2.,  0.]])
    """
    axis = tensor.layout.channel_axis or 0
    dims = tensor.codes.dim()
    granularity: Granularity = tensor.granularity
    if isinstance(granularity, PerGroup):
        spread = factor.reshape(-1, 1, 1)
        shape = tensor.scale.shape
    else:
        spread, granularity = _along(factor, axis, dims), PerChannel()
        shape = spread.shape
    zero, negative = _along(factor == 0, axis, dims), _along(factor < 0, axis, dims)
    if bool(zero.any()) and not tensor.grid.has_zero:
        raise ValueError(f"{name}: its BatchNorm multiplies a channel by 0, and {tensor.grid!r} has no 0 to hold it")
    scale = tensor.scale.expand(shape).double() * torch.where(spread == 0, 1.0, spread.abs())
    scale = scale.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise ValueError(f"{name}: folding its BatchNorm carries a scale out of the range of {scale.dtype}")
    levels, zero_point, grid = _signed(tensor, negative, shape, spread < 0)
    level = 0 if zero_point is None else granularity.ungroup(
        zero_point.expand(granularity.group(levels, tensor.layout).shape), tuple(levels.shape), tensor.layout
    )  # fmt: skip
    levels = torch.where(zero, level, levels).to(torch.int8)
    return QuantizedTensor(
        levels, scale, zero_point, tensor.offset, grid, granularity, tensor.layout, tensor.dtype
    )  # fmt: skip


def _signed(
    tensor: QuantizedTensor, negative: Tensor, shape: torch.Size, flipped: Tensor
) -> tuple[Tensor, Tensor | None, Any]:
    """Negate the levels of some channels: levels, zero point, and grid that hold the result."""
    levels, grid = tensor.codes.to(torch.int16), tensor.grid
    if tensor.offset:
        return torch.where(negative, -1 - levels, levels), None, grid
    lowest = bool((negative & (levels == int(grid.lo)) & (levels != -int(grid.hi))).any())
    if tensor.zero_point is None and not lowest:
        return torch.where(negative, -levels, levels), None, grid
    # -(q - z) = (-1 - q) - (-1 - z): the range lo .. hi maps onto itself
    zero_point = tensor.zero_point
    zero_point = torch.zeros_like(tensor.scale).expand(shape) if zero_point is None else zero_point.expand(shape)
    zero_point = torch.where(flipped, -1 - zero_point, zero_point).to(tensor.scale.dtype)
    bits = int(grid.hi - grid.lo).bit_length()
    return torch.where(negative, -1 - levels, levels), zero_point, Int(bits, symmetric=False)


def _check(expected: Any, actual: Any) -> None:
    for want, got in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
        if isinstance(want, Tensor) and want.is_floating_point():
            error = float((got - want).double().norm()) / max(float(want.double().norm()), 1e-30)
            if not error <= max(_LARGEST_ERROR, _LARGEST_ERROR_IN_EPSILONS * torch.finfo(want.dtype).eps):
                raise RuntimeError(
                    f"fold_batchnorm: outputs differ by a relative {error:.1e}, which is more than rounding"
                )


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> nn.Module:
    """Find the statistics of BatchNorm anew as the mean over batches, with the weights as they are now; in place.

    Quantized training ends with weights that jump between codes, and running averages lag behind them
    (arXiv:2203.11086). All other modules run in evaluation mode; training flags stay as they are.

    Args:
        model: prepared, baked or float.
        batches: real inputs.
        forward: called with (model, batch).

    Returns:
        The model.

    Raises:
        TypeError: if model is no module.
        ValueError: no batches.
    """
    check_model("reestimate_batchnorm", model)
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.running_mean is not None]
    num_batches = 0
    with _averaging(model, norms):
        for batch in batches:
            (forward or default_forward)(model, batch)
            num_batches += 1
        if not num_batches:
            raise ValueError("reestimate_batchnorm: no batches were given")
    return model


@contextmanager
def _averaging(model: nn.Module, norms: list[Any]) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
        yield
    finally:
        for norm in norms:
            norm.momentum = momenta[norm]
        for module, flag in training.items():
            module.training = flag
