"""Capture: what a module computes inside a training step, for Distillation."""

import difflib
import fnmatch
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_qat.conversion.view import QUANTIZER_SUFFIX
from lightning_qat.losses import hidden_state_log_nmse
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

    Raises:
        TypeError: a match that is no text.
        ValueError: a negative weight.

    Source: the outputs of blocks as hints, arXiv:1909.10351 (TinyBERT), there for a smaller student.

    Example:
        >>> FeatureMatch().match is None, FeatureMatch("*.attention", weight=0.5).weight
        (True, 0.5)
    """

    match: str | None = None
    loss: Callable[..., Tensor] = hidden_state_log_nmse
    weight: float | Ramp = _LEADING
    select: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.match is not None and not isinstance(self.match, str):
            raise TypeError(f"FeatureMatch: match={self.match!r} is no glob over module names, such as '*.attention'")
        least, largest = self.weight.extremes if isinstance(self.weight, Ramp) else (self.weight, self.weight)
        if not 0 <= least <= largest < float("inf"):
            raise ValueError(f"FeatureMatch: weight={self.weight} is not allowed; choose a value that is not negative")

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


@final
@dataclass(frozen=True, eq=False)
class Call:
    """One forward of the student: of which module, on what, its output, and the outputs of layers inside it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    features: dict[str, Any] = field(default_factory=dict)


@contextmanager
def capturing(targets: dict[str, nn.Module], layers: dict[str, nn.Module]) -> Iterator[list[Call]]:
    """Collect the forwards of target modules that run with gradients inside the context, with what layers compute.

    Args:
        targets: modules by name.
        layers: modules inside of them, by name.
    """
    calls: list[Call] = []
    features: dict[str, Any] = {}
    done = features.clear if len(targets) == 1 else None  # several targets lie inside each other
    handles = [
        module.register_forward_hook(functools.partial(_add_call, calls, features, done, name), with_kwargs=True)
        for name, module in targets.items()
    ]
    handles += [
        module.register_forward_hook(functools.partial(_add_feature, features, n)) for n, module in layers.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _add_call(
    calls: list[Call], features: dict[str, Any], done: Callable[[], None] | None, name: str, module: nn.Module,
    args: tuple[Any, ...], kwargs: dict[str, Any], output: Any,
) -> None:  # fmt: skip
    if torch.is_grad_enabled():
        calls.append(Call(name, args, kwargs, output, dict(features)))
    if done is not None:
        done()


def _add_feature(features: dict[str, Any], name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    features[name] = output


@contextmanager
def capturing_features(layers: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Collect the outputs of modules by name."""
    features: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(functools.partial(_add_feature, features, n)) for n, module in layers.items()
    ]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def forget_compiled() -> None:
    """Let compiled code be traced anew: torch does not check whether hooks came after, and what lacks them would stay.

    See ``torch._dynamo.config.skip_nnmodule_hook_guards``.
    """
    if "torch._dynamo" in sys.modules:  # nothing is compiled before that
        torch.compiler.reset()


def find_tensor(output: Any) -> Tensor | None:
    """Return the tensor that an output is about, or None where that cannot be told.

    The output itself, its ``logits`` (attribute or key), the only floating tensor of a dict, or the first of a tuple.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = list(output.values()) if isinstance(output, dict) else output if isinstance(output, tuple | list) else []
    floats = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if isinstance(output, dict):
        return floats[0] if len(floats) == 1 else None
    return floats[0] if floats else None


def describe(output: Any) -> str:
    """Return what an output consists of, for messages."""
    if isinstance(output, dict):
        return f"a dict with the keys {list(output)}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {[type(value).__name__ for value in output]}"
    return f"a {type(output).__name__}"


def module_names(model: nn.Module) -> list[str]:
    """Return the dotted names of the modules that a user knows: without quantizers."""
    return [
        name
        for name, _ in model.named_modules()
        if name and not any(QUANTIZER_SUFFIX in part for part in name.split("."))
    ]


def close_names(wanted: str, names: Sequence[str]) -> list[str]:
    """Return up to eight candidates for a name, the most similar first."""
    return difflib.get_close_matches(wanted, names, n=8, cutoff=0.3) or list(names)[:8]


def find_module(model: nn.Module, name: str, argument: str) -> nn.Module:
    """Return a submodule.

    Raises:
        ValueError: naming the argument and similar names.
    """
    names = module_names(model)
    if name not in names:
        raise ValueError(
            f"Distillation: {argument}={name!r} is no module of {type(model).__name__}; "
            f"candidates: {close_names(name, names)}"
        )
    return model.get_submodule(name)


def find_layers(model: nn.Module, match: str, asked: str) -> dict[str, nn.Module]:
    """Return the modules whose dotted name matches a glob.

    Args:
        model: where to look.
        match: the glob.
        asked: the class that has it as its argument, for the message.

    Raises:
        ValueError: a pattern that matches nothing, with similar names.
    """
    names = module_names(model)
    found = {name: model.get_submodule(name) for name in names if fnmatch.fnmatchcase(name, match)}
    if not found:
        raise ValueError(
            f"Distillation: {asked}(match={match!r}) matches no module of {type(model).__name__}; "
            f"candidates: {close_names(match, names)}"
        )
    return found


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
