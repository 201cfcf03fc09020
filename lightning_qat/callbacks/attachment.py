"""Attachment: how callbacks act where Lightning has no hook for callbacks.

Between ``setup`` and the restoring of a checkpoint, and while optimizers are being built, only methods of the
LightningModule run. While our callbacks are attached, the module's class is a cached subclass of its own class that
calls the user's method and then asks the callbacks of the trainer. Nothing is stored on the module: a copy without a
trainer behaves as the user wrote it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Final, final
from weakref import WeakValueDictionary

import lightning.pytorch as pl
from torch import Tensor

from lightning_qat.conversion.derived import derive

_BASE: Final = "_attachment_base"
_CLASSES: Final[WeakValueDictionary[type, type["pl.LightningModule"]]] = WeakValueDictionary()


class ModuleHooks:
    """What a callback may add to the methods of a LightningModule; a mixin whose methods do nothing by default."""

    def creating_layers(self, pl_module: "pl.LightningModule") -> AbstractContextManager[Any]:
        """Return a context in which ``setup`` and ``configure_model`` of the module run."""
        return nullcontext()

    def layers_created(self, pl_module: "pl.LightningModule") -> None:
        """Called after ``setup`` and ``configure_model`` of the module, before a checkpoint is restored."""

    def building_optimizers(self, pl_module: "pl.LightningModule") -> AbstractContextManager[Any]:
        """Return a context in which ``configure_optimizers`` runs."""
        return nullcontext()

    def loading_checkpoint(self, pl_module: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
        """Called before the weights of a checkpoint are restored."""

    def saving_checkpoint(self, pl_module: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
        """Called for every checkpoint, also for those of weights alone, for which callbacks are not asked."""

    def running_training_step(self, pl_module: "pl.LightningModule") -> AbstractContextManager[Any]:
        """Return a context in which ``training_step`` runs."""
        return nullcontext()

    def training_step_done(self, pl_module: "pl.LightningModule", output: Any, batch: Any) -> Any:
        """Return the output of ``training_step``, possibly with a loss added."""
        return output

    def before_manual_backward(self, pl_module: "pl.LightningModule", loss: Tensor) -> Tensor:
        """Return the loss that ``manual_backward`` differentiates."""
        return loss


def callbacks_of(trainer: Any) -> list[Any]:
    """Return the callbacks of a trainer of either Lightning package; an empty list without a trainer."""
    return list(getattr(trainer, "callbacks", ()))


def averaged_models(trainer: Any) -> list[tuple[str, Any]]:
    """Return the models that averaging callbacks of the trainer keep, each with the name of the callback's class."""
    found = [(type(each).__name__, getattr(each, "_average_model", None)) for each in callbacks_of(trainer)]
    return [(name, getattr(model, "module", model)) for name, model in found if model is not None]


def attach(pl_module: "pl.LightningModule") -> None:
    """Let the callbacks of the module's trainer take part in its methods; again is a no-op."""
    if is_attached(pl_module):
        return
    for name in _WRAPPERS.keys() & vars(pl_module).keys():
        vars(pl_module)[name] = _InstanceMethod(pl_module, name)
    pl_module.__class__ = _attached_class(type(pl_module))


def detach(pl_module: "pl.LightningModule") -> None:
    """Give the module its own class and methods back."""
    if _BASE in vars(type(pl_module)):
        pl_module.__class__ = getattr(type(pl_module), _BASE)
    for name in _WRAPPERS.keys() & vars(pl_module).keys():
        method = vars(pl_module)[name]
        if isinstance(method, _InstanceMethod):
            vars(pl_module)[name] = method.original


def is_attached(pl_module: "pl.LightningModule") -> bool:
    """Whether callbacks take part in the module's methods."""
    return hasattr(type(pl_module), _BASE)


def own_method(pl_module: "pl.LightningModule", name: str) -> Callable[..., Any]:
    """Return a method of the module as the user wrote it, in which no callback takes part."""
    held = vars(pl_module).get(name)
    if held is not None:
        original: Callable[..., Any] = held.original if isinstance(held, _InstanceMethod) else held
        return original
    base = getattr(type(pl_module), _BASE, type(pl_module))
    method: Callable[..., Any] = getattr(base, name).__get__(pl_module)
    return method


def _hooks(pl_module: "pl.LightningModule") -> Iterator[ModuleHooks]:
    return (callback for callback in callbacks_of(pl_module._trainer) if isinstance(callback, ModuleHooks))


def _wraps(base: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Keep what Lightning looks at: the signature, and whether the user overrides the method."""

    def finish(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        wrapper = functools.wraps(base)(wrapper)
        vars(wrapper)["__wrapped__"] = getattr(base, "__wrapped__", base)  # Lightning unwraps once
        return wrapper

    return finish


def _setup(base: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(base)
    def setup(self: "pl.LightningModule", *args: Any, **kwargs: Any) -> None:
        with ExitStack() as stack:
            for hook in _hooks(self):
                stack.enter_context(hook.creating_layers(self))
            base(self, *args, **kwargs)
        for hook in _hooks(self):
            hook.layers_created(self)

    return setup


def _configure_optimizers(base: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(base)
    def configure_optimizers(self: "pl.LightningModule", *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for hook in _hooks(self):
                stack.enter_context(hook.building_optimizers(self))
            return base(self, *args, **kwargs)

    return configure_optimizers


def _on_load_checkpoint(base: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(base)
    def on_load_checkpoint(self: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
        for hook in _hooks(self):
            hook.loading_checkpoint(self, checkpoint)
        base(self, checkpoint)

    return on_load_checkpoint


def _on_save_checkpoint(base: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(base)
    def on_save_checkpoint(self: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
        for hook in _hooks(self):
            hook.saving_checkpoint(self, checkpoint)
        base(self, checkpoint)

    return on_save_checkpoint


def _training_step(base: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(base)
    def training_step(self: "pl.LightningModule", *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for hook in _hooks(self):
                stack.enter_context(hook.running_training_step(self))
            output = base(self, *args, **kwargs)
            for hook in _hooks(self):
                output = hook.training_step_done(self, output, args[0] if args else kwargs.get("batch"))
        return output

    return training_step


def _manual_backward(base: Callable[..., Any]) -> Callable[..., Any]:
    @_wraps(base)
    def manual_backward(self: "pl.LightningModule", loss: Tensor, *args: Any, **kwargs: Any) -> None:
        for hook in _hooks(self):
            loss = hook.before_manual_backward(self, loss)
        base(self, loss, *args, **kwargs)

    return manual_backward


_WRAPPERS: Final[dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "setup": _setup,
    "configure_model": _setup,
    "configure_optimizers": _configure_optimizers,
    "on_load_checkpoint": _on_load_checkpoint,
    "on_save_checkpoint": _on_save_checkpoint,
    "training_step": _training_step,
    "manual_backward": _manual_backward,
}


@final
class _InstanceMethod:
    """A method that was set on the instance, as torch.compile and LightningCLI do, together with the callbacks.

    A class and no closure, so that a deep copy of the module refers to itself.
    """

    def __init__(self, module: "pl.LightningModule", name: str) -> None:
        self.module, self.name, self.original = module, name, vars(module)[name]
        self.__wrapped__ = getattr(self.original, "__wrapped__", self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _WRAPPERS[self.name](self._without_self)(self.module, *args, **kwargs)

    def _without_self(self, module: "pl.LightningModule", *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def _attached_class(base: type["pl.LightningModule"]) -> type["pl.LightningModule"]:
    known = _CLASSES.get(base)
    if known is not None:
        return known
    namespace: dict[str, Any] = {name: wrap(getattr(base, name)) for name, wrap in _WRAPPERS.items()}
    namespace |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        _BASE: base,
    }
    return _CLASSES.setdefault(base, derive(base, namespace))


def _reduce(self: "pl.LightningModule", protocol: Any) -> Any:
    return _rebuild, (getattr(type(self), _BASE),), self.__getstate__()


def _rebuild(base: type["pl.LightningModule"]) -> "pl.LightningModule":
    return base.__new__(base)
