"""ActivationCheckpointing: modules compute their activations again in backward, while a fit lasts."""

from collections.abc import Iterable
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_qat.conversion.recompute import checked_globs, keep_activations, recompute_activations


@final
class ActivationCheckpointing(pl.Callback):
    """Saves memory for time: of what modules compute in training only their inputs stay until backward.

    Losses and gradients are the same, bit for bit. It costs one more forward pass of these modules. Made for ``LoRA``,
    whose frozen weights need neither gradient nor optimizer state, so that activations weigh more; in a loop of your
    own :func:`~lightning_qat.conversion.recompute_activations` does it. After the fit the model is as it was.

    Args:
        match: glob, or several, over dotted module names, such as ``"backbone.blocks.*"``; of modules within each other
            the outermost.

    Raises:
        TypeError: a pattern that is no text.
        ValueError: at fit start: a pattern that matches no module with a forward, or BatchNorm inside.

    Source: arXiv:1604.06174.

    Example:
        >>> ActivationCheckpointing("backbone.blocks.*")
        ActivationCheckpointing('backbone.blocks.*')
    """

    def __init__(self, match: str | Iterable[str]) -> None:
        globs = checked_globs(match, "ActivationCheckpointing")
        self.match: str | tuple[str, ...] = match if isinstance(match, str) else globs

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return f"ActivationCheckpointing({self.match!r})"

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        try:
            names = recompute_activations(pl_module, self.match)
        except ValueError as error:
            raise ValueError(str(error).replace("recompute_activations", "ActivationCheckpointing", 1)) from error
        rank_zero_info(f"ActivationCheckpointing: {len(names)} modules compute their activations again in backward.")

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        keep_activations(pl_module)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: Any, stage: str) -> None:
        keep_activations(pl_module)
