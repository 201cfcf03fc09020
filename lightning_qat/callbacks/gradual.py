"""GradualQuantization: rounding of weights sets in gradually."""

import fnmatch
from typing import Any, Final, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.run_length import num_steps
from lightning_qat.conversion.state import quantizers
from lightning_qat.quantization._checks import check_positive
from lightning_qat.quantization.grid import Ternary
from lightning_qat.quantization.quantizer import FakeQuantizer

_LEARNED, _RECOMPUTED = (0.3, 2.0), (0.75, 2.0)
_TWO_LEARNED, _TWO_RECOMPUTED = (0.75, 4.0), (0.6, 2.0)
"""Shares of the run over which rounding sets in, and powers: where scales are learned or recomputed; two levels."""

_LEAST: Final = 1e-4
"""Softness below which rounding is hard: float32 could not tell the slopes from the levels much longer."""

_MOST_LEVELS, _MOST_RECOMPUTED = 3, 8
_MIDDLE: Final = 0.5
_LEAST_LEVELS: Final = 2


@final
class GradualQuantization(pl.Callback):
    r"""Lets the rounding of weights set in over the first part of a training, in the place of all at once.

    The staircase of rounding starts as the identity (within the range of the grid) and becomes steeper with every
    optimizer step: its slopes between levels are :math:`1 / (1 - t)^p` with t = step / (fraction x steps of the run),
    up to :math:`10^4`, which p = 2 reaches at t = 0.99 and p = 4 at 0.9. Then, and in validation, test, export
    always, rounding is what it is. The network is never broken, which pays at 3 bits and below, where a short
    training must bring back much. It pays most with scales that follow the weights, as the recipes have them there:
    they can move far while nothing is rounded yet. Beside learned scales, which cannot follow, it pays at 1.58 bits
    over a shorter time, and at 1 bit, where signs do not depend on the scale. The figures are in
    ``benchmarks/README.md``.

    The step is the trainer's, so a resumed run goes on bit-identically. While values lie between levels, products are
    those of floats; where inputs are quantized, too, where the model is compiled (it is once more when rounding is
    complete), or on a GPU, the forward of linear layers is not fused then.

    Args:
        fraction: share of the run's optimizer steps, in (0, 1]. None: 0.3 where scales are learned (or stored), 0.75
            where they are recomputed from the weights in each step; for two levels 0.75 and 0.6.
        match: glob over dotted layer names.
        most_levels: of the grids that it is for, 2 or more: 4 is 2 bits, 8 is 3 bits. Where ``ProgressiveBitWidth``
            changes grids, that of the step counts. None: 3 where scales are learned (or stored), 8 where they are
            recomputed.
        power: p, positive and finite: the larger, the longer slopes are steep before they are levels. None: 4 for two
            levels with learned (or stored) scales, else 2.

    Raises:
        ValueError: values out of range. When training starts: a model that is not prepared, a pattern that matches
            no quantized weight, a run without end, grids whose borders are not in the middle between levels.

    Source: the annealing of PARQ, arXiv:2503.15748; deviations: see
    :func:`lightning_qat.functional.softening.soft_levels_`.

    Example::

        trainer = L.Trainer(callbacks=[QATCallback(recipes.binary()), GradualQuantization(), Distillation()])
    """

    def __init__(
        self,
        fraction: float | None = None,
        match: str = "*",
        *,
        most_levels: int | None = None,
        power: float | None = None,
    ) -> None:
        if fraction is not None and (not isinstance(fraction, int | float) or not 0 < fraction <= 1):
            raise ValueError(
                f"GradualQuantization: fraction={fraction!r} is not allowed; choose a share in (0, 1], or None for the "
                "default"
            )
        if most_levels is not None and (not isinstance(most_levels, int) or most_levels < _LEAST_LEVELS):
            raise ValueError(
                f"GradualQuantization: most_levels={most_levels!r} is not allowed; choose 2 or more, or None for the "
                "default"
            )
        if power is not None:
            check_positive("GradualQuantization: power", power)
        self.fraction, self.match, self.most_levels = None if fraction is None else float(fraction), match, most_levels
        self.power = None if power is None else float(power)
        self._quantizers: dict[str, FakeQuantizer] = {}
        self._num_steps = 1.0

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"GradualQuantization({self.fraction!r}, {self.match!r}, most_levels={self.most_levels!r}, "
            f"power={self.power!r})"
        )

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._num_steps = num_steps(trainer, "GradualQuantization")
        found = {name: q for name, q in quantizers(pl_module).items() if not q.layout.is_input}
        chosen = {name: q for name, q in found.items() if fnmatch.fnmatchcase(q.owner, self.match)}
        if not chosen:
            names = sorted({q.owner for q in found.values()})
            raise ValueError(
                f"GradualQuantization: match={self.match!r} matches no layer with a quantized weight; "
                + (f"there are {names[:8]}" if names else "QATCallback(recipe) quantizes the model")
            )
        if not any(self._is_soft(name, quantizer) for name, quantizer in chosen.items()):
            rank_zero_info(
                f"GradualQuantization: all weights have more levels than most_levels={self.most_levels} allows; they "
                "are rounded from the first step on."
            )
        self._quantizers = chosen

    def _is_soft(self, name: str, quantizer: FakeQuantizer) -> bool:
        """Return whether the grid that a weight has now is one of those that it is for."""
        grid = quantizer.grid
        if isinstance(grid, Ternary) and grid.threshold != _MIDDLE:
            raise ValueError(
                f"GradualQuantization: {name} has {grid!r}, whose borders are not in the middle between levels; choose "
                "Ternary(), or leave the layer out with match="
            )
        most = self.most_levels or (_MOST_LEVELS if quantizer.stored else _MOST_RECOMPUTED)
        return grid.num_levels <= most

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        done = trainer.global_step / self._num_steps
        # all of them in every step: ProgressiveBitWidth may have changed a grid, and a resumed run must find the same
        for name, quantizer in self._quantizers.items():
            _soften(quantizer, self._softness(quantizer, done) if self._is_soft(name, quantizer) else 0.0)

    def _softness(self, quantizer: FakeQuantizer, done: float) -> float:
        """Return the softness after a share of the run; 0 is hard."""
        if quantizer.grid.num_levels == _LEAST_LEVELS:
            fraction, power = _TWO_LEARNED if quantizer.stored else _TWO_RECOMPUTED
        else:
            fraction, power = _LEARNED if quantizer.stored else _RECOMPUTED
        fraction, power = self.fraction or fraction, self.power or power
        softness = max(0.0, 1.0 - done / fraction) ** power
        return softness if softness >= _LEAST else 0.0

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: nn.Module, stage: str) -> None:
        for quantizer in self._quantizers.values():
            quantizer.softness = None
        self._quantizers = {}

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


def _soften(quantizer: FakeQuantizer, softness: float) -> None:
    if softness <= 0:
        quantizer.softness = None
    elif quantizer.softness is None:
        quantizer.softness = torch.full((), softness, device=quantizer.lo.device)
    else:
        quantizer.softness.fill_(softness)  # the same tensor: nothing is compiled anew
