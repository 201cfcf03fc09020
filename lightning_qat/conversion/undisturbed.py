"""Contexts that leave no trace: in random numbers, in training flags, in the order of the data."""

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import numpy as np
import torch
from torch import Generator, nn

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))
_INNER: Final = ("sampler", "batch_sampler", "dataset")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode inside, and restore their training flags afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    """Run compiled parts of a model as they are written; observing counts values in Python."""
    compiled = getattr(model, "_compiler_ctx", None) is not None  # a compiled LightningModule
    compiled = compiled or any("_orig_mod" in m._modules or m._compiled_call_impl for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def undisturbed_randomness() -> Iterator[None]:
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
def undisturbed_loaders(loaders: Iterable[Any]) -> Iterator[None]:
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
