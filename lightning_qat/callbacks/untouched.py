"""Contexts that leave no trace: in random numbers, training flags, metrics, logs, and the order of the data."""

import copy
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Generator, nn
from torchmetrics import Metric

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))
_INNER: Final = ("sampler", "batch_sampler", "dataset")


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for a method that must not act."""


@contextmanager
def untouched_module(module: nn.Module) -> Iterator[None]:
    """Restore training flags and metrics of a module afterwards, and keep it from logging; all modules in eval mode."""
    training = {each: each.training for each in module.modules()}
    metrics = [each for each in module.modules() if isinstance(each, Metric)]
    states = [_metric_state(metric) for metric in metrics]
    silenced = {name: vars(module).get(name) for name in ("log", "log_dict")}
    vars(module).update(dict.fromkeys(silenced, _do_nothing))
    try:
        module.eval()
        yield
    finally:
        _put_back(vars(module), silenced)
        for each, flag in training.items():
            each.training = flag
        for metric, state in zip(metrics, states, strict=True):
            vars(metric).update(state)


def _put_back(attributes: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if value is None:
            del attributes[name]
        else:
            attributes[name] = value


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = (*metric._defaults, "_update_count", "_computed")
    return {name: copy.deepcopy(getattr(metric, name)) for name in names}


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Restore the global random number generators of torch, numpy and Python afterwards."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def untouched_loaders(loaders: Iterable[Any]) -> Iterator[None]:
    """Restore loaders, samplers and data sets afterwards: their random generators and plain attributes.

    Worker processes that started inside (``persistent_workers``) end. Containers and tensors that a data set changes
    while it is read are not restored.
    """
    restore = [_snapshot(holder) for holder in _holders(loaders)]
    try:
        yield
    finally:
        for undo in restore:
            undo()


def _holders(loaders: Iterable[Any]) -> list[Any]:
    """Return loaders and what they read through: samplers and data sets, also wrapped ones."""
    found: dict[int, Any] = {}
    waiting = list(loaders)
    while waiting:
        holder = waiting.pop()
        if id(holder) not in found and hasattr(holder, "__dict__"):
            found[id(holder)] = holder
            waiting += [vars(holder)[name] for name in _INNER if vars(holder).get(name) is not None]
            waiting += [value for name, value in vars(holder).items() if name.endswith(_INNER)]
    return list(found.values())


def _snapshot(holder: Any) -> Callable[[], None]:
    attributes = vars(holder)
    before = set(attributes)
    plain = {name: value for name, value in attributes.items() if isinstance(value, _PLAIN)}
    generators = [restore for restore in map(_generator_snapshot, attributes.values()) if restore is not None]

    def undo() -> None:
        for name in set(attributes) - before:
            del attributes[name]
        attributes.update(plain)
        for restore in generators:
            restore()

    return undo


def _generator_snapshot(value: Any) -> Callable[[], object] | None:
    """Return what puts a random number generator back to its present state, or None for other values."""
    if isinstance(value, Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    return None
