"""Hadamard rotations that need not be computed while the model runs: merged into the weights that come before."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.bake import CODES, bake, codes
from lightning_qat.conversion.baked_input import BAKED_ARGUMENTS, BAKED_INPUT, BakedInput, apply_baked_input
from lightning_qat.conversion.calibrate import default_forward
from lightning_qat.conversion.fold import Forward, Uses
from lightning_qat.conversion.inputs import remove_hook
from lightning_qat.conversion.prepare import prepared_state
from lightning_qat.conversion.undisturbed import evaluating
from lightning_qat.conversion.view import is_view
from lightning_qat.functional.hadamard import hadamard_rotate, random_signs
from lightning_qat.quantization.transform import Hadamard

_ROUNDING: Final = 0.02  # as of BatchNorm: a quantized input may fall on the other side of a border


def online_rotations(model: nn.Module) -> dict[str, Hadamard]:
    """Return which layers of a baked model rotate their input while they run, by dotted name."""
    check_model("online_rotations", model)
    found = {name: _rotation(module) for name, module in model.named_modules()}
    return {name: rotation.value for name, rotation in found.items() if rotation is not None}


@torch.no_grad()
def fold_rotations(model: nn.Module, batch: Any, forward: Forward | None = None) -> nn.Module:
    r"""Return a baked copy in which rotations of inputs are part of the float layer that the input comes from.

    A layer with ``Hadamard`` computes :math:`\hat W (R x)`; its codes are those of the rotated weight already. Where
    :math:`x = A z + b` is the output of a linear layer in float, or :math:`x` a row of an embedding in float, and all
    who read it rotate it alike, A, b or the table are rotated instead: :math:`R x = (R A) z + R b`. Anything else stays
    as it is and rotates while it runs: what comes from a quantized layer (rotated rows would leave its grid), and what
    passes a norm with weights or a nonlinearity. To rotate between two quantized layers see :func:`rotate_between`.

    The output equals that of the model up to rounding of floats, which is checked on the batch.

    Args:
        model: prepared or baked; it stays as it is.
        batch: real input. It shows which layer feeds which and nothing else.
        forward: called with (model, batch); the default is that of ``calibrate``.

    Returns:
        The copy, in evaluation mode; :func:`online_rotations` tells what is left.

    Raises:
        TypeError: if model is no module.
        ValueError: a model that is neither prepared nor baked.
        RuntimeError: outputs that differ by more than rounding.

    Source: computational invariance, QuaRot, arXiv:2404.00456 section 3.
    """
    check_model("fold_rotations", model)
    baked = bake(model) if prepared_state(model) is not None else copy.deepcopy(model)
    codes(baked)  # raises for a float model
    run = forward or default_forward
    baked.eval()
    expected, pairs = _observe(baked, batch, run)
    for producer, consumers in pairs:
        rotation = _rotation(consumers[0])
        assert rotation is not None  # noqa: S101 - _observe() looked
        _rotate_outputs(producer, partial(hadamard_rotate, signs=rotation.signs))
        for consumer in consumers:
            _drop_rotation(consumer)
    _check(expected, run(baked, batch), _ROUNDING, "fold_rotations")
    return baked


@torch.no_grad()
def rotate_between(
    model: nn.Module,
    producer: str,
    consumer: str,
    batch: Any,
    *,
    seed: int = 0,
    block: int | None = None,
    rows: tuple[int, int] | None = None,
    forward: Forward | None = None,
) -> None:
    r"""Rotate the outputs of one linear layer and the inputs of another alike, in place; the model computes the same.

    :math:`W_c x = (W_c R^T)(R x)`: where nothing but linear operations that treat all rotated features alike stand
    between, both weights are rotated before they are quantized, and nothing is left to compute when the model runs. So
    it is with two linear layers in a row, and, per head, with the values and the output projection of attention. To be
    called on the float model, before ``prepare``. That the output is the same is checked on the batch; where it is not,
    the weights are put back.

    Args:
        model: float.
        producer: dotted name of the linear layer whose outputs are rotated.
        consumer: dotted name of the linear layer that reads them.
        batch: real input.
        seed: of the random signs.
        block: rotate so many features at a time, all blocks alike: the width of a head. All at once by default.
        rows: first and past the last of the outputs to rotate, where the producer has more: the values in a packed
            projection of queries, keys and values.
        forward: called with (model, batch); the default is that of ``calibrate``.

    Raises:
        TypeError: if model is no module.
        ValueError: layers that are not linear, or quantized; blocks that do not fit.
        RuntimeError: outputs that differ by more than rounding.

    Source: computational invariance, QuaRot, arXiv:2404.00456 section 3.
    """
    check_model("rotate_between", model)
    first, second = _linear(model, producer), _linear(model, consumer)
    start, stop = rows or (0, first.out_features)
    size = block or stop - start
    _check_blocks(producer, consumer, first, second, start, stop, size)
    run, signs = forward or default_forward, random_signs(size, seed).to(first.weight.device)

    def rotate(x: Tensor) -> Tensor:
        return hadamard_rotate(x.unflatten(-1, (-1, size)), signs).flatten(-2)

    before = {each: copy.deepcopy(each.state_dict()) for each in (first, second)}
    with evaluating(model):
        expected = run(model, batch)
        _rotate_outputs(first, lambda x: torch.cat([x[..., :start], rotate(x[..., start:stop]), x[..., stop:]], -1))
        second.weight.copy_(rotate(second.weight.double()))
        eps = torch.finfo(second.weight.dtype).eps
        try:
            _check(expected, run(model, batch), max(1e-4, 8 * eps), f"rotate_between({producer!r}, {consumer!r})")
        except RuntimeError:
            for each, state in before.items():
                each.load_state_dict(state)
            raise


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        names = [key for key, each in model.named_modules() if isinstance(each, nn.Linear)]
        raise ValueError(f"rotate_between: {name!r} is no linear layer of the model; there are {names[:8]}")
    if is_view(module) or CODES in vars(module):
        raise ValueError(f"rotate_between: {name} is quantized; rotate the float model, before prepare()")
    return module


def _check_blocks(
    producer: str, consumer: str, first: nn.Linear, second: nn.Linear, start: int, stop: int, size: int
) -> None:
    if not 0 <= start < stop <= first.out_features:
        raise ValueError(
            f"rotate_between: rows=({start}, {stop}) do not lie in the {first.out_features} outputs of {producer}"
        )
    whole = size == stop - start
    if size < 2 or (stop - start) % size or second.in_features % size or (whole and second.in_features != size):
        raise ValueError(
            f"rotate_between: blocks of {size} do not divide the {stop - start} rotated outputs of {producer} and the "
            f"{second.in_features} inputs of {consumer}; choose block= (the width of a head) or rows="
        )


def _rotation(module: nn.Module) -> Any:
    """Return the rotation that a baked linear layer begins with, or None."""
    baked_input = module._modules.get(BAKED_INPUT)
    if not isinstance(module, nn.Linear) or not isinstance(baked_input, BakedInput) or not len(baked_input.transforms):
        return None
    first: Any = baked_input.transforms[0]
    return first if isinstance(first.value, Hadamard) else None


def _is_producer(module: nn.Module) -> bool:
    if CODES in vars(module):
        return False
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _observe(model: nn.Module, batch: Any, run: Forward) -> tuple[Any, list[tuple[nn.Module, list[nn.Module]]]]:
    """Run the model, and return its output and the float layers with those who rotate what comes out of them."""
    watch = Uses()
    handles = [module.register_forward_hook(watch.made) for module in model.modules() if _is_producer(module)]
    for module in model.modules():
        if _rotation(module) is not None:  # first of all: other hooks may replace the input
            handles.append(module.register_forward_pre_hook(watch.enter, prepend=True))
            handles.append(module.register_forward_hook(watch.leave))
    try:
        with watch:
            output = run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in tree_leaves(output):
        watch.used(leaf)
    return output, [pair for pair in map(_pair_of(model, watch), watch.makers) if pair is not None]


def _pair_of(model: nn.Module, watch: Uses) -> Callable[[int], tuple[nn.Module, list[nn.Module]] | None]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1

    def pair(key: int) -> tuple[nn.Module, list[nn.Module]] | None:
        producer, readers = watch.makers[key][0], watch.readers.get(key, [])
        if not readers or None in readers or any(watch.calls[each] != 1 for each in (producer, *readers)):
            return None
        alike = len({_rotation(reader).value for reader in readers}) == 1
        alone = owners[id(producer._parameters["weight"])] == 1
        return (producer, readers) if alike and alone else None

    return pair


def _rotate_outputs(layer: nn.Module, rotate: Callable[[Tensor], Tensor]) -> None:
    """Rotate what a linear layer or an embedding returns, by its parameters; in float64."""
    weight: Any = layer._parameters["weight"]
    wide = weight.double()
    weight.copy_(rotate(wide) if isinstance(layer, nn.Embedding) else rotate(wide.T).T)
    bias: Any = layer._parameters.get("bias")
    if bias is not None:
        bias.copy_(rotate(bias.double()))


def _drop_rotation(layer: nn.Module) -> None:
    baked_input: Any = layer._modules[BAKED_INPUT]
    baked_input.transforms = nn.ModuleList(list(baked_input.transforms)[1:])
    if baked_input.spec is None and not len(baked_input.transforms):
        del layer._modules[BAKED_INPUT]
        delattr(layer, BAKED_ARGUMENTS)
        remove_hook(layer, apply_baked_input)


def _check(expected: Any, actual: Any, largest: float, who: str) -> None:
    for want, got in zip(tree_leaves(expected), tree_leaves(actual), strict=True):
        if isinstance(want, Tensor) and want.is_floating_point():
            error = float((got - want).double().norm()) / max(float(want.double().norm()), 1e-30)
            if not error <= largest:
                raise RuntimeError(f"{who}: outputs differ by a relative {error:.1e}, which is more than rounding")
