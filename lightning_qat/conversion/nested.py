"""Nested tensors of ``nn.TransformerEncoder``: they pass only through layers without hooks."""

from typing import Final

from torch import nn

from lightning_qat.conversion.baked_input import BAKED_ARGUMENTS
from lightning_qat.conversion.inputs import ARGUMENTS

_WAS_NESTED: Final = "_used_nested_tensor_in_float"


def keep_padded(model: nn.Module) -> None:
    """Let encoders whose layers quantize inputs run on padded tensors.

    In evaluation with a padding mask ``nn.TransformerEncoder`` packs its input into a nested tensor without asking
    whether its layers can take their fast path; with a forward hook on any of them they cannot, and torch raises.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor and _hooked(module):
            module.use_nested_tensor = False
            setattr(module, _WAS_NESTED, True)


def _hooked(model: nn.Module) -> bool:
    return any(ARGUMENTS in vars(module) or BAKED_ARGUMENTS in vars(module) for module in model.modules())


def restore_nested(module: nn.Module) -> None:
    """Undo :func:`keep_padded` on one module."""
    if isinstance(module, nn.TransformerEncoder) and vars(module).pop(_WAS_NESTED, False):
        module.use_nested_tensor = True
