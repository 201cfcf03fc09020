"""Activations that are computed again in backward instead of kept: torch's activation checkpointing, by name."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lightning_qat.conversion._checks import check_model

_FORWARD: Final = "forward"


def recompute_activations(model: nn.Module, match: str | Iterable[str]) -> tuple[str, ...]:
    """Let modules forget what they compute inside, in place, and compute it again in backward.

    Of what a module computes only its inputs stay; results and gradients are the same, bit for bit, dropout included.
    It costs a second forward pass of the module. Of modules within each other the outermost does it; again is a no-op.

    Args:
        model: any, prepared or not.
        match: glob, or several, over dotted module names: ``"backbone.blocks.*"``. ``*`` also matches dots.

    Returns:
        The names of the modules that do it.

    Raises:
        TypeError: a pattern that is no text.
        ValueError: a pattern that matches no module with a forward, BatchNorm inside, which would see each batch twice,
            or a forward that was put onto the module by others.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174; torch.utils.checkpoint.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
        >>> recompute_activations(model, "0")
        ('0',)
    """
    check_model("recompute_activations", model)
    globs = checked_globs(match, "recompute_activations")
    present = {name: m for name, m in model.named_modules() if name and type(m).forward is not nn.Module.forward}
    idle = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in present)]
    if idle:
        outer = [name for name, module in present.items() if next(module.children(), None) is not None]
        raise ValueError(
            f"recompute_activations: match={idle} matches no module with a forward; there are "
            f"{', '.join((outer or list(present))[:8])}, ..."
        )
    chosen: list[str] = []
    for name in present:  # parents come before their children
        inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if not inside and any(fnmatchcase(name, glob) for glob in globs):
            chosen.append(name)
    for name in chosen:
        _check(name, present[name])
    for name in chosen:
        vars(present[name])[_FORWARD] = partial(_recomputed, present[name])
    return tuple(chosen)


def keep_activations(model: nn.Module) -> None:
    """Undo :func:`recompute_activations`; a model without is left alone."""
    check_model("keep_activations", model)
    for module in model.modules():
        if _is_ours(module):
            del vars(module)[_FORWARD]


def checked_globs(match: str | Iterable[str], who: str) -> tuple[str, ...]:
    """Return patterns as a tuple.

    Args:
        match: one or several.
        who: whose argument it is, for the message.

    Raises:
        TypeError: what is no text, or nothing.
    """
    globs = (match,) if isinstance(match, str) else tuple(match) if isinstance(match, Iterable) else ()
    if not globs or not all(isinstance(glob, str) and glob for glob in globs):
        raise TypeError(f"{who}: match={match!r} is not a glob over names of modules, such as '*.blocks.*', or several")
    return globs


def _recomputed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(module).forward, module)
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _is_ours(module: nn.Module) -> bool:
    held = vars(module).get(_FORWARD)
    return isinstance(held, partial) and held.func is _recomputed


def _check(name: str, module: nn.Module) -> None:
    norm = next((key for key, each in module.named_modules() if isinstance(each, _BatchNorm)), None)
    if norm is not None:
        where = f"{name}.{norm}" if norm else name
        raise ValueError(
            f"recompute_activations: {where} is {type(module.get_submodule(norm)).__name__}, whose statistics would "
            "see each batch twice; match modules without it"
        )
    if _FORWARD in vars(module) and not _is_ours(module):
        raise ValueError(
            f"recompute_activations: another package has replaced the forward of {name}; leave the module out of match="
        )
