"""QATCallback: one line that makes a LightningModule train quantized."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.linalg import vector_norm
from typing_extensions import override

from lightning_qat.callbacks.accumulation import AccumulationWindows
from lightning_qat.callbacks.attachment import ModuleHooks, attach, averaged_models, callbacks_of, detach
from lightning_qat.callbacks.differences import differences
from lightning_qat.callbacks.lora import merge_adapters
from lightning_qat.callbacks.optimizer_checks import (
    align_rates,
    check_groups,
    check_options,
    check_rates,
    check_resumed,
)
from lightning_qat.callbacks.optimizers import separate_scales, unwatch
from lightning_qat.callbacks.parameter_group import ParameterGroup, followers, quantizer_parameters
from lightning_qat.conversion.calibrate import uncalibrated
from lightning_qat.conversion.checkpoint import CHECKPOINT_KEY, is_quantizer_key
from lightning_qat.conversion.prepare import convert, prepared_state, quantizers, refresh_scales, report_of
from lightning_qat.conversion.report import ConversionReport
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.state import reading_latents
from lightning_qat.conversion.view import is_view, latent, mark_stale, view_names
from lightning_qat.quantization import recipes
from lightning_qat.quantization.recipe import Recipe

_AVERAGING: Final = ("WeightAveraging", "StochasticWeightAveraging")


@final
class QATCallback(pl.Callback, ModuleHooks):
    """Converts the LightningModule for every stage, and trains learned scales in optimizer groups of their own.

    Layers may be created in ``__init__``, ``setup`` or ``configure_model``. The model stays prepared afterwards; a
    model that was prepared before is left alone. Scales follow their weight into its optimizer, without weight decay;
    those of layers that are frozen when they are converted are frozen with them. The recipe is stored in checkpoints.

    Args:
        recipe: which layers get which quantizers; ``recipes.int4()`` if the model is not prepared already.
        arithmetic: ``"auto"``, or how products of quantized values are computed; see :func:`lightning_qat.prepare`.
        scale_lr_multiplier: learning rate of scales relative to that of their weights, positive. At 4 bits 0.1 keeps
            more of a model (``benchmarks/README.md``); it needs a scheduler that keeps the rates of groups apart.
        groups: learning rate and weight decay of some weights, scales or temperatures; the first that matches decides.

    Raises:
        TypeError: a recipe or group of the wrong kind.
        ValueError: a multiplier that is not positive, a group given twice. At the start of a stage: rules or groups
            without effect, input scales that nothing calibrates, callbacks in the wrong order, a checkpoint or model of
            another recipe or of other optimizer options, an optimizer or scheduler that cannot train scales, a strategy
            that would lose them.

    Example::

        trainer = L.Trainer(callbacks=[QATCallback(recipes.int4())])
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        *,
        arithmetic: str = "auto",
        scale_lr_multiplier: float = 1.0,
        groups: Iterable[ParameterGroup] = (),
    ) -> None:
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(f"QATCallback: recipe={recipe!r} is not a Recipe; try recipes.int4()")
        if not 0 < scale_lr_multiplier < float("inf"):
            raise ValueError(f"QATCallback: scale_lr_multiplier={scale_lr_multiplier} must be positive; default 1.0")
        self.recipe = recipe
        self.arithmetic = arithmetic
        self.scale_lr_multiplier = scale_lr_multiplier
        self.groups = _checked(groups)
        self._reported: ConversionReport | None = None
        self._windows = AccumulationWindows()

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"QATCallback({self.recipe!r}, arithmetic={self.arithmetic!r}, "
            f"scale_lr_multiplier={self.scale_lr_multiplier!r}, groups={self.groups!r})"
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self._check_order(trainer, pl_module)
            _check_launcher(trainer, pl_module)
            multipliers = [self.scale_lr_multiplier, *(group.lr_multiplier for group in self.groups)]
            check_rates(callbacks_of(trainer), multipliers)
        attach(pl_module)
        self.layers_created(pl_module)

    @override
    def creating_layers(self, pl_module: "pl.LightningModule") -> AbstractContextManager[Any]:
        return _following_weights(pl_module)

    @override
    def layers_created(self, pl_module: "pl.LightningModule") -> None:
        state, present = prepared_state(pl_module), quantizers(pl_module)
        if state is None and self.recipe is None and present:
            return  # parts were prepared by the user
        recipe = self.recipe or (state.recipe if state else recipes.int4())
        lines = differences(state.recipe, recipe, ("model", "callback")) if state else ()
        if lines:
            raise ValueError(
                _listed("QATCallback: the model is prepared by another recipe.", lines)
                + "\nLeave the recipe out, QATCallback(), or call unprepare(model) before."
            )
        if state is None:
            convert(pl_module, recipe, arithmetic=self.arithmetic)
        else:
            convert(pl_module, state.recipe, arithmetic=state.arithmetic)
        _freeze_with_weights(pl_module, known=list(present.values()))

    @override
    def building_optimizers(self, pl_module: "pl.LightningModule") -> AbstractContextManager[Any]:
        return separate_scales(pl_module, self.scale_lr_multiplier, self.groups)

    @override
    def loading_checkpoint(self, pl_module: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
        _check_resumable(pl_module, checkpoint)
        _restore_grids(pl_module, checkpoint)
        merge_adapters(pl_module, checkpoint)
        stored, state = checkpoint.get(CHECKPOINT_KEY), prepared_state(pl_module)
        if stored is None or state is None:
            return
        if _is_fitting(pl_module):
            check_resumed(stored.get("optimizer_options"), self._optimizer_options())
        lines = differences(Recipe.from_dict(stored["recipe"]), state.recipe, ("checkpoint", "callback"))
        if lines:
            raise ValueError(
                _listed("QATCallback: the checkpoint was made with another recipe.", lines)
                + "\nUse the recipe of the checkpoint, or load its weights with load_checkpoint() and train anew."
            )

    @override
    def saving_checkpoint(self, pl_module: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
        state = prepared_state(pl_module)
        if state is not None:
            grids = {name: quantizer.get_extra_state().tolist() for name, quantizer in quantizers(pl_module).items()}
            checkpoint[CHECKPOINT_KEY] = {
                "version": 1,
                "recipe": state.recipe.to_dict(),
                "grids": grids,
                "optimizer_options": self._optimizer_options(),
            }

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        self.saving_checkpoint(pl_module, checkpoint)  # also after training, when the module is detached

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._check_prepared(trainer, pl_module)
        _check_averages(trainer, pl_module)
        check_groups(pl_module, trainer.optimizers)
        check_options(pl_module, trainer.optimizers, self.groups)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # after on_train_epoch_start, where finetuning callbacks add groups
            check_groups(pl_module, trainer.optimizers)
            align_rates(trainer.optimizers)
        self._windows.batch_begins(trainer, pl_module, batch_idx)

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
        self._windows.close()
        unwatch(trainer.optimizers)
        detach(pl_module)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._windows.close()

    def _optimizer_options(self) -> dict[str, Any]:
        """Return in plain types what a resumed optimizer already has."""
        groups = [dataclasses.asdict(group) for group in self.groups]
        return {"scale_lr_multiplier": self.scale_lr_multiplier, "groups": groups}

    def _check_prepared(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        refresh_scales(pl_module)
        if prepared_state(pl_module) is not None:
            report = report_of(pl_module)
            report.check()
            if report != self._reported:
                rank_zero_info(f"QATCallback:\n{report}")
                self._reported = report
        _check_calibrated(trainer, pl_module)

    def _check_order(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if quantizers(pl_module):
            return
        for callback in itertools.takewhile(lambda callback: callback is not self, callbacks_of(trainer)):
            name = type(callback).__name__
            if any(kind.__name__ in _AVERAGING for kind in type(callback).__mro__):
                raise ValueError(
                    f"{name} is listed before QATCallback, so that it would average a model without quantizers; "
                    f"list QATCallback before {name}"
                )


@contextmanager
def _following_weights(model: nn.Module) -> Iterator[None]:
    """Let the user's code inside initialize prepared weights; their scales are then found anew."""
    before = {module: _fingerprint(module) for module in model.modules() if is_view(module)}
    with reading_latents(model):
        yield
    for module, fingerprint in before.items():
        after = _fingerprint(module)
        if after and after != fingerprint:
            mark_stale(module)


def _fingerprint(module: nn.Module) -> list[tuple[float, float]]:
    """Return what changes with the latent weights of a layer, also where ``.data`` is written; nothing for shards."""
    weights = [latent(module, name).detach() for name in view_names(module)]
    here = [w for w in weights if not (w.is_meta or is_sharded(w)) and w.is_floating_point()]
    return [(float(w.sum(dtype=torch.float64)), float(vector_norm(w, dtype=torch.float64))) for w in here]


def _listed(head: str, lines: tuple[str, ...]) -> str:
    return "\n".join([head, *(f"  {line}" for line in lines)])


def _freeze_with_weights(model: nn.Module, known: list[nn.Module]) -> None:
    """Freeze the new quantizers of layers whose weights are frozen."""
    old = {id(parameter) for quantizer in known for parameter in quantizer.parameters()}
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    owned = followers(model)
    alive = {id(follower) for owner, found in owned.items() if owner in trainable for follower in found}
    for found in owned.values():
        for follower in found:
            if id(follower) not in old and id(follower) not in alive:
                follower.requires_grad_(False)


def _check_launcher(trainer: "pl.Trainer", pl_module: nn.Module) -> None:
    launcher = getattr(trainer.strategy, "launcher", None)
    if quantizers(pl_module) or not any(kind.__name__ == "_MultiProcessingLauncher" for kind in type(launcher).__mro__):
        return
    raise ValueError(
        f"QATCallback: {type(trainer.strategy).__name__} trains in new processes and hands the weights back to a "
        "model that is not prepared, which would lose all scales. Call prepare(model, recipe) before "
        'trainer.fit(model), or choose strategy="ddp"'
    )


def _restore_grids(pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Take grids over where Lightning restores parameters and buffers alone, as it does for sharded models."""
    if checkpoint.get("state_dict"):
        return
    grids = checkpoint.get(CHECKPOINT_KEY, {}).get("grids", {})
    for name, quantizer in quantizers(pl_module).items():
        if name in grids:
            quantizer.set_extra_state(torch.tensor(grids[name]))


def _checked(groups: Iterable[ParameterGroup]) -> tuple[ParameterGroup, ...]:
    if isinstance(groups, ParameterGroup):
        raise TypeError(f"QATCallback: groups={groups.label} is one group; give a list, [{groups!r}]")
    found = tuple(groups)
    for index, group in enumerate(found):
        if not isinstance(group, ParameterGroup):
            raise TypeError(f"QATCallback: groups[{index}]={group!r} is not a ParameterGroup")
        if any((group.match, group.kind) == (each.match, each.kind) for each in found[:index]):
            raise ValueError(f"QATCallback: {group.label} is given twice, and the first decides; keep one of them")
    return found


def _is_fitting(pl_module: "pl.LightningModule") -> bool:
    return getattr(pl_module._trainer, "state", None) is not None and pl_module.trainer.state.fn == "fit"


def _check_resumable(pl_module: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
    keys = checkpoint.get("state_dict", ())  # strategies that shard have loaded it already and leave it out
    is_float = bool(keys) and not any(map(is_quantizer_key, keys))
    if is_float and _is_fitting(pl_module) and quantizer_parameters(pl_module):
        raise ValueError(
            "QATCallback: ckpt_path is a checkpoint of a float run, whose optimizer knows no scales, so that training "
            "cannot go on from it. Load its weights, load_checkpoint(model, path), and call trainer.fit(model) without "
            "ckpt_path"
        )


def _check_calibrated(trainer: "pl.Trainer", pl_module: nn.Module) -> None:
    missing = list(uncalibrated(pl_module))
    coming = trainer.state.fn == "fit" and any(getattr(each, "calibrates", False) for each in callbacks_of(trainer))
    if not missing or coming:
        return
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise ValueError(
        f"QATCallback: the stored scale of {', '.join(missing[:3])}{more} was never found. Train with Calibration() "
        "among the callbacks, load a checkpoint of such a run, or call calibrate(model, batches)"
    )


def _check_averages(trainer: "pl.Trainer", pl_module: nn.Module) -> None:
    present = [name for name, _ in pl_module.named_parameters()]
    for callback, averaged in averaged_models(trainer):
        if [name for name, _ in averaged.named_parameters()] != present:
            late = "__init__" if callback == "StochasticWeightAveraging" else "__init__ or configure_model()"
            raise ValueError(
                f"{callback} copied the model before all its layers were there and would average a part of it; list "
                f"QATCallback before {callback}, and create layers in {late}"
            )
