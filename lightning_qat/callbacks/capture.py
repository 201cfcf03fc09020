"""Capture: what a module computes inside a training step, for Distillation."""

import difflib
import fnmatch
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_qat.conversion.view import QUANTIZER_SUFFIX


@final
@dataclass(frozen=True, eq=False)
class Call:
    """One forward of the student: of which module, on what, its output, and the outputs of layers inside it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    features: dict[str, Any] = field(default_factory=dict)


@contextmanager
def capturing(targets: dict[str, nn.Module], layers: dict[str, nn.Module]) -> Iterator[list[Call]]:
    """Collect the forwards of target modules that run with gradients inside the context, with what layers compute.

    Args:
        targets: modules by name.
        layers: modules inside of them, by name.
    """
    calls: list[Call] = []
    features: dict[str, Any] = {}
    done = features.clear if len(targets) == 1 else None  # several targets lie inside each other
    handles = [
        module.register_forward_hook(functools.partial(_add_call, calls, features, done, name), with_kwargs=True)
        for name, module in targets.items()
    ]
    handles += [
        module.register_forward_hook(functools.partial(_add_feature, features, n)) for n, module in layers.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _add_call(
    calls: list[Call], features: dict[str, Any], done: Callable[[], None] | None, name: str, module: nn.Module,
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Any,
) -> None:  # fmt: skip
    if torch.is_grad_enabled():
        calls.append(Call(name, args, kwargs, output, dict(features)))
    if done is not None:
        done()


def _add_feature(features: dict[str, Any], name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    features[name] = output


@contextmanager
def capturing_features(layers: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Collect the outputs of modules by name."""
    features: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(functools.partial(_add_feature, features, n)) for n, module in layers.items()
    ]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def check_ran(name: str, features: dict[str, Any], asked: str) -> None:
    """Check that a layer ran inside the student's forward.

    Raises:
        ValueError: naming it and what asked for it.
    """
    if name not in features:
        raise ValueError(
            f"Distillation: {asked}: {name} did not run inside the student's forward; restrict the pattern to layers "
            "that do"
        )


def forget_compiled() -> None:
    """Let compiled code be traced anew: torch does not check whether hooks came after, and what lacks them would stay.

    See ``torch._dynamo.config.skip_nnmodule_hook_guards``.
    """
    if "torch._dynamo" in sys.modules:  # nothing is compiled before that
        torch.compiler.reset()


def find_tensor(output: Any) -> Tensor | None:
    """Return the tensor that an output is about, or None where that cannot be told.

    The output itself, its ``logits`` (attribute or key), the only floating tensor of a dict, or the first of a tuple.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = list(output.values()) if isinstance(output, dict) else output if isinstance(output, tuple | list) else []
    floats = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if isinstance(output, dict):
        return floats[0] if len(floats) == 1 else None
    return floats[0] if floats else None


def describe(output: Any) -> str:
    """Return what an output consists of, for messages."""
    if isinstance(output, dict):
        return f"a dict with the keys {list(output)}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {[type(value).__name__ for value in output]}"
    return f"a {type(output).__name__}"


def module_names(model: nn.Module) -> list[str]:
    """Return the dotted names of the modules that a user knows: without quantizers."""
    return [
        name
        for name, _ in model.named_modules()
        if name and not any(QUANTIZER_SUFFIX in part for part in name.split("."))
    ]


def close_names(wanted: str, names: Sequence[str]) -> list[str]:
    """Return up to eight candidates for a name, the most similar first."""
    return difflib.get_close_matches(wanted, names, n=8, cutoff=0.3) or list(names)[:8]


def find_module(model: nn.Module, name: str, argument: str) -> nn.Module:
    """Return a submodule.

    Raises:
        ValueError: naming the argument and similar names.
    """
    names = module_names(model)
    if name not in names:
        raise ValueError(
            f"Distillation: {argument}={name!r} is no module of {type(model).__name__}; "
            f"candidates: {close_names(name, names)}"
        )
    return model.get_submodule(name)


def find_layers(model: nn.Module, match: str, asked: str) -> dict[str, nn.Module]:
    """Return the modules whose dotted name matches a glob.

    Args:
        model: where to look.
        match: the glob.
        asked: the class that has it as its argument, for the message.

    Raises:
        ValueError: a pattern that matches nothing, with similar names.
    """
    names = module_names(model)
    found = {name: model.get_submodule(name) for name in names if fnmatch.fnmatchcase(name, match)}
    if not found:
        raise ValueError(
            f"Distillation: {asked}(match={match!r}) matches no module of {type(model).__name__}; "
            f"candidates: {close_names(match, names)}"
        )
    return found
