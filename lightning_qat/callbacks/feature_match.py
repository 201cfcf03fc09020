"""FeatureMatch: layers inside the model that follow the teacher's, for Distillation."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_qat.callbacks.capture import check_ran, find_layers, find_tensor, module_names
from lightning_qat.losses import hidden_state_log_nmse
from lightning_qat.quantization._checks import check_positive
from lightning_qat.schedules import QuadraticRamp, Ramp

_LEADING: Final = QuadraticRamp(0.0, start=0.6)


@final
@dataclass(frozen=True)
class FeatureMatch:
    """Layers inside the model whose outputs follow the teacher's, too.

    It pays where the outputs say little, because targets have hardly any noise, and in short trainings of transformers
    with small batches; with large ones, and in networks of convolutions, it rather costs: ``benchmarks/README.md``.
    At fit start all that was compiled in the process is dropped, so that it is traced anew with what looks inside.

    Args:
        match: glob over dotted module names, such as ``"backbone.blocks.*.feedforward"``. None: the blocks of the
            model, by :func:`find_blocks`.
        loss: function of (student, teacher) outputs, :func:`lightning_qat.losses.hidden_state_log_nmse` or one of
            yours; ``mask`` is passed if it takes one. For :func:`lightning_qat.losses.attention_relation_loss` let
            ``select`` return the sequence of tensors: ``select=lambda qkv: qkv.chunk(3, dim=-1)``.
        weight: factor of the mean over the matched layers, not negative, also as a ramp over the run. By default 0.6
            (1 - t)^2: layers are led while rounding sets in, and in the end free to make up for each other's errors.
        select: takes what to compare from an output; by default as :class:`Distillation` does.
        fade_below: loss of the task, in its units, below which the weight falls in proportion to it; 0.1 served
            cross-entropies. None: it does not. Only in the first epoch, as that of `Distillation`. The logarithm in
            the default loss pulls however little is left to learn, and so would outweigh the task.

    Raises:
        TypeError: a match that is no text.
        ValueError: a negative weight, or a ``fade_below`` that is not positive.

    Source: the outputs of blocks as hints, arXiv:1909.10351 (TinyBERT), there for a smaller student.

    Example:
        >>> FeatureMatch().match is None, FeatureMatch("*.attention", weight=0.5).weight
        (True, 0.5)
    """

    match: str | None = None
    loss: Callable[..., Tensor] = hidden_state_log_nmse
    weight: float | Ramp = _LEADING
    select: Callable[[Any], Any] | None = None
    fade_below: float | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.match is not None and not isinstance(self.match, str):
            raise TypeError(f"FeatureMatch: match={self.match!r} is no glob over module names, such as '*.attention'")
        least, largest = self.weight.extremes if isinstance(self.weight, Ramp) else (self.weight, self.weight)
        if not 0 <= least <= largest < float("inf"):
            raise ValueError(f"FeatureMatch: weight={self.weight} is not allowed; choose a value that is not negative")
        if self.fade_below is not None:
            check_positive("FeatureMatch: fade_below", self.fade_below)

    def find_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers of a model by name.

        Raises:
            ValueError: it has none that match, or no blocks.
        """
        if self.match is not None:
            return find_layers(model, self.match, "FeatureMatch")
        blocks = find_blocks(model)
        rank_zero_info(f"Distillation: {len(blocks)} blocks follow the teacher's: {', '.join(blocks)}.")
        return blocks

    def mean_loss(
        self, names: Iterable[str], ours: dict[str, Any], theirs: dict[str, Any], mask: Tensor | None
    ) -> Tensor:
        """Return the mean loss over layers, without the weight.

        Args:
            names: of the layers.
            ours: what they returned in the student, by name.
            theirs: the same of the teacher.
            mask: which positions count, for losses that take one.

        Raises:
            ValueError: a layer that did not run in the student.
        """
        takes_mask = mask is not None and "mask" in inspect.signature(self.loss).parameters
        options = {"mask": mask} if takes_mask else {}
        select = self.select or find_tensor
        for name in names:
            check_ran(name, ours, f"FeatureMatch(match={self.match!r})")
        return torch.stack([self.loss(select(ours[name]), select(theirs[name]), **options) for name in names]).mean()


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a model by name: what it repeats, in the order of its modules.

    That is every entry with a matrix (a parameter of two dimensions or more) of its outermost ``nn.ModuleList`` or
    ``nn.Sequential``; of a sequence, where two or more entries have one.

    Raises:
        ValueError: it has none.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(
            f"{name}.".startswith(f"{b}.") for b in blocks
        ):
            prefix = f"{name}." if name else ""
            entries = {f"{prefix}{key}": child for key, child in module.named_children() if _has_matrix(child)}
            if len(entries) > (0 if isinstance(module, nn.ModuleList) else 1):
                blocks |= entries
    if not blocks:
        raise ValueError(
            f"Distillation: FeatureMatch() finds no blocks in {type(model).__name__}, neither an nn.ModuleList nor an "
            f"nn.Sequential of layers; name what to match, FeatureMatch('<glob>'): there are {module_names(model)[:8]}"
        )
    return blocks


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
