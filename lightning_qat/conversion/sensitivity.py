"""How much a model suffers when one layer alone is quantized: the measures that bit allocation can go by."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.conversion.state import refresh_scales
from lightning_qat.conversion.undisturbed import eagerly, evaluating, undisturbed_loaders, undisturbed_randomness
from lightning_qat.conversion.undo import float_weights
from lightning_qat.conversion.view import QUANTIZER_SUFFIX
from lightning_qat.quantization.quantizer import FakeQuantizer

Forward = Callable[[nn.Module, Any], Any]
Trial = dict[tuple[nn.Module, str], FakeQuantizer]
"""What quantizes the weights of one layer in a trial: by module and name of the parameter."""


class Sensitivity(ABC):
    """A frozen value that says how sensitivity is measured, one number per layer and candidate: smaller is better."""

    needs_loss: ClassVar[bool] = False
    """Whether the model is run for its loss instead of its output."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What the numbers are, for tables."""

    @abstractmethod
    def on_batch(self, run: Callable[[], Any], trials: list[list[Trial]]) -> Tensor:
        """Return the numbers on one batch, float64 [layers, candidates].

        Args:
            run: runs the model on the batch; in float, unless a trial is :func:`in_place`.
            trials: by layer and candidate.
        """


@contextmanager
def in_place(trial: Trial) -> Iterator[None]:
    """Let the weights of one layer be quantized as a trial says, inside."""
    before = {(module, slot): module._modules[slot + QUANTIZER_SUFFIX] for module, slot in trial}
    try:
        for (module, slot), quantizer in trial.items():
            module._modules[slot + QUANTIZER_SUFFIX] = quantizer
        yield
    finally:
        for (module, slot), present in before.items():
            module._modules[slot + QUANTIZER_SUFFIX] = present


@torch.no_grad()
def _compared(run: Callable[[], Any], trials: list[list[Trial]], compare: Callable[[Any, Any], Tensor]) -> Tensor:
    """Compare what the model returns with each layer quantized alone with what it returns in float."""
    reference, rows = run(), []
    for candidates in trials:
        row = []
        for trial in candidates:
            with in_place(trial):
                row.append(compare(reference, run()).double().cpu())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def output_tensor(output: Any) -> Tensor:
    """Return what a model returns if it is one tensor of floating point, or the ``logits`` of an object or dict.

    Raises:
        TypeError: neither.
    """
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = f"{found.dtype} tensor" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(
            f"sensitivity: the model returned a {kind}, not a tensor of logits or predictions; pass "
            "forward=lambda model, batch: ... that returns one"
        )
    return found if found.dtype == torch.float64 else found.float()


@final
@dataclass(frozen=True)
class OutputDivergence(Sensitivity):
    r"""Kullback-Leibler divergence of the output, :math:`KL(p_{float} \| p_{quantized})` in nats per prediction.

    The output are logits. No labels are needed; near a minimum of the likelihood it is the expected change of the loss.

    Args:
        dim: of the classes, in the output.

    Source: the sensitivity of ZeroQ, arXiv:2001.00281, here one layer and one width at a time.
    """

    dim: int = -1

    @property
    @override
    def label(self) -> str:
        return "divergence of the output in nats"

    @override
    def on_batch(self, run: Callable[[], Any], trials: list[list[Trial]]) -> Tensor:
        return _compared(run, trials, self._divergence)

    def _divergence(self, reference: Any, quantized: Any) -> Tensor:
        before, after = output_tensor(reference), output_tensor(quantized)
        if before.dim() == 0 or before.shape[self.dim] < 2:
            raise ValueError(
                f"OutputDivergence: the output of shape {list(before.shape)} has no classes in dimension {self.dim}; "
                "choose dim=, or OutputError() for outputs that are no logits"
            )
        p, q = before.log_softmax(self.dim), after.log_softmax(self.dim)
        return F.kl_div(q, p, reduction="none", log_target=True).sum(self.dim, dtype=torch.float64).mean()


@final
@dataclass(frozen=True)
class OutputError(Sensitivity):
    """Squared change of the output, relative to the variance of the output in float: for regression.

    Source: the reciprocal of the signal-to-noise ratio of the output, by which arXiv:2302.05397 ranks layers.
    """

    @property
    @override
    def label(self) -> str:
        return "squared error of the output / its variance"

    @override
    def on_batch(self, run: Callable[[], Any], trials: list[list[Trial]]) -> Tensor:
        return _compared(run, trials, _relative_error)


def _relative_error(reference: Any, quantized: Any) -> Tensor:
    before, after = output_tensor(reference).double(), output_tensor(quantized).double()
    spread = (before - before.mean()).square().mean()
    return (after - before).square().mean() / spread.clamp(min=torch.finfo(torch.float64).tiny)


@final
@dataclass(frozen=True)
class LossChange(Sensitivity):
    """Change of the loss. Sees the labels, and so also the noise of few batches: it may be negative.

    Source: the definition, of which HAWQ-V3, arXiv:2011.10680 section 3.4, takes the second order.
    """

    needs_loss: ClassVar[bool] = True

    @property
    @override
    def label(self) -> str:
        return "change of the loss"

    @override
    def on_batch(self, run: Callable[[], Any], trials: list[list[Trial]]) -> Tensor:
        return _compared(run, trials, lambda before, after: loss_tensor(after).double() - loss_tensor(before).double())


def loss_tensor(output: Any) -> Tensor:
    """Return the loss that a run returned: a tensor of one element, or the ``loss`` of an object or dict.

    Raises:
        TypeError: neither.
    """
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", output)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise TypeError(
            f"sensitivity: the model returned a {type(found).__name__}, not a loss; pass "
            "forward=lambda model, batch: ... that returns the loss, a tensor of one element"
        )
    return found.reshape(())


@final
@dataclass(frozen=True)
class FisherError(Sensitivity):
    r"""Second order: :math:`\frac{1}{2} \sum_i g_i^2 (\hat{w}_i - w_i)^2`, g the gradient of the loss of a batch.

    One backward pass per batch for all layers and candidates. The squared gradient estimates the diagonal of the Fisher
    information, up to a factor (the batch size) that all layers share.

    Source: the diagonal second order of optimal brain damage, with the squared gradient in the place of the Hessian as
    in FIT, arXiv:2210.08502; deviations: gradients of batches instead of samples, and element by element.
    """

    needs_loss: ClassVar[bool] = True

    @property
    @override
    def label(self) -> str:
        return "squared gradient x squared error / 2"

    @override
    def on_batch(self, run: Callable[[], Any], trials: list[list[Trial]]) -> Tensor:
        gradients, rows = _gradients(run, trials), []
        with torch.no_grad():
            for candidates, weights in zip(trials, gradients, strict=True):
                rows.append(torch.stack([_weighted_error(trial, weights) for trial in candidates]))
        return torch.stack(rows)


_Gradients = dict[tuple[nn.Module, str], tuple[Tensor, Tensor]]


@torch.enable_grad()
def _gradients(run: Callable[[], Any], trials: list[list[Trial]]) -> list[_Gradients]:
    """Return for each layer the transformed weights and the gradients of the loss with respect to them."""
    read: dict[FakeQuantizer, list[Tensor]] = {}

    def unquantized(quantizer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = args[0].detach().requires_grad_()
        read.setdefault(quantizer, []).append(leaf)
        return leaf

    with ExitStack() as stack:
        for layer in trials:
            stack.enter_context(in_place(layer[0]))
            for quantizer in set(layer[0].values()):
                stack.callback(quantizer.register_forward_hook(unquantized).remove)
        loss = loss_tensor(run())
    leaves = [leaf for found in read.values() for leaf in found]
    if not leaves or not loss.requires_grad:
        raise ValueError("FisherError: no gradient of the loss reaches a weight; use OutputDivergence()")
    flat = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
    total: dict[FakeQuantizer, tuple[Tensor, Tensor]] = {}
    for quantizer, found in read.items():
        parts = [torch.zeros_like(leaf) if (g := next(flat)) is None else g for leaf in found]
        total[quantizer] = found[0].detach(), torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return [{key: total[q] for key, q in layer[0].items() if q in total} for layer in trials]


def _weighted_error(trial: Trial, weights: _Gradients) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for key in {quantizer: key for key, quantizer in trial.items() if key in weights}.values():  # a tied weight: once
        weight, gradient = weights[key]
        total += 0.5 * (gradient.double() * (trial[key](weight) - weight).double()).square().sum().cpu()
    return total


def measure_sensitivity(
    model: nn.Module, trials: list[list[Trial]], batches: Iterable[Any], run: Forward, measure: Sensitivity
) -> tuple[Tensor, int]:
    """Return the sums of a measure over batches, float64 [layers, candidates], and the number of batches.

    The model runs in evaluation mode, eagerly, and in float but for one layer at a time; inputs are not quantized.
    Afterwards it is as it was, as are random number generators and loaders.

    Args:
        model: prepared.
        trials: by layer and candidate.
        batches: what to run; tensors must be on the model's device.
        run: called with (model, batch); returns the output, or the loss where the measure needs it.
        measure: how sensitivity is measured.
    """
    refresh_scales(model)
    total, num_batches = torch.zeros(len(trials), len(trials[0]), dtype=torch.float64), 0
    with undisturbed_randomness(), undisturbed_loaders([batches]), evaluating(model), eagerly(model):
        for batch in batches:
            with float_weights(model):
                total += measure.on_batch(partial(run, model, batch), trials)
            num_batches += 1
    return total, num_batches
