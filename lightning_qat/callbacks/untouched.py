"""Running a LightningModule outside of training, without a trace."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torchmetrics import Metric

from lightning_qat.conversion.undisturbed import eagerly, evaluating, undisturbed_randomness


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for a method that must not act."""


@contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Run a LightningModule inside, in evaluation mode and uncompiled; nothing that it does there can be seen later.

    Random numbers, training flags and metrics are restored, and nothing is logged. Dataloaders are not covered; see
    :func:`~lightning_qat.conversion.undisturbed.undisturbed_loaders`.
    """
    with ExitStack() as stack:
        for context in (undisturbed_randomness(), _undisturbed_metrics(module), evaluating(module), eagerly(module)):
            stack.enter_context(context)
        yield


@contextmanager
def _undisturbed_metrics(module: nn.Module) -> Iterator[None]:
    """Restore the metrics of a LightningModule afterwards, and keep it from logging inside."""
    metrics = [each for each in module.modules() if isinstance(each, Metric)]
    states = [_metric_state(metric) for metric in metrics]
    silenced = {name: vars(module).get(name) for name in ("log", "log_dict")}
    vars(module).update(dict.fromkeys(silenced, _do_nothing))
    try:
        yield
    finally:
        _put_back(vars(module), silenced)
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
