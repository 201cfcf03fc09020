"""Named recipes. Each says what it rests on.

How far they carry is measured in ``benchmarks/README.md``, with :func:`lightning_qat.recommended_callbacks` beside
them: ``GPTQ()``, ``OrthogonalUpdates()``, ``GradualQuantization()``, ``Distillation(fade_below=1.0, max_odds=100.0)``,
and all that is in float 4 times (3 and 2 bits) or 8 times as fast (1.58 and 1 bit). What no recipe can set is the
learning rate: from a trained float model a quarter of its highest rate served down to 3 bits, half of it at 2 and 1.58
bits, all of it at 1 bit and for ``bitnet`` (AdamW, language model of bytes, batches of 16; twice that with batches of
64).
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from lightning_qat.quantization.gradient import Clipped, StraightThrough
from lightning_qat.quantization.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from lightning_qat.quantization.grid import Binary, Grid, HalfInt, Int, Pi, Ternary
from lightning_qat.quantization.recipe import CONVOLUTIONS, Recipe, Rule
from lightning_qat.quantization.scale import AbsMax, AbsMean
from lightning_qat.quantization.spec import LayerSpec, QuantizerSpec
from lightning_qat.quantization.transform import Center, Hadamard, Normalize, Transform

__all__ = [
    "binary",
    "bitnet",
    "bitnet1",
    "int2",
    "int3",
    "int4",
    "int8",
    "named",
    "names",
    "piq2",
    "piq3",
    "seq2",
    "ternary",
    "ternary_a8",
    "w4a8",
    "w8a8",
]


def _granularity(group_size: int | None) -> Granularity:
    return PerChannel() if group_size is None else PerGroup(group_size)


def _weight_only(name: str, grid: Grid, group_size: int | None, scale_dtype: str) -> Recipe:
    weight = QuantizerSpec(grid, _granularity(group_size), scale_dtype=scale_dtype)
    return Recipe((Rule("*", LayerSpec(weight), source=name),))


# Chosen on validation data. The least error of Gaussian weights is at 0.65 (3 bits), 0.66 (2 bits), 0.76 (half-integer
# levels) and 1.53 (ternary): less than that trains better. They belong to their grids: ProgressiveBitWidth keeps them.
_MULTIPLES: Final = {"int3": 0.55, "int2": 0.5, "seq2": 0.6, "ternary": 1.3}


def _mean_scaled(name: str, grid: Grid, group_size: int | None, scale_dtype: str) -> QuantizerSpec:
    scale = AbsMean(_MULTIPLES[name])
    return QuantizerSpec(grid, _granularity(group_size), scale, Clipped(), scale_dtype)


def _few_levels(name: str, grid: Grid, group_size: int | None, scale_dtype: str) -> Recipe:
    return Recipe((Rule("*", LayerSpec(_mean_scaled(name, grid, group_size, scale_dtype)), source=name),))


def _int8_tokens() -> QuantizerSpec:
    return QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough())


def int8(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """8-bit weights, absolute maximum per channel or group, straight-through. Source: arXiv:1712.05877.

    Not a learned scale: a step of 8 bits is so small next to the learning rate of Adam-like optimizers that it would be
    changed by a large part of itself in every update. To go down from 8 bits while training, start from the recipe of
    the last width: ``ProgressiveBitWidth`` keeps the scale and gradient of the recipe.
    """
    weight = QuantizerSpec(Int(8), _granularity(group_size), AbsMax(), StraightThrough(), scale_dtype)
    return Recipe((Rule("*", LayerSpec(weight), source="int8"),))


def int4(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """4-bit weights, learned scale per channel or group, started at the least error.

    Such scales do best at a tenth of the learning rate, ``QATCallback(recipes.int4(), scale_lr_multiplier=0.1)``: Adam
    moves them by the rate itself, however small they are.

    Source: LSQ, arXiv:1902.08153.
    """
    return _weight_only("int4", Int(4), group_size, scale_dtype)


def int3(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """3-bit weights, a multiple of the mean magnitude per channel or group as scale, recomputed in every forward.

    Down from 3 bits a scale that is learned (LSQ, arXiv:1902.08153) stands in the way of weights that move far: Adam
    moves it by the learning rate, a few percent of itself, in every step. One that follows the weights has no noise of
    its own, and with ``OrthogonalUpdates()`` and ``GradualQuantization()`` less is lost: ``benchmarks/README.md``.
    ``Rule("*", LayerSpec(QuantizerSpec(Int(3))))`` has a learned one.

    Source: the mean as a measure of weights, ternary weight networks, arXiv:1605.04711; its multiples are ours.
    """
    return _few_levels("int3", Int(3), group_size, scale_dtype)


def int2(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """2-bit weights, scale as in :func:`int3`.

    For what reads integers. Where nothing has to, :func:`seq2` keeps more of a model in the same bits.

    Source: arXiv:1712.05877 for the grid; the scale: :func:`int3`.
    """
    return _few_levels("int2", Int(2), group_size, scale_dtype)


def seq2(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """2-bit weights on half-integer levels, scale as in :func:`int3`. Source: ParetoQ, arXiv:2502.02631 section 3.2."""
    return _few_levels("seq2", HalfInt(2), group_size, scale_dtype)


def ternary(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """Ternary weights (1.58 bits), scale as in :func:`int3`.

    Source: arXiv:2402.17764 for grid and scale, which is 1.3 times the one there: 0.65 of it is the threshold.
    """
    return _few_levels("ternary", Ternary(), group_size, scale_dtype)


def binary(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """Binary weights, learned scale started at the mean absolute value. Source: ParetoQ, arXiv:2502.02631 (1 bit)."""
    return _weight_only("binary", Binary(), group_size, scale_dtype)


def w8a8(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """8-bit weights and 8-bit inputs per token (convolutions: per sample), both absmax, straight-through.

    Source: inputs per token as in ZeroQuant, arXiv:2206.01861; training as in LLM-QAT, arXiv:2305.17888.
    """
    weight = QuantizerSpec(Int(8), _granularity(group_size), AbsMax(), StraightThrough(), scale_dtype)
    return Recipe((Rule("*", LayerSpec(weight, _int8_tokens()), source="w8a8"),))


def w4a8(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """4-bit weights with learned scale, 8-bit absmax inputs per token (convolutions: per sample), straight-through.

    Source: weights LSQ, arXiv:1902.08153; inputs per token as in LLM-QAT, arXiv:2305.17888.
    """
    weight = QuantizerSpec(Int(4), _granularity(group_size), scale_dtype=scale_dtype)
    return Recipe((Rule("*", LayerSpec(weight, _int8_tokens()), source="w4a8"),))


def ternary_a8(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """The weights of :func:`ternary`, 8-bit absmax inputs per token (convolutions: per sample), straight-through.

    What :func:`bitnet` computes with, but for its one scale per weight, which a model that was trained in float misses:
    the figures of both are in ``benchmarks/README.md``.

    Source: arXiv:2402.17764 for grid and inputs; the scale: :func:`ternary`.
    """
    weight = _mean_scaled("ternary", Ternary(), group_size, scale_dtype)
    return Recipe((Rule("*", LayerSpec(weight, _int8_tokens()), source="ternary_a8"),))


def _bitnet(name: str, grid: Grid, transforms: tuple[Transform, ...], normalize: Transform | None) -> Recipe:
    weight = QuantizerSpec(grid, PerTensor(), AbsMean(), StraightThrough())
    layer = LayerSpec(weight, _int8_tokens(), transforms)
    if normalize is None:
        return Recipe((Rule("*", layer, source=name),))
    linear = LayerSpec(weight, _int8_tokens(), (*transforms, normalize))
    return Recipe((Rule("*", linear, types=(nn.Linear,), source=name), Rule("*", layer, source=name)))


def bitnet(normalize: Normalize | None = None) -> Recipe:
    """Ternary absmean weights per tensor, 8-bit absmax inputs per token, straight-through.

    Args:
        normalize: normalization of the input of linear layers, ``Normalize()``, for models without norms of their own.

    Source: BitNet b1.58, arXiv:2402.17764.
    """
    return _bitnet("bitnet", Ternary(), (), normalize)


def bitnet1(normalize: Normalize | None = None) -> Recipe:
    """Centered binary absmean weights per tensor, 8-bit absmax inputs per token, straight-through.

    Args:
        normalize: as in :func:`bitnet`.

    Source: BitNet, arXiv:2310.11453.
    """
    return _bitnet("bitnet1", Binary(), (Center(),), normalize)


def piq3(group_size: int | None = None, scale_dtype: str = "float32") -> Recipe:
    """3-bit weights with step alpha * pi / 4, alpha learned: the family of int3 at another learning rate of the scale.

    Source: PiQ3 of the ruvLLM design; with a learned scale the same family as LSQ, arXiv:1902.08153.
    """
    return _weight_only("piq3", Pi(3, 4), group_size, scale_dtype)


def piq2(group_size: int | None = None, scale_dtype: str = "float32", seed: int = 0) -> Recipe:
    """2-bit weights with step alpha * pi / 3, alpha learned, after a Hadamard rotation of linear layers.

    Args:
        group_size: elements that share a scale; None means per channel.
        scale_dtype: storage dtype of scales.
        seed: of the rotation.

    Source: PiQ2 of the ruvLLM design; the rotation QuIP#, arXiv:2402.04396.
    """
    weight = QuantizerSpec(Pi(2, 3), _granularity(group_size), scale_dtype=scale_dtype)
    rotated = LayerSpec(weight, transforms=(Hadamard(seed),))
    others = (*CONVOLUTIONS, nn.MultiheadAttention)
    return Recipe(
        (
            Rule("*", rotated, types=(nn.Linear,), source="piq2"),
            Rule("*", LayerSpec(weight), types=others, source="piq2"),
        )
    )


_NAMED: Final[dict[str, Callable[..., Recipe]]] = {
    "binary": binary,
    "bitnet": bitnet,
    "bitnet1": bitnet1,
    "int2": int2,
    "int3": int3,
    "int4": int4,
    "int8": int8,
    "piq2": piq2,
    "piq3": piq3,
    "seq2": seq2,
    "ternary": ternary,
    "ternary_a8": ternary_a8,
    "w4a8": w4a8,
    "w8a8": w8a8,
}


def names() -> tuple[str, ...]:
    """Return the names of all recipes.

    >>> "int4" in names()
    True
    """
    return tuple(sorted(_NAMED))


def named(name: str, **arguments: Any) -> Recipe:
    """Return the recipe of a name, for configs.

    Args:
        name: one of :func:`names`.
        arguments: arguments of that recipe, such as ``group_size=32``.

    Raises:
        ValueError: an unknown name; the message lists all and the nearest.
        TypeError: an argument that the recipe does not have.
    """
    if not isinstance(name, str) or name not in _NAMED:
        near = difflib.get_close_matches(str(name), _NAMED, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"recipes.named: {name!r} is not a recipe; choose one of {', '.join(names())}{hint}")
    known = list(inspect.signature(_NAMED[name]).parameters)
    unknown = [argument for argument in arguments if argument not in known]
    if unknown:
        raise TypeError(
            f"recipes.named({name!r}, ...): {', '.join(unknown)} is no argument of this recipe; "
            f"it takes {', '.join(known)}"
        )
    return _NAMED[name](**arguments)
