"""LoRA: trains low-rank adapters and scales alone, and what is quantized is the merged weight."""

import itertools
from collections.abc import Iterable
from typing import Any, Final, final

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_qat.callbacks.attachment import ModuleHooks, attach, callbacks_of, detach
from lightning_qat.conversion.lora import Globs, Settings, adapt, adapter_keys, merged_state
from lightning_qat.conversion.state import quantizers
from lightning_qat.quantization.low_rank import LowRank, check_low_rank

_SHARDING: Final = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
_AVERAGING: Final = ("WeightAveraging", "StochasticWeightAveraging")


@final
class LoRA(pl.Callback, ModuleHooks):
    r"""Gives quantized layers low-rank adapters before the optimizer is built, and freezes everything else.

    What is fake-quantized is the merged weight, Q(W + (alpha / rank) B A): what is trained is what is exported, and
    ``bake(model)``, ``codes(model)`` and every export work as they do without adapters. Learned scales train along.
    The frozen weights get no gradient and no optimizer state, and no weight waits for backward in merged or quantized
    form where layers have the forward of ``nn.Linear``. ``merge_lora(model)`` folds the adapters into the weights.

    List it after ``QATCallback``, which may hand over ``self.parameters()`` to the optimizer as ever.

    Args:
        rank: r, at most min(outputs, inputs) of every matching weight.
        alpha: positive; the correction is multiplied by alpha / rank.
        dropout: probability in [0, 1) of an input feature of a correction to be left out, drawn once per forward.
        match: glob, or several, over dotted names of quantized layers.
        base: how the frozen weights are stored: ``"same"``, ``"bfloat16"``, or packed: ``"int8"``, ``"int4"``.
        trainable: glob, or several, over dotted names of other parameters that train, such as ``"head.*"``: what
            starts from random values must.

    Raises:
        TypeError: ``match`` or ``trainable`` is no text.
        ValueError: values that are not allowed. At the start of a stage: callbacks in the wrong order, a pattern that
            matches nothing, a rank above min(outputs, inputs) of a layer, sharded weights, an optimizer without the
            adapters, a checkpoint of another setting.

    Source: LoRA, arXiv:2106.09685; quantizing the merged weight: ruvLLM's LoRA-QAT, W_q = Q(W + BA).

    Example::

        trainer = L.Trainer(callbacks=[QATCallback(recipes.int4()), LoRA(rank=8, alpha=16)])
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        match: Globs = "*",
        base: str = "same",
        trainable: Globs = (),
    ) -> None:
        check_low_rank(rank, alpha, dropout, base, "LoRA")
        self.rank, self.alpha, self.dropout, self.base = rank, alpha, dropout, base
        self.match, self.trainable = _plain(match, "match"), _plain(trainable, "trainable")
        self._names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"LoRA({self.rank!r}, {self.alpha!r}, {self.dropout!r}, match={self.match!r}, base={self.base!r}, "
            f"trainable={self.trainable!r})"
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._check_order(trainer)
        strategy = next((kind.__name__ for kind in type(trainer.strategy).__mro__ if kind.__name__ in _SHARDING), None)
        if strategy is not None:
            raise ValueError(f"LoRA: adapters of sharded weights ({strategy}) are not supported; use one device or DDP")
        attach(pl_module)
        if quantizers(pl_module):
            self._add(pl_module, final=False)

    @override
    def layers_created(self, pl_module: "pl.LightningModule") -> None:
        self._add(pl_module, final=False)

    @override
    def loading_checkpoint(self, pl_module: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
        keys = checkpoint.get("state_dict", ())
        fitting = pl_module._trainer is not None and pl_module.trainer.state.fn == "fit"
        if fitting and keys and not adapter_keys(keys):
            raise ValueError(
                "LoRA: ckpt_path is a checkpoint of a run without adapters, whose optimizer knows none. Load its "
                "weights, load_checkpoint(model, path), and call trainer.fit(model) without ckpt_path"
            )

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._add(pl_module, final=True)
        self._check_optimizers(trainer, pl_module)
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        rank_zero_info(
            f"LoRA: rank {self.rank} in {len(self._names)} weights; {trained:,} parameters train, "
            f"{sum(p.numel() for p in pl_module.parameters()) - trained:,} are frozen"
        )

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn != "fit":
            self._add(pl_module, final=True)

    @override
    def on_test_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._add(pl_module, final=True)

    @override
    def on_predict_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._add(pl_module, final=True)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        detach(pl_module)

    def _add(self, pl_module: "pl.LightningModule", *, final: bool) -> None:
        """Add adapters to what is there; patterns may still wait for layers unless it is final."""
        try:
            settings = Settings(self.rank, float(self.alpha), float(self.dropout), self.base)
            self._names = adapt(pl_module, settings, match=self.match, trainable=self.trainable, complete=final)
        except ValueError as error:
            raise ValueError(f"LoRA: {str(error).removeprefix('add_lora: ')}") from error

    def _check_order(self, trainer: "pl.Trainer") -> None:
        names = [type(callback).__name__ for callback in callbacks_of(trainer)]
        after = itertools.dropwhile(lambda callback: callback is not self, callbacks_of(trainer))
        if any(type(callback).__name__ == "QATCallback" for callback in after):
            raise ValueError("LoRA is listed before QATCallback, which makes what it adapts; list QATCallback first")
        for callback in itertools.takewhile(lambda callback: callback is not self, callbacks_of(trainer)):
            kinds = [kind.__name__ for kind in type(callback).__mro__]
            if any(kind in _AVERAGING for kind in kinds):
                raise ValueError(
                    f"{kinds[0]} is listed before LoRA, so that it would average a model without adapters; list LoRA "
                    f"before {kinds[0]}"
                )
        if names.count("LoRA") > 1:
            raise ValueError("LoRA: one per trainer, because each freezes what it does not adapt; give match= several")

    def _check_optimizers(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        present = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        lost = [
            name
            for name, module in pl_module.named_modules()
            if isinstance(module, LowRank) and any(id(p) not in present for p in module.parameters())
        ]
        if lost and trainer.optimizers:
            raise ValueError(
                f"LoRA: {', '.join(lost[:3])}{' and more' if len(lost) > 3 else ''} would not be trained: no optimizer "
                "has the adapters; build it in configure_optimizers() with self.parameters(), or with all that "
                "requires_grad"
            )


def _plain(globs: Globs, argument: str) -> str | tuple[str, ...]:
    plain = (globs,) if isinstance(globs, str) else tuple(globs) if isinstance(globs, Iterable) else (globs,)
    for glob in plain:
        if not isinstance(glob, str):
            raise TypeError(f"LoRA: {argument}={globs!r} is not a glob over names, such as '*.attention.*', or several")
    return globs if isinstance(globs, str) else plain


def merge_adapters(pl_module: "pl.LightningModule", checkpoint: dict[str, Any]) -> None:
    """Merge adapters of a checkpoint that the model lacks into the weights that are about to be restored.

    Raises:
        ValueError: to train on from such a checkpoint, whose optimizer knows adapters.
    """
    state = checkpoint.get("state_dict", {})
    own = pl_module.state_dict() if adapter_keys(state) else {}
    missing = [key for key in adapter_keys(state) if key not in own]
    if not missing:
        return
    if pl_module._trainer is not None and pl_module.trainer.state.fn == "fit":
        name = missing[0]
        alpha = float(state[f"{name.removesuffix('.a')}._extra_state"][0])
        raise ValueError(
            f"QATCallback: the checkpoint holds LoRA adapters, which the model lacks ({name}); add "
            f"LoRA(rank={state[name].shape[0]}, alpha={alpha:g}) after QATCallback to go on training, or load the "
            "merged weights, load_checkpoint(model, path), and train without ckpt_path"
        )
    checkpoint["state_dict"] = merged_state(state, own)
