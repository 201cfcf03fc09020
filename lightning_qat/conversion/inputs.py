"""Quantized inputs: one module-level forward pre-hook that looks its quantizer up on the module."""

from typing import Any

from torch import Tensor, nn

from lightning_qat.conversion.view import INPUT_QUANTIZER, TRANSFORMS

_ATTENTION_INPUTS = ("query", "key", "value")


def quantize_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Transform and fake-quantize the input tensors of a module. No closure: copies and pickles stay independent."""
    if not _enabled(module):
        return args, kwargs
    names = _ATTENTION_INPUTS if isinstance(module, nn.MultiheadAttention) else ("input",)
    done: dict[int, Tensor] = {}  # attention tests whether query, key and value are the same tensor
    args = tuple(_once(module, arg, done) if i < len(names) else arg for i, arg in enumerate(args))
    kwargs = {key: _once(module, arg, done) if key in names else arg for key, arg in kwargs.items()}
    return args, kwargs


def _enabled(module: nn.Module) -> bool:
    return all(getattr(child, "enabled", True) for child in module._modules.values())


def _once(module: nn.Module, x: Any, done: dict[int, Tensor]) -> Any:
    if not isinstance(x, Tensor):
        return x
    if id(x) not in done:
        done[id(x)] = transform_and_quantize(module, x)
    return done[id(x)]


def transform_and_quantize(module: nn.Module, x: Tensor) -> Tensor:
    """Return an input as the layer computes with it."""
    transforms: Any = module._modules.get(TRANSFORMS) or ()
    for transform in transforms:
        x = transform.input(x)
    quantizer = module._modules.get(INPUT_QUANTIZER)
    return x if quantizer is None else quantizer(x)
