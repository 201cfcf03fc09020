"""Hooks of torch right before and after an optimizer steps, whoever calls it."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Hook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]
BeforeHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Arguments | None]


def hook_steps(
    optimizers: Iterable[Any], who: str, *, before: BeforeHook | None = None, after: Hook | None = None
) -> list[RemovableHandle]:
    """Call functions around every step of the optimizers, until the handles are removed.

    Once per step, too, where the step of an optimizer calls that of its base class, for which torch runs hooks again.

    Args:
        optimizers: of the trainer.
        who: name of the callback, for messages.
        before: called before the step, and before the closure that Lightning hands it runs the training step. What it
            returns, if anything, takes the place of the arguments of the step.
        after: called after the step; not where a gradient scaler leaves the step out.

    Raises:
        ValueError: an optimizer that is none of torch's kind, as DeepSpeed's.
    """
    handles: list[RemovableHandle] = []
    depths: dict[Optimizer, int] = {}

    def entering(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        depths[optimizer] = depths.get(optimizer, 0) + 1
        return before(optimizer, args, kwargs) if before is not None and depths[optimizer] == 1 else None

    def leaving(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        depths[optimizer] -= 1
        if after is not None and depths[optimizer] == 0:
            after(optimizer, args, kwargs)

    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"{who}: {type(optimizer).__name__} is no torch.optim.Optimizer and has no hooks of a step"
            )
        handles += [optimizer.register_step_pre_hook(entering), optimizer.register_step_post_hook(leaving)]
    return handles


def remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks, and empty the list."""
    for handle in handles:
        handle.remove()
    handles.clear()
