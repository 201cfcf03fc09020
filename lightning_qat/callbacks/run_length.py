"""How long a run will be, how much of it is done, and whether it goes on from a checkpoint."""

from pathlib import Path
from typing import Final

import lightning.pytorch as pl

_TUNERS: Final = (".lr_find_", ".scale_batch_size_")


def is_resumed(trainer: "pl.Trainer") -> bool:
    """Whether a run goes on from a checkpoint of the user.

    ``LearningRateFinder`` and ``BatchSizeFinder`` restore one of their own at fit start, and its path stays.
    """
    return trainer.ckpt_path is not None and not Path(str(trainer.ckpt_path)).name.startswith(_TUNERS)


def run_length(trainer: "pl.Trainer", unit: str) -> float | None:
    """Return the number of epochs or optimizer steps (``trainer.global_step``) of the run; None where it has no end.

    With several optimizers each of their steps counts, as if each stepped once per batch. Steps are counted on the
    training data, which makes Lightning set them up: on resume not before ``on_train_start``, because data that are set
    up before the loops are restored start the epoch again.

    Args:
        trainer: that fits.
        unit: ``"epoch"`` or ``"step"``.
    """
    if unit == "epoch":
        return _finite(trainer.max_epochs)
    total = trainer.estimated_stepping_batches
    if not trainer.lightning_module.automatic_optimization:
        total *= len(trainer.optimizers)
    return _finite(min(total, trainer.max_steps) if trainer.max_steps >= 0 else total)


def num_steps(trainer: "pl.Trainer", who: str) -> float:
    """Return the number of optimizer steps of the run.

    Raises:
        ValueError: the run has no end; in the words of the callback ``who``.
    """
    total = run_length(trainer, "step")
    if not total:
        raise ValueError(
            f"{who} follows the share of the run that is done, but the run has no end: give Trainer(max_steps=...), or "
            "max_epochs=... with data of known length"
        )
    return total


def _finite(total: float | None) -> float | None:
    return None if total is None or total < 0 or total == float("inf") else total
