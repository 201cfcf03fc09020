"""What keeps most of a model at the width of a recipe: the callbacks of the benchmark, as one call."""

from collections.abc import Callable
from typing import Any, Final

import lightning.pytorch as pl
from torch import Tensor

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.distillation import Distillation
from lightning_qat.callbacks.gptq import GPTQ
from lightning_qat.callbacks.gradual import GradualQuantization
from lightning_qat.callbacks.orthogonal import OrthogonalUpdates
from lightning_qat.callbacks.parameter_group import ParameterGroup
from lightning_qat.callbacks.qat import QATCallback
from lightning_qat.callbacks.running import Forward
from lightning_qat.callbacks.teacher import TeacherSource
from lightning_qat.quantization.recipe import Recipe

_FASTER: Final = ((3, 8.0), (8, 4.0))
"""Levels up to which all that is in float learns so many times as fast."""


def faster_others(recipe: Recipe) -> ParameterGroup:
    """Return the group of all that is in float, as much faster as the coarsest weights of a recipe want it.

    Eight times as fast at 1 and 1.58 bits, four times at 2 and 3 bits, beyond that not. Biases, norms, embeddings and
    layers in float make up for what weights on few levels cannot say; the figures are in ``benchmarks/README.md``.

    Raises:
        TypeError: a recipe of another kind.

    Example:
        >>> from lightning_qat import recipes
        >>> [faster_others(recipe()).lr_multiplier for recipe in (recipes.ternary, recipes.int2, recipes.int4)]
        [8.0, 4.0, 1.0]
    """
    _check(recipe, "faster_others")
    weights = [rule.spec.weight for rule in recipe.rules if rule.spec is not None and rule.spec.weight is not None]
    fewest = min((weight.grid.num_levels for weight in weights), default=_FASTER[-1][0] + 1)
    multiplier = next((factor for levels, factor in _FASTER if fewest <= levels), 1.0)
    return ParameterGroup(kind="others", lr_multiplier=multiplier)


def recommended_callbacks(
    recipe: Recipe,
    *,
    teacher: TeacherSource | None = None,
    mask: Callable[[Any], Tensor] | None = None,
    forward: Forward | None = None,
) -> list[pl.Callback]:
    """Return the callbacks that keep most of a trained float model, for any task: one set for each width.

    They are what ``benchmarks/README.md`` calls ours: ``QATCallback(recipe, groups=(faster_others(recipe),))``,
    ``Calibration()``, ``GPTQ()``, ``OrthogonalUpdates()``, ``GradualQuantization()`` and
    ``Distillation(fade_below=1.0, max_odds=100.0)``, otherwise with their defaults. Each has its part in the result
    there; write the list down to leave one out or change it. They train with the optimizer and schedule of the module,
    which should be an AdamW with a peak below that of the float training: a quarter of it at 3 bits and more, half of
    it at 2 and 1.58 bits, all of it at 1 bit, times the square root of batch size / 16 on small models of text.

    Args:
        recipe: what is quantized how; layers of few levels decide how fast all else learns.
        teacher: of `Distillation`. None: the float model as it is when training starts.
        mask: of `Distillation`: which positions have a target, such as ``TargetMask()``.
        forward: called with (module, batch) by `Calibration` and `GPTQ`; found as they do if it is not given.

    Raises:
        TypeError: a recipe of another kind.
        ValueError: when training starts: what one of them refuses, such as a scheduler that sets one learning rate for
            all groups, or an optimizer that is none of the Adam family.

    Example:
        >>> from lightning_qat import recipes
        >>> [type(callback).__name__ for callback in recommended_callbacks(recipes.ternary())]
        ['QATCallback', 'Calibration', 'GPTQ', 'OrthogonalUpdates', 'GradualQuantization', 'Distillation']
    """
    _check(recipe, "recommended_callbacks")
    others = faster_others(recipe)
    return [
        QATCallback(recipe, groups=() if others.lr_multiplier == 1 else (others,)),
        Calibration(forward=forward),
        GPTQ(forward=forward),
        OrthogonalUpdates(),
        GradualQuantization(),
        Distillation(teacher, mask=mask, fade_below=1.0, max_odds=100.0),
    ]


def _check(recipe: Any, where: str) -> None:
    if not isinstance(recipe, Recipe):
        raise TypeError(f"{where}: recipe={recipe!r} is no Recipe; pass recipes.ternary(), for example")
