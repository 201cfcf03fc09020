"""Checkpoints across the border between float and quantized models."""

import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final, TypeVar

import torch
from torch import nn

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.lora import merged_state
from lightning_qat.conversion.prepare import convert
from lightning_qat.conversion.slots import QUANTIZER_NAMES
from lightning_qat.conversion.state import prepared_state, quantizers
from lightning_qat.quantization.recipe import Recipe, difference

CHECKPOINT_KEY: Final = "lightning_qat"
"""Where a Lightning checkpoint keeps the recipe, as plain data."""

_Module = TypeVar("_Module", bound=nn.Module)


def is_quantizer_key(key: str) -> bool:
    """Whether a ``state_dict`` key belongs to a quantizer that :func:`prepare` added.

    >>> is_quantizer_key("layer.weight_quantizer.scale"), is_quantizer_key("vector_quantizer.weight")
    (True, False)
    """
    return not QUANTIZER_NAMES.isdisjoint(key.split(".")[:-1])


def load_checkpoint(
    module: _Module, path: str | Path, quantized: bool = False, *, weights_only: bool = True
) -> _Module:
    """Load a checkpoint of either kind into a module of either kind, in place.

    A QAT checkpoint in a plain module gives its latent weights, with a warning; with ``quantized=True`` the module is
    prepared by the stored recipe first. A float checkpoint in a prepared module gives its weights, and scales are
    found anew. LoRA adapters that the module lacks are merged into its weights; those that the checkpoint lacks stay
    zero.

    Args:
        module: plain or prepared.
        path: a Lightning checkpoint, or a ``state_dict`` written by ``torch.save``.
        quantized: prepare a plain module by the recipe in the checkpoint.
        weights_only: as in ``torch.load``; False executes what the file says, for files that you trust.

    Returns:
        The module.

    Raises:
        TypeError: if module is no module.
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one without a state_dict; ``quantized=True`` with a checkpoint that holds no
            recipe; a prepared module with another recipe than the checkpoint's.
        RuntimeError: keys that do not fit (``load_state_dict``).
    """
    check_model("load_checkpoint", module, "module")
    checkpoint = _read(path, weights_only)
    state: dict[str, Any] = checkpoint.get("state_dict", checkpoint)
    stored = checkpoint.get(CHECKPOINT_KEY)
    recipe = None if stored is None else Recipe.from_dict(stored["recipe"])
    _check_recipe(module, path, recipe)
    if quantized and not quantizers(module):
        if recipe is None:
            raise ValueError(
                f"load_checkpoint: {path} holds no recipe; prepare(module, recipe) first, or quantized=False"
            )
        convert(module, recipe)
    state = merged_state(state, module.state_dict())
    if not quantizers(module):
        state = _without_quantizers(module, path, state)
    module.load_state_dict(state)
    return module


def _read(path: str | Path, weights_only: bool) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_checkpoint: path={str(path)!r} is not a file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except UnpicklingError as error:
        raise ValueError(
            f"load_checkpoint: {path} holds more than tensors and plain data, or is no checkpoint; if you trust it, "
            f"pass weights_only=False ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # whatever the bytes of another or damaged file make of a pickle
        raise ValueError(f"load_checkpoint: {path} is no checkpoint, or a damaged one ({error!r})") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"load_checkpoint: {path} holds a {type(checkpoint).__name__}, not a state_dict or a Lightning checkpoint"
        )
    return checkpoint


def _check_recipe(module: nn.Module, path: str | Path, recipe: Recipe | None) -> None:
    present = prepared_state(module)
    if present is not None and recipe is not None and present.recipe != recipe:
        raise ValueError(
            f"load_checkpoint: {path} was trained by another recipe than {type(module).__name__} is prepared by; to "
            "take over its weights alone, load it into the plain module and prepare() afterwards\n"
            f"{difference(present.recipe, recipe)}"
        )


def _without_quantizers(module: nn.Module, path: str | Path, state: dict[str, Any]) -> dict[str, Any]:
    own = module.state_dict().keys()
    dropped = {key for key in state if is_quantizer_key(key) and key not in own}
    if dropped:
        warnings.warn(
            f"{path} was trained quantized; the plain {type(module).__name__} gets its latent float weights. "
            "Pass quantized=True for the model as it was trained.",
            stacklevel=3,
        )
    return {key: value for key, value in state.items() if key not in dropped}
