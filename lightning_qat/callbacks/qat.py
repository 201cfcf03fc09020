"""QATCallback: one line that makes a LightningModule train quantized."""

from contextlib import AbstractContextManager
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_qat.callbacks.attachment import ModuleHooks, attach, detach
from lightning_qat.callbacks.optimizers import check_groups, separate_scales, stop_decay
from lightning_qat.conversion.calibrate import uncalibrated
from lightning_qat.conversion.checkpoint import CHECKPOINT_KEY
from lightning_qat.conversion.prepare import convert, prepared_state, quantizers, refresh_scales, report_of
from lightning_qat.conversion.report import ConversionReport
from lightning_qat.quantization import recipes
from lightning_qat.quantization.recipe import Recipe

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


@final
class QATCallback(pl.Callback, ModuleHooks):
    """Converts the LightningModule for every stage, and trains learned scales in optimizer groups of their own.

    Layers may be created in ``__init__``, ``setup`` or ``configure_model``. The model stays prepared afterwards; a
    model that was prepared before is left alone. Scales follow their weight into its optimizer, without weight decay.
    The recipe is stored in checkpoints.

    Args:
        recipe: which layers get which quantizers; ``recipes.int4()`` if the model is not prepared already.
        arithmetic: ``"auto"``, or how products of quantized values are computed; see :func:`lightning_qat.prepare`.
        scale_lr_multiplier: learning rate of scales relative to that of their weights, positive.

    Raises:
        TypeError: a recipe of the wrong kind.
        ValueError: a multiplier that is not positive. At the start of a stage: rules without effect, input scales that
            nothing calibrates, callbacks in the wrong order, a checkpoint made by another recipe.

    Example::

        trainer = L.Trainer(callbacks=[QATCallback(recipes.int4())])
    """

    def __init__(
        self, recipe: Recipe | None = None, *, arithmetic: str = "auto", scale_lr_multiplier: float = 1.0
    ) -> None:
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(f"QATCallback: recipe={recipe!r} is not a Recipe; try recipes.int4()")
        if not scale_lr_multiplier > 0:
            raise ValueError(f"QATCallback: scale_lr_multiplier={scale_lr_multiplier} must be positive; default 1.0")
        self.recipe = recipe
        self.arithmetic = arithmetic
        self.scale_lr_multiplier = scale_lr_multiplier
        self._reported: ConversionReport | None = None

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"QATCallback({self.recipe!r}, arithmetic={self.arithmetic!r}, "
            f"scale_lr_multiplier={self.scale_lr_multiplier!r})"
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._check_order(trainer, pl_module, stage)
        attach(pl_module)
        self.layers_created(pl_module)

    @override
    def layers_created(self, pl_module: "pl.LightningModule") -> None:
        state = prepared_state(pl_module)
        if state is None and self.recipe is None and quantizers(pl_module):
            return  # parts were prepared by the user
        recipe = self.recipe or (state.recipe if state else recipes.int4())
        convert(pl_module, recipe, arithmetic=self.arithmetic)

    @override
    def building_optimizers(self, pl_module: "pl.LightningModule") -> AbstractContextManager[Any]:
        return separate_scales(pl_module, self.scale_lr_multiplier)

    @override
    def loading_checkpoint(self, pl_module: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
        stored, state = checkpoint.get(CHECKPOINT_KEY), prepared_state(pl_module)
        if stored is None or state is None:
            return
        saved = Recipe.from_dict(stored["recipe"])
        if saved != state.recipe:
            raise ValueError(
                "QATCallback: the checkpoint was made with another recipe.\n"
                f"  checkpoint: {saved!r}\n  callback:   {state.recipe!r}\n"
                "Use the recipe of the checkpoint, or load its weights with load_checkpoint() and start anew."
            )

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        state = prepared_state(pl_module)
        if state is not None:
            checkpoint[CHECKPOINT_KEY] = {"version": 1, "recipe": state.recipe.to_dict()}

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._check_prepared(trainer, pl_module)
        self._check_average(trainer, pl_module)
        check_groups(pl_module, trainer.optimizers)
        self._check_learning_rates(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        stop_decay(pl_module, trainer.optimizers)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn != "fit":
            self._check_prepared(trainer, pl_module)

    @override
    def on_test_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._check_prepared(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._check_prepared(trainer, pl_module)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        detach(pl_module)

    def _check_prepared(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        refresh_scales(pl_module)
        if prepared_state(pl_module) is not None:
            report = report_of(pl_module)
            report.check()
            if report != self._reported:
                rank_zero_info(f"QATCallback:\n{report}")
                self._reported = report
        missing = uncalibrated(pl_module)
        coming = any(getattr(callback, "calibrates", False) for callback in trainer.callbacks)
        fitting = trainer.state.fn == "fit"
        if missing and not (fitting and coming):
            raise ValueError(
                f"QATCallback: {next(iter(missing))}: the stored scale of this input was never found (and of "
                f"{len(missing) - 1} more). Add Calibration() to the callbacks, or call calibrate(model, batches) before."
            )

    def _check_order(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage != "fit" or quantizers(pl_module):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback is self:
                return
            name = type(callback).__name__
            if any(kind.__name__ in _AVERAGING for kind in type(callback).__mro__):
                raise ValueError(
                    f"{name} is listed before QATCallback, so that it would average a model without quantizers; "
                    f"list QATCallback before {name}"
                )

    def _check_average(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            averaged = getattr(callback, "_average_model", None)
            if averaged is None:
                continue
            plain = getattr(averaged, "module", averaged)
            if [name for name, _ in plain.named_parameters()] != [name for name, _ in pl_module.named_parameters()]:
                name = type(callback).__name__
                raise ValueError(
                    f"{name} averages only a part of the model: layers were created in LightningModule.setup(), after "
                    f"{name} had copied it; create them in __init__ or configure_model()"
                )

    def _check_learning_rates(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.scale_lr_multiplier == 1.0:
            return
        for optimizer in trainer.optimizers:
            rates = [group["lr"] for group in optimizer.param_groups]
            if len(rates) > 1 and len(set(map(float, rates))) == 1:
                raise ValueError(
                    f"QATCallback: scale_lr_multiplier={self.scale_lr_multiplier} has no effect, because the scheduler of "
                    f"{type(optimizer).__name__} sets one rate for all groups; give it one value per group "
                    f"({len(rates)} groups: scales come right after their weights)"
                )
