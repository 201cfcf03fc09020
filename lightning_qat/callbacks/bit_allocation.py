"""BitAllocation: gives each layer the width that the data ask for, at fit start."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.callbacks.allocation_figure import draw_allocation, markdown
from lightning_qat.callbacks.attachment import own_method
from lightning_qat.callbacks.batches import check_loaders, flattened, named_loaders, prepared_batches
from lightning_qat.callbacks.bit_width import BitWidth, averaged_models
from lightning_qat.callbacks.run_length import is_resumed
from lightning_qat.callbacks.running import call_module, num_positional
from lightning_qat.callbacks.tensorboard import writers
from lightning_qat.callbacks.untouched import without_trace
from lightning_qat.conversion.allocate import CANDIDATES, check_measure, check_request, escaped, find_allocation
from lightning_qat.conversion.allocation import Allocation
from lightning_qat.conversion.regrid import regrid
from lightning_qat.conversion.sensitivity import Forward, OutputDivergence, Sensitivity
from lightning_qat.conversion.undisturbed import undisturbed_loaders
from lightning_qat.quantization.grid import Grid
from lightning_qat.quantization.recipe import Recipe

_SHARDING: Final = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


@final
class BitAllocation(pl.Callback):
    """Gives each layer of a prepared model the width at which the model suffers least, for a number of bits.

    At fit start each layer is quantized alone at each candidate width, the change is measured on training data that
    pass the module's own preprocessing, and an integer program chooses; see
    :func:`~lightning_qat.conversion.allocate_bits`. It costs (1 + layers x candidates) forward passes per batch and
    leaves no trace in random numbers, loaders, statistics or loggers. Then weights get their grids, and scales are
    found anew. All processes of a distributed run measure their share of the data and choose alike.

    The table is printed and logged: bits and sensitivities as scalars under ``quantization/allocation/`` in any logger,
    and in TensorBoard also as text and figure. Grids are part of checkpoints and exports. A resumed run keeps what was
    chosen. List it before ``Calibration``, which then sees the chosen weights.

    Args:
        average_bits: the most bits of codes per weight, on average over the layers that take part; above 0, up to 8.
        candidates: two or more: bits of the family of the recipe, or grids.
        num_batches: batches per process, positive.
        dataloader: where they come from, by default the training data; several as a dict of dataloaders by name.
        sensitivity: what is measured; ``OutputDivergence()`` by default, for models that return logits.
        forward: called with (module, batch); returns logits, or the loss where ``sensitivity`` needs it. By default the
            module is called with what its ``forward`` takes of a batch, or its ``training_step`` gives the loss.
        match: glob over dotted layer names: which layers take part.
        path: JSON file to write the table to, with a figure beside it (.png); a relative one in the trainer's
            ``default_root_dir``. Nothing is written by ``fast_dev_run``.

    Attributes:
        allocation: the table and what was chosen, or None before fit start.

    Raises:
        TypeError: a candidate that is neither bits nor a grid; no list of them; a sensitivity of another kind;
            dataloaders that cannot be iterated.
        ValueError: numbers out of range. At fit start: a model that is not prepared, a width that a layer cannot have
            or another callback sets, too, an average that no choice reaches, no batches, sharded weights, a checkpoint
            of a run without allocation.

    Source: HAWQ-V3, arXiv:2011.10680 (the integer program), with measured sensitivities.

    Example::

        trainer = L.Trainer(callbacks=[QATCallback(recipes.int4()), BitAllocation(3.0)])
    """

    def __init__(
        self,
        average_bits: float,
        candidates: Sequence[int | Grid] = CANDIDATES,
        *,
        num_batches: int = 4,
        dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        sensitivity: Sensitivity | None = None,
        forward: Forward | None = None,
        match: str = "*",
        path: str | Path | None = None,
    ) -> None:
        if not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(f"BitAllocation: num_batches={num_batches!r} is not allowed; choose a positive integer")
        _check_request(average_bits, candidates)
        check_measure(sensitivity, "BitAllocation")
        check_loaders(dataloader, "BitAllocation")
        self.average_bits, self.candidates, self.num_batches = average_bits, tuple(candidates), num_batches
        self.dataloader, self.forward = dataloader, forward
        self.sensitivity = sensitivity or OutputDivergence()
        self.bit_width = BitWidth(match, False, "BitAllocation")
        self.path = None if path is None else Path(path)
        self.allocation: Allocation | None = None

    def __repr__(self) -> str:
        """Return an expression that evaluates back where no dataloader or function is held."""
        held = {"dataloader": self.dataloader, "forward": self.forward}
        parts = [f", {name}={value!r}" for name, value in held.items() if value is not None]
        path = None if self.path is None else str(self.path)
        return (
            f"BitAllocation({self.average_bits!r}, {self.candidates!r}, num_batches={self.num_batches}"
            f"{''.join(parts)}, sensitivity={self.sensitivity!r}, match={self.bit_width.match!r}, path={path!r})"
        )

    @property
    def state_key(self) -> str:
        """Tell several allocations for parts of one model apart."""
        return self._generate_state_key(match=self.bit_width.match)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"allocation": None if self.allocation is None else self.allocation.to_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        stored = state_dict["allocation"]
        self.allocation = None if stored is None else Allocation.from_dict(stored)

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self.allocation = None  # of another run; a checkpoint brings its own after this hook

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.bit_width.check(trainer, pl_module, self.candidates)
        if is_resumed(trainer):
            return  # the grids come with the weights
        _refuse_shards(trainer)
        try:
            found = self._find(trainer, pl_module)
        except ValueError as error:
            raise ValueError(f"BitAllocation: {error}") from error
        self.allocation = Allocation.from_dict(trainer.strategy.broadcast(found.to_dict()))
        for model in (pl_module, *averaged_models(trainer)):
            for layer, grid in self.allocation.grids.items():
                regrid(model, grid, match=escaped(layer))
        rank_zero_info(f"BitAllocation:\n{self.allocation}")
        self._publish(trainer, self.allocation)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.allocation is None:
            raise ValueError(
                "BitAllocation: ckpt_path is a checkpoint of a run without BitAllocation, and its grids would stay as "
                "they are. Load its weights, load_checkpoint(model, path), and call trainer.fit(model) without "
                "ckpt_path, or leave the callback out"
            )
        if self.allocation.limit != self.average_bits:
            rank_zero_warn(
                f"BitAllocation: average_bits={self.average_bits:g} is given, but the checkpoint was allocated for "
                f"{self.allocation.limit:g}, which stays"
            )

    def _find(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Allocation:
        def gather(sums: Tensor) -> Tensor:
            reduced: Tensor = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum")
            return reduced.cpu()

        loaders = named_loaders(trainer, self.dataloader, "BitAllocation")
        with (
            without_trace(pl_module),
            undisturbed_loaders(flattened(loaders.values())),
            trainer.precision_plugin.forward_context(),
        ):
            batches = (batch for _, batch in prepared_batches(trainer, pl_module, loaders, self.num_batches))
            return find_allocation(
                pl_module, batches, average_bits=self.average_bits, candidates=self.candidates,
                sensitivity=self.sensitivity, forward=self.forward or self._default_forward(pl_module),
                match=self.bit_width.match, gather=gather if trainer.world_size > 1 else None,
            )  # fmt: skip

    def _default_forward(self, pl_module: "pl.LightningModule") -> Forward:
        if not self.sensitivity.needs_loss:
            return _returned
        if not pl_module.automatic_optimization:
            raise ValueError(
                "training_step optimizes by hand; pass forward=lambda module, batch: ... that returns the loss, or "
                "choose sensitivity=OutputDivergence()"
            )
        return _loss_of(own_method(pl_module, "training_step"))

    def _publish(self, trainer: "pl.Trainer", allocation: Allocation) -> None:
        values = {"quantization/allocation/average_bits": allocation.average_bits}
        for names, specs, costs, chosen in zip(
            allocation.layers, allocation.specs, allocation.sensitivities, allocation.chosen, strict=True
        ):
            prefix = f"quantization/allocation/{names[0]}"
            values[f"{prefix}/bits"] = specs[chosen].grid.bits_per_weight
            values |= {f"{prefix}/sensitivity_{spec.grid.label}": cost for spec, cost in zip(specs, costs, strict=True)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=0)
        for writer in writers(trainer.loggers):
            writer.add_text("quantization/allocation", markdown(allocation), 0)
            writer.add_figure("quantization/allocation", draw_allocation(allocation), 0, close=False)
        if self.path is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(trainer.default_root_dir) / self.path
            path.parent.mkdir(parents=True, exist_ok=True)
            allocation.save(path)
            draw_allocation(allocation).savefig(path.with_suffix(".png"))


def _check_request(average_bits: float, candidates: Sequence[object]) -> None:
    if isinstance(candidates, Sequence) and any(isinstance(candidate, Recipe) for candidate in candidates):
        raise TypeError(
            "BitAllocation: a recipe is no candidate here, because the model is prepared already; give bits or grids, "
            "or train by the recipe that allocate_bits() returns, QATCallback(recipe)"
        )
    try:
        check_request(average_bits, candidates)
    except TypeError as error:
        raise TypeError(f"BitAllocation: {error}") from None
    except ValueError as error:
        raise ValueError(f"BitAllocation: {error}") from None


def _refuse_shards(trainer: "pl.Trainer") -> None:
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if any(kind in _SHARDING for kind in kinds):
        raise ValueError(
            f"BitAllocation: {kinds[0]} spreads weights over processes; find the recipe on one process, "
            "allocate_bits(model, batches, ...), and train by it, QATCallback(recipe)"
        )


def _returned(module: nn.Module, batch: Any) -> Any:
    try:
        return call_module(module, batch)
    except Exception as error:
        raise ValueError(
            f"cannot tell how to run {type(module).__name__} on a training batch of type {type(batch).__name__}; pass "
            f"forward=lambda module, batch: module(...) ({type(error).__name__}: {error})"
        ) from error


def _loss_of(training_step: Callable[..., Any]) -> Forward:
    takes_index = num_positional(training_step)[1] > 1

    def loss(module: nn.Module, batch: Any) -> Any:
        return training_step(batch, 0) if takes_index else training_step(batch)

    return loss
