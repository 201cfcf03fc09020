"""Quantized inputs: one module-level forward pre-hook that looks its quantizer up on the module."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import Tensor, nn

from lightning_qat.conversion.view import FUSED, INPUT_QUANTIZER, QUANTIZER_SUFFIX, TRANSFORMS, view_names

ARGUMENTS: Final = "_quantized_arguments"
"""Where a module keeps the names of the forward's leading arguments that are quantized."""


def quantize_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Transform and fake-quantize the input tensors of a module. No closure: copies and pickles stay independent."""
    if in_forward(module):
        return args, kwargs
    return on_inputs(partial(transform_and_quantize, module), getattr(module, ARGUMENTS), args, kwargs)


def in_forward(module: nn.Module) -> bool:
    """Whether a fused forward quantizes the input, so that nothing is left to the hook.

    Not where a hook of the user's own comes after ours, or where somebody replaced the forward of the module.
    """
    if not module._forward_pre_hooks:
        return False
    last = [*module._forward_pre_hooks.values()][-1]
    return last is quantize_inputs and hasattr(type(module), FUSED) and "forward" not in module.__dict__


def on_inputs(
    change: Callable[[Tensor], Tensor], names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the tensors among the leading arguments, given by position or by name; the same tensor once."""
    done: dict[int, Tensor] = {}  # attention tests whether query, key and value are the same tensor

    def once(x: Any) -> Any:
        if isinstance(x, Tensor) and id(x) not in done:
            done[id(x)] = change(x)
        return done[id(x)] if isinstance(x, Tensor) else x

    changed = tuple(once(arg) if i < len(names) else arg for i, arg in enumerate(args))
    return changed, {key: once(value) if key in names else value for key, value in kwargs.items()}


def transform_and_quantize(module: nn.Module, x: Tensor) -> Tensor:
    """Return an input as the layer computes with it; a disabled quantizer keeps its parameters in the graph."""
    if TRANSFORMS in module._modules and _transforms_apply(module):
        transforms: Any = module._modules[TRANSFORMS]
        for transform in transforms:
            x = transform.input(x)
    quantizer = module._modules.get(INPUT_QUANTIZER)
    return x if quantizer is None else quantizer(x)


def _transforms_apply(module: nn.Module) -> bool:
    """Whether the weight is transformed, too: a rotation of one of them alone would change the layer's output."""
    names = view_names(module)
    decisive: Any = module._modules[names[0] + QUANTIZER_SUFFIX if names else INPUT_QUANTIZER]
    return bool(decisive.enabled)


def remove_hook(module: nn.Module, hook: Any) -> None:
    """Remove a forward pre-hook that takes keyword arguments, wherever it is registered."""
    for key, present in list(module._forward_pre_hooks.items()):
        if present is hook:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
