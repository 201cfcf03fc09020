"""BitWidth: carries a change of precision out in a running training. Shared by the callbacks that decide when."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_qat.conversion.regrid import Regridded, check_precisions, refine_inputs, regrid
from lightning_qat.conversion.state import quantizers


@final
class BitWidth:
    """Sets the precision of the matching quantizers, with all that follows from a change.

    Scales are found anew, the optimizer forgets what it remembers of them, averaged models get the same grids, and the
    change is logged as ``quantization/bits`` (the mean over the matching quantizers, log2 of the number of levels).

    Args:
        match: glob over dotted layer names.
        inputs: whether quantizers of inputs follow, too.
        who: name of the callback, for messages.
    """

    def __init__(self, match: str, inputs: bool, who: str) -> None:
        self.match, self.inputs, self.who = match, inputs, who
        self._present: object = None
        self._to_refine: list[Regridded] = []
        self._refining = ExitStack()

    def forget(self) -> None:
        """Compare with the model itself at the next :meth:`set`: it may have been loaded or be another one."""
        self._present = None
        self._to_refine = []

    def check(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", precisions: Iterable[object]) -> None:
        """Check before the run that every stage is possible and nobody else sets the same quantizers.

        Raises:
            ValueError: naming layer, precision and remedy.
        """
        if not quantizers(pl_module):
            raise ValueError(
                f"{self.who}: the model is not prepared; add QATCallback(recipe) to the callbacks, or call "
                "prepare(model, recipe) before"
            )
        try:
            own = check_precisions(pl_module, precisions, match=self.match, inputs=self.inputs)
        except ValueError as error:
            raise ValueError(f"{self.who}: {error}") from None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            other = getattr(callback, "bit_width", None)
            if not isinstance(other, BitWidth) or other is self:
                continue
            theirs = check_precisions(pl_module, (), match=other.match, inputs=other.inputs)
            shared = sorted(own.keys() & theirs.keys())
            if shared:
                raise ValueError(
                    f"{self.who}: match={self.match!r} and match={other.match!r} of another callback both set "
                    f"{shared[0]}; choose patterns that do not overlap"
                )

    def set(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", precision: object) -> None:
        """Give the quantizers a precision; costs one comparison while it stays the same."""
        if precision == self._present:
            return
        first, self._present = self._present is None, precision
        changed = regrid(pl_module, precision, match=self.match, inputs=self.inputs)
        forget_state(trainer.optimizers, [p for each in changed for p in each.quantizer.parameters()])
        for average in averaged_models(trainer):
            regrid(average, precision, match=self.match, inputs=self.inputs)
        self._to_refine = [each for each in changed if each.has_rescaled_input]
        if changed or first:
            self._log(trainer, pl_module)
        if changed:
            self._announce(trainer, changed)

    def batch_begins(self, pl_module: "pl.LightningModule") -> None:
        """Let the batch after a change decide between scales of inputs by ratio and by search."""
        if self._to_refine:
            self._refining.enter_context(refine_inputs(pl_module, self._to_refine))
            if is_compiled(pl_module):  # compiled code would be compiled again for this one batch
                self._refining.enter_context(torch.compiler.set_stance("force_eager"))
            self._to_refine = []

    def batch_ended(self) -> None:
        """Leave the batch, also when it failed."""
        self._refining.close()

    def _log(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        present = check_precisions(pl_module, (), match=self.match, inputs=self.inputs).values()
        bits = sum(quantizer.grid.bits_per_weight for quantizer in present) / len(present)
        name = "quantization/bits" if self.match == "*" else f"quantization/bits/{self.match}"
        for logger in trainer.loggers:
            logger.log_metrics({name: bits}, step=logged_step(trainer))

    def _announce(self, trainer: "pl.Trainer", changed: list[Regridded]) -> None:
        before = ", ".join(sorted({each.before.label for each in changed}))
        after = ", ".join(sorted({each.after.label for each in changed}))
        rank_zero_info(
            f"{self.who}: {before} -> {after} in {len(changed)} quantizers "
            f"at epoch {trainer.current_epoch}, step {trainer.global_step}"
        )


def logged_step(trainer: "pl.Trainer") -> int:
    """Return the step on the axis that Lightning draws metrics over: batches after which optimizers stepped."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_compiled(pl_module: "pl.LightningModule") -> bool:
    """Whether the module or a part of it runs through torch.compile."""
    return getattr(pl_module, "_compiler_ctx", None) is not None or any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None for module in pl_module.modules()
    )


def averaged_models(trainer: "pl.Trainer") -> list[nn.Module]:
    """Return the averages that callbacks keep of the model."""
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [
        average.module if isinstance(average, AveragedModel) else average
        for average in averages
        if isinstance(average, nn.Module)
    ]


def forget_state(optimizers: list[Optimizer], parameters: Iterable[torch.Tensor]) -> None:
    """Let optimizers start afresh with parameters whose values were found anew.

    Everything becomes zero in place (captured graphs keep their addresses), the step count included: Adam's bias
    correction belongs to moments that started at zero at step 0; moments of zero at step 1000 would be taken for
    settled ones, and the next steps be too large by up to (1 - b1) / sqrt(1 - b2) = 3.2 at the usual settings.
    """
    for parameter in parameters:
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    value.zero_()
                elif isinstance(value, int | float) and not isinstance(value, bool):
                    state[key] = type(value)(0)
