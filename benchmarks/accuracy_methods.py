"""What benchmarks/accuracy.py compares: rounding alone, peers, ours, and ours with less."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L

from benchmarks.learned import with_learned_scale
from benchmarks.peers import PEERS, WEIGHT_BITS
from lightning_qat import (
    GPTQ,
    AbsMax,
    Distillation,
    FeatureMatch,
    GradualQuantization,
    LayerSpec,
    MinimumError,
    OrthogonalUpdates,
    ParameterGroup,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    recipes,
)
from lightning_qat.callbacks import TargetMask
from lightning_qat.callbacks.running import call_module  # predict_step of the arithmetic task writes whole solutions

WIDTHS = (*WEIGHT_BITS, "seq2", "ternary_a8")
AS_MANY_BITS = {"seq2": "int2", "ternary_a8": "bitnet"}
"""Ours alone: half-integer levels; ternary weights with a scale per channel, inputs as those of bitnet."""
BITS = {"int8": 8.0, "int4": 4.0, "int3": 3.0, "int2": 2.0, "ternary": 1.58, "binary": 1.0}
_gptq = partial(GPTQ, forward=call_module)
_SET_IN = partial(GradualQuantization, most_levels=4)
_FOUR_BITS = ("int4", "w4a8")
_MANY_LEVELS = ("int8", "w8a8", "int4", "w4a8")  # there neither faster others nor blocks bring anything
_THREE_LEVELS = ("ternary", "ternary_a8", "bitnet")
OURS, AFTER_TRAINING = "ours", "after training"
TEACHER_STAYS = "ours, teacher stays"
"""Ours as it was: the teacher counts the same to the end, what is in float is 4 times as fast at 1.58 bits, too."""
OUTPUTS_ALONE = "ours, outputs alone"
"""The same with a teacher that only the outputs of the model follow, not its blocks."""
LARGE_BATCHES = "ours, large batches"
"""Ours for gradients of little noise: blocks do not follow, rounding is complete after three quarters of the run, and
what is in float is 8 times as fast at 1 bit, too."""
SLOWER_SCALES = "ours, QATCallback alone, slower scales"
ALL_CALLBACKS = (TEACHER_STAYS, OUTPUTS_ALONE, LARGE_BATCHES, OURS)
TEACHER, TEACHER_OF_BLOCKS = " + teacher", " + teacher of blocks"
LEARNED = "learned scale"
"""Ours, with a scale that is learned in the place of one that follows the weights: what recipes had, and peers have."""


def _untaught() -> list[Any]:
    return [_gptq(), OrthogonalUpdates(), GradualQuantization()]


ABLATIONS: dict[str, Callable[[Any], list[Any]]] = {
    "ours, QATCallback alone": lambda mask: [],
    "ours, with teacher": lambda mask: [Distillation(mask=mask)],
    "ours, without teacher": lambda mask: _untaught(),
    "ours, AdamW, rounding set in": lambda mask: [_gptq(), _SET_IN(), Distillation(mask=mask)],
    "ours, AdamW, rounding set in, no teacher": lambda mask: [_gptq(), _SET_IN()],
}
"""Without faster others."""
LEARNED_TOO = [LEARNED, *(LEARNED + name.removeprefix(OURS) for name in ABLATIONS)]


def but_head(recipe: Recipe, module: L.LightningModule) -> Recipe:
    """Return a recipe that leaves the head in float, where there is one."""
    return Recipe((Rule("head", None), *recipe.rules)) if hasattr(module, "head") else recipe


def _after_training(width: str, *, search: bool) -> Recipe:
    """Return round to nearest: the grid of a recipe, scales by absolute maximum or least error."""
    spec = recipes.named(width).rules[0].spec
    assert spec is not None
    assert spec.weight is not None
    weight = QuantizerSpec(
        spec.weight.grid, spec.weight.granularity, MinimumError() if search else AbsMax(), StraightThrough()
    )
    return Recipe((Rule("*", LayerSpec(weight, spec.input)),))


def _scale_rate(width: str) -> float:
    return 0.1 if width in _FOUR_BITS else 1.0


def _all_callbacks(method: str, width: str, module: L.LightningModule, mask: TargetMask | None) -> list[Any]:
    few, stays = width not in _MANY_LEVELS, method in (TEACHER_STAYS, OUTPUTS_ALONE)
    one_bit, large = width == "binary", method == LARGE_BATCHES
    faster = 8.0 if (width in _THREE_LEVELS and not stays) or (one_bit and large) else 4.0
    converting = QATCallback(
        but_head(recipes.named(width), module),
        groups=[ParameterGroup(kind="others", lr_multiplier=faster)] if few else [],
        scale_lr_multiplier=_scale_rate(width),
    )
    # layers of one bit cannot follow, and need the teacher of outputs to the end
    followed = few and not one_bit and method in (OURS, TEACHER_STAYS)
    blocks = (FeatureMatch(fade_below=None if stays else 0.1),) if followed else ()
    teacher = Distillation(mask=mask, fade_below=None if one_bit or stays else 1.0, features=blocks)
    gradual = GradualQuantization(0.75 if large else None)
    return [converting, _gptq(), OrthogonalUpdates(), gradual, teacher]


def callbacks_of(method: str, width: str, module: L.LightningModule, mask: TargetMask | None) -> list[Any]:
    """Return what is given to the trainer; none for a peer without a teacher, which has converted the module."""
    if method.startswith(AFTER_TRAINING):
        return [QATCallback(but_head(_after_training(width, search="absmax" not in method), module))]
    if method.startswith(LEARNED):
        ablation = ABLATIONS.get(
            OURS + method.removeprefix(LEARNED), lambda mask: [*_untaught(), Distillation(mask=mask)]
        )
        return [QATCallback(but_head(with_learned_scale(recipes.named(width)), module)), *ablation(mask)]
    if method in ALL_CALLBACKS:
        return _all_callbacks(method, width, module, mask)
    if method == SLOWER_SCALES:
        return [QATCallback(but_head(recipes.named(width), module), scale_lr_multiplier=_scale_rate(width))]
    if method in ABLATIONS:
        return [QATCallback(but_head(recipes.named(width), module)), *ABLATIONS[method](mask)]
    if method.endswith(TEACHER_OF_BLOCKS):
        return [Distillation(copy.deepcopy(module), mask=mask, features=(FeatureMatch(),))]
    return [Distillation(copy.deepcopy(module), mask=mask)] if method.endswith(TEACHER) else []


def methods(width: str) -> list[str]:
    """Return what is compared at a width; ``float`` stands for no quantization."""
    if width == "float":
        return ["float", f"float{TEACHER}"]
    peers = [name for name, peer in PEERS.items() if width in peer.widths and peer.installed]
    return [
        AFTER_TRAINING,
        f"{AFTER_TRAINING}, absmax",
        *peers,
        "ours, QATCallback alone",
        "ours, without teacher",
        OURS,
    ]


def without_teacher(method: str) -> str:
    """Return a method without the teacher that may be added to it."""
    return method.removesuffix(TEACHER).removesuffix(TEACHER_OF_BLOCKS)


def applies(method: str, width: str) -> bool:
    """Return whether there is such a method at a width, among those compared by default or beside them."""
    if method == SLOWER_SCALES:
        return width in _FOUR_BITS
    ablation = width != "float" and method in (*ABLATIONS, *LEARNED_TOO, *ALL_CALLBACKS)
    return ablation or without_teacher(method) in methods(width)
