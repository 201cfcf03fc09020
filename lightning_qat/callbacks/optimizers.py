"""Optimizer groups of learned scales, and those that users ask for: made while optimizers are being built."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_qat.callbacks.group_splitter import METHOD, Group, GroupSplitter, Made, as_groups, is_ordered, kinds_of
from lightning_qat.callbacks.parameter_group import ParameterGroup
from lightning_qat.conversion.state import reading_latents

_SCHEDULERS: Final = "torch.optim.lr_scheduler"


def unwatch(optimizers: Iterable[Optimizer]) -> None:
    """Give optimizers their own ``add_param_group`` back."""
    for optimizer in optimizers:
        vars(optimizer).pop(METHOD, None)


@contextmanager
def separate_scales(
    model: nn.Module, lr_multiplier: float = 1.0, groups: tuple[ParameterGroup, ...] = ()
) -> Iterator[GroupSplitter]:
    """Give learned scales, and what ``groups`` match, groups of their own in every optimizer built in the context.

    They follow the groups of the user, so that the indices of those stay. Adding them afterwards would break most
    schedulers, which remember one value per group.

    Args:
        model: the prepared model.
        lr_multiplier: learning rate of scales relative to that of their weights, positive.
        groups: exceptions from it.

    Raises:
        ValueError: options without effect; from the user's scheduler, with the number of groups that it needs to know;
            or a scheduler under which a multiplier has no effect.
    """
    splitter = GroupSplitter(model, lr_multiplier, groups)
    original = Optimizer.__init__

    def build(self: Optimizer, params: Any, defaults: dict[str, Any]) -> None:
        splittable = (splitter.names or splitter.assigned) and not isinstance(self, LBFGS)
        if splittable and is_ordered(params):
            params = list(params)
            given = as_groups(params)
            if given is not None:
                kept, derived = splitter.split(given, defaults, kinds_of(self))
                params = [*kept, *derived]
        original(self, params, defaults)
        if splittable:
            splitter.watch(self)

    Optimizer.__init__ = build  # type: ignore[method-assign]
    try:
        with reading_latents(model):  # layer.weight is what an optimizer can take
            yield splitter
        for made in splitter.made:
            _check_multiplier(made, splitter)
    except (ValueError, IndexError, TypeError) as error:
        if not splitter.made or not _raised_by_scheduler(error.__traceback__):
            raise
        raise type(error)(f"{str(error).rstrip('.')}. {_explanation(splitter)}") from error
    finally:
        Optimizer.__init__ = original  # type: ignore[method-assign]


def _raised_by_scheduler(traceback: TracebackType | None) -> bool:
    last = None
    while traceback is not None:
        last, traceback = traceback.tb_frame, traceback.tb_next
    return last is not None and last.f_globals.get("__name__") == _SCHEDULERS


def _explanation(splitter: GroupSplitter) -> str:
    plain = len(splitter.groups) == 1
    short, long = ("scales", "scales") if plain else ("these", "scales, and what groups=(...) matches,")
    counts = []
    for optimizer in splitter.built:
        total = len(optimizer.param_groups)
        added = sum(any(new is group for group in optimizer.param_groups) for new in splitter.added)
        counts.append(f"{total} for {type(optimizer).__name__}, the last {added} of them for {short}")
    return (
        f"QATCallback trains learned {long} in parameter groups of their own, which come after yours; a list with one "
        f"value per group needs {'; '.join(counts)}"
    )


def _check_multiplier(made: Made, splitter: GroupSplitter) -> None:
    """Find schedulers that set one rate for all groups, at once or (SWALR) in the end."""
    others = [made.origin] if made.origin is not None else _siblings(made, splitter)
    for keys in (("initial_lr", "lr"), ("swa_lr",)):
        rate, *rates = [float(next((g[key] for key in keys if g.get(key)), 0.0)) for g in (made.group, *others)]
        if made.multiplier != 1.0 and rate not in (0.0, made.rate) and set(rates) <= {rate}:
            raise ValueError(
                f"QATCallback: {made.option}={made.multiplier} has no effect, because the scheduler sets one rate, "
                f"{rate:g}, for all groups; give it one rate per group. {_explanation(splitter)}"
            )


def _siblings(made: Made, splitter: GroupSplitter) -> list[Group]:
    groups = [optimizer.param_groups for optimizer in splitter.built]
    return next((own for own in groups if any(made.group is group for group in own)), [])
