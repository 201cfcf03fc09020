"""Checkpoints across the border between float and quantized models."""

import warnings
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import nn

from lightning_qat.conversion.prepare import convert, prepared_state
from lightning_qat.conversion.view import QUANTIZER_SUFFIX
from lightning_qat.quantization.recipe import Recipe

CHECKPOINT_KEY: Final = "lightning_qat"
"""Where a Lightning checkpoint keeps the recipe, as plain data."""

_Module = TypeVar("_Module", bound=nn.Module)


def is_quantizer_key(key: str) -> bool:
    """Whether a ``state_dict`` key belongs to a quantizer."""
    return any(part.endswith(QUANTIZER_SUFFIX) for part in key.split(".")[:-1])


def load_checkpoint(module: _Module, path: str | Path, quantized: bool = False) -> _Module:
    """Load a checkpoint of either kind into a module of either kind, in place.

    A QAT checkpoint in a plain module gives its latent weights, with a warning; with ``quantized=True`` the module is
    prepared by the stored recipe first. A float checkpoint in a prepared module gives its weights, and scales are
    found anew.

    Args:
        module: plain or prepared.
        path: a Lightning checkpoint, or a ``state_dict`` written by ``torch.save``.
        quantized: prepare a plain module by the recipe in the checkpoint.

    Returns:
        The module.

    Raises:
        FileNotFoundError: no such file.
        ValueError: ``quantized=True`` with a checkpoint that holds no recipe.
        RuntimeError: keys that do not fit (``load_state_dict``).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_checkpoint: path={str(path)!r} is not a file")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.get("state_dict", checkpoint)
    has_quantizers = any(is_quantizer_key(key) for key in state)
    prepared = prepared_state(module) is not None
    if quantized and not prepared:
        stored = checkpoint.get(CHECKPOINT_KEY)
        if stored is None:
            raise ValueError(
                f"load_checkpoint: {path} holds no recipe; prepare(module, recipe) first, or quantized=False"
            )
        convert(module, Recipe.from_dict(stored["recipe"]))
        prepared = True
    if has_quantizers and not prepared:
        warnings.warn(
            f"{path} was trained quantized; the plain {type(module).__name__} gets its latent float weights. "
            "Pass quantized=True for the model as it was trained.",
            stacklevel=2,
        )
        state = {key: value for key, value in state.items() if not is_quantizer_key(key)}
    module.load_state_dict(state)
    return module
