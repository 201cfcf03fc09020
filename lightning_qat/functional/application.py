"""Calling functions of autograd without what ``Function.apply`` spends on looking at signatures."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@functools.cache
def _in_one(function: type[Function]) -> type[Function]:
    """Return the same function with a forward that takes the context."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    namespace = {"forward": staticmethod(forward), "setup_context": staticmethod(Function.setup_context)}
    return type(function.__name__, (function,), {"__module__": function.__module__, **namespace})


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``once_differentiable(backward)``, without its context of no_grad where there is none to leave."""
    careful = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        return careful(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def transformed_or_compiled() -> bool:
    """Whether a function of autograd is traced, by a compiler or by transforms of ``torch.func``."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def compiled_for_cpu(x: Tensor) -> bool:
    """Whether a compiler traces what a CPU is to run; where a graph is exported, none does."""
    return x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def unaliased(output: Tensor) -> Tensor:
    """Return what the forward of a function of autograd returns, as a tensor of its own where a compiler traces it.

    The compiler of torch 2.11 (not of 2.13) adds what a forward computes on the way to its outputs. Where operations
    in place make these the same tensor as an output, they take its gradient, and zero is left, silently. The copy costs
    nothing in compiled code: it is the last step of the kernel that computes the output.
    """
    return output.clone() if torch.compiler.is_compiling() else output


def applied(function: type[Function], *arguments: Any) -> Any:
    """Return ``function.apply(*arguments)`` of a function that has ``setup_context``, all arguments given.

    ``apply`` binds the arguments to the signature of such a forward anew in each call, which takes longer than all else
    that a small layer does in Python. Where transforms of ``torch.func`` or a compiler need that form, they get it.
    """
    if transformed_or_compiled():
        return function.apply(*arguments)
    return _in_one(function).apply(*arguments)
