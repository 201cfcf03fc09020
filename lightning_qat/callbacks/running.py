"""How to run a LightningModule on a batch of training data, outside a step."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Forward = Callable[[Any, Any], Any]


def find_forward(pl_module: nn.Module, batch: Any, who: str = "Calibration") -> Forward:
    """Return the first way to run the model that works on a batch: its own ``predict_step``, or calling it.

    Raises:
        ValueError: none works; the message says what each said.
    """
    ways: list[Forward] = [call_predict_step] if _has_predict_step(pl_module) else []
    problems = []
    for way in (*ways, call_module):
        try:
            with torch.no_grad():
                way(pl_module, batch)
        except Exception as error:
            problems.append(f"{way.__name__}: {type(error).__name__}: {error}")
        else:
            return way
    raise ValueError(
        f"{who}: cannot tell how to run {type(pl_module).__name__} on a training batch of type "
        f"{type(batch).__name__}; pass {who}(forward=lambda module, batch: module(...)). Tried\n  "
        + "\n  ".join(problems)
    )


def _has_predict_step(pl_module: nn.Module) -> bool:
    owner = next(kind for kind in type(pl_module).__mro__ if "predict_step" in vars(kind))
    return owner.__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def call_predict_step(pl_module: Any, batch: Any) -> Any:
    """Call ``predict_step`` with a batch, and with its index if it takes one."""
    takes_index = num_positional(pl_module.predict_step)[1] > 1
    return pl_module.predict_step(batch, 0) if takes_index else pl_module.predict_step(batch)


def call_module(pl_module: nn.Module, batch: Any) -> Any:
    """Call a module with what its ``forward`` takes of a batch."""
    if isinstance(batch, Mapping):
        parameters = inspect.signature(pl_module.forward).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return pl_module(**batch)
        named = {p.name: batch[p.name] for p in parameters if p.name in batch}
        return pl_module(**named) if named else pl_module(batch)
    if isinstance(batch, tuple | list):
        return pl_module(*batch[: max(1, num_positional(pl_module.forward)[0])])
    return pl_module(batch)


def num_positional(function: Callable[..., Any]) -> tuple[int, float]:
    """Return how many positional arguments a function requires, and how many it takes."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return sum(p.default is p.empty for p in positional), float("inf") if more else len(positional)
