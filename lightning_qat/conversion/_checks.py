"""The check that every function of a model begins with."""

from typing import Any

from torch import nn


def check_model(function: str, model: Any, argument: str = "model") -> None:
    """Check that a model is a module.

    Args:
        function: whose argument it is, for the message.
        model: what was given.
        argument: its name.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: {argument}={model!r} is not a torch.nn.Module")
