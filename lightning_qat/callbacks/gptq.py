"""GPTQ: training starts from weights whose rounding errors compensate each other."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, final

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.attachment import averaged_models
from lightning_qat.callbacks.batches import check_loaders, flattened, named_loaders, prepared_batches
from lightning_qat.callbacks.run_length import is_resumed
from lightning_qat.callbacks.running import Forward, find_forward
from lightning_qat.callbacks.untouched import without_trace
from lightning_qat.conversion.gptq import Compensated, check_arguments, compensable, gptq
from lightning_qat.conversion.state import layers, quantizers
from lightning_qat.conversion.undisturbed import undisturbed_loaders
from lightning_qat.conversion.view import QUANTIZER_SUFFIX

_SHARDING: Final = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


@final
class GPTQ(pl.Callback):
    """Rounds the weights of linear layers by GPTQ before the first step; skipped on resume.

    See :func:`~lightning_qat.conversion.gptq` for what it does and which layers it leaves alone. Training goes on from
    there as always. It pays most for short training at 4 to 1.58 bits: the figures are in ``benchmarks/README.md``.
    It acts when training starts, after everything of fit start: the teacher of ``Distillation`` is the model as it was,
    ``BitAllocation`` has chosen its widths. Random numbers, loaders, statistics and loggers are left without a trace.

    Args:
        num_batches: batches per process, positive.
        dataloader: where they come from, by default the training data; several as a dict of dataloaders by name.
        forward: called with (module, batch); found as ``Calibration`` does if it is not given.
        damping: of the Gram matrix, relative to the mean of its diagonal; positive.
        rounds: groups of layers, in the order of the model, each of which costs a pass over the batches; positive.

    Attributes:
        compensated: what was done, by layer; empty before training starts and where nothing qualifies.

    Raises:
        TypeError: dataloaders that cannot be iterated.
        ValueError: numbers out of range; when training starts: a model that is not prepared, sharded weights, data that
            can be read only once, layers that no data reached.

    Source: GPTQ, arXiv:2210.17323.

    Example::

        trainer = L.Trainer(callbacks=[QATCallback(recipes.int2()), GPTQ(), Distillation()])
    """

    def __init__(
        self,
        num_batches: int = 16,
        dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        *,
        forward: Forward | None = None,
        damping: float = 0.01,
        rounds: int = 8,
    ) -> None:
        if not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(f"GPTQ: num_batches={num_batches!r} is not allowed; choose a positive integer")
        check_arguments(damping, rounds)
        check_loaders(dataloader, "GPTQ")
        self.num_batches, self.dataloader, self.forward = num_batches, dataloader, forward
        self.damping, self.rounds = damping, rounds
        self.compensated: dict[str, Compensated] = {}

    def __repr__(self) -> str:
        """Return an expression that evaluates back where no dataloader or function is held."""
        held = {"dataloader": self.dataloader, "forward": self.forward}
        parts = "".join(f", {name}={value!r}" for name, value in held.items() if value is not None)
        return f"GPTQ({self.num_batches}{parts}, damping={self.damping!r}, rounds={self.rounds!r})"

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if is_resumed(trainer):
            return  # the weights come from the checkpoint
        strategy = type(trainer.strategy).__name__
        if strategy in _SHARDING:
            raise ValueError(
                f"GPTQ: {strategy} shards the weights; run it in one process, or with DDP, and go on from there"
            )
        if not quantizers(pl_module):
            raise ValueError("GPTQ: the model is not quantized; add QATCallback(recipe) to the callbacks")
        targets = compensable(pl_module)
        if not targets:
            rank_zero_info("GPTQ: no linear layer has a stored scale of its weight; nothing was changed.")
            return
        with without_trace(pl_module):
            loaders = named_loaders(trainer, self.dataloader, "GPTQ")
            with undisturbed_loaders(flattened(loaders.values())), trainer.precision_plugin.forward_context():
                batches = [batch for _, batch in prepared_batches(trainer, pl_module, loaders, self.num_batches)]
                if not batches:
                    raise ValueError("GPTQ: no batches; give a dataloader that has some, or leave the callback out")
                run = self.forward or find_forward(pl_module, batches[0], "GPTQ")
                self.compensated = gptq(pl_module, batches, run, damping=self.damping, rounds=self.rounds)
        _tell_others(trainer, pl_module, self.compensated)
        rank_zero_info(self._summary())

    def _summary(self) -> str:
        """Return what was done, in a line."""
        before = sum(each.before for each in self.compensated.values()) / len(self.compensated)
        after = sum(each.after for each in self.compensated.values()) / len(self.compensated)
        changed = sum(each.changed for each in self.compensated.values()) / len(self.compensated)
        return (
            f"GPTQ: {len(self.compensated)} layers; mean error of their outputs {before:.3g} -> {after:.3g}, "
            f"{100 * changed:.0f} % of the weights round to another level."
        )


def _tell_others(trainer: "pl.Trainer", pl_module: nn.Module, names: Iterable[str]) -> None:
    """Give the other processes and averaged models the very same weights and scales."""
    own = layers(pl_module)
    for name in names:
        state = trainer.strategy.broadcast({key: value.cpu() for key, value in _state(own[name])})
        for model in (pl_module, *(averaged for _, averaged in averaged_models(trainer))):
            for key, value in _state(layers(model)[name]):
                value.copy_(state[key])


def _state(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield weight and stored scale of a layer, without gradient."""
    weight = module._parameters["weight"]
    scale: Any = module._modules["weight" + QUANTIZER_SUFFIX]
    assert weight is not None  # noqa: S101 - compensable() chose the layer
    yield "weight", weight.detach()
    yield "scale", scale.scale.detach()
