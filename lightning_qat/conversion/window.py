"""Accumulation windows: a weight that does not change between two optimizer steps is quantized once."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.state import quantizers
from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.fused_linear import quantized_weight
from lightning_qat.functional.weight_only_linear import fits
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.window import Quantized, Window

_SHARDING: Final = ("FullyShardedDataParallel", "FSDPModule")


@contextmanager
def accumulation_window(model: nn.Module) -> Iterator[None]:
    """Quantize each weight of a prepared model once for all forward and backward passes inside.

    For several micro-batches per optimizer step, and for activation checkpointing, which computes forwards again.
    Results are the same, bit for bit. Kept is one quantized weight per layer, until the next step of an optimizer,
    ``train()``, ``eval()``, ``load_state_dict()``, ``.to()``, or the end of the context: inside, weights and
    learned scales must change in no other way. It acts on training with gradients in eager mode, on layers with the
    forward of ``nn.Linear``; under FSDP and with LoRA adapters, where no weight stays, it does nothing. ``QATCallback``
    opens windows by itself where ``accumulate_grad_batches`` exceeds 1.

    Args:
        model: prepared.

    Example::

        with accumulation_window(model):
            for batch in micro_batches:
                (loss_of(model, batch) / len(micro_batches)).backward()
        optimizer.step()
    """
    check_model("accumulation_window", model)
    with ExitStack() as stack:
        open_window(model, stack)
        yield


def open_window(model: nn.Module, stack: ExitStack) -> Window | None:
    """Open a window that optimizer steps empty and the end of a stack of contexts closes.

    Returns:
        The window, or None where there is one already, or nothing to keep.
    """
    found = quantizers(model).values()
    present = [quantizer.window for quantizer in found if quantizer.window is not None]
    if not found or present or _is_sharded(model):
        return None
    window = Window()

    def begin(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        window.paused = isinstance(optimizer, torch.optim.LBFGS)  # moves weights between the closures of one step

    def end(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        window.paused = False
        window.drop()

    stack.callback(register_optimizer_step_pre_hook(begin).remove)
    stack.callback(register_optimizer_step_post_hook(end).remove)
    stack.callback(_close, list(found), window)
    for quantizer in found:
        quantizer.window = window
    return window


def _close(owners: list[FakeQuantizer], window: Window) -> None:
    window.drop()
    for quantizer in owners:
        quantizer.window = None


def _is_sharded(model: nn.Module) -> bool:
    wrapped = any(kind.__name__ in _SHARDING for module in model.modules() for kind in type(module).__mro__)
    return wrapped or any(is_sharded(parameter) for parameter in model.parameters())


def kept_in_window(quantizer: FakeQuantizer, latent: Tensor, kind: tuple[Any, ...]) -> Quantized | None:
    """Return what the window of a quantizer keeps of a weight, if that is all that its product needs."""
    found = None if quantizer.window is None else quantizer.window.get(quantizer, latent, kind)
    if found is None or not found.complete:
        return None
    return found if found.setting.parameter is quantizer._parameters.get("scale") else None


def setting_in_window(
    quantizer: FakeQuantizer, latent: Tensor, value: Tensor, *, integer: bool, dtype: torch.dtype
) -> tuple[Tensor, Setting, Tensor | None]:
    """Return a weight as its scales broadcast to it, how it is quantized, and what the window keeps of it, or None.

    Args:
        quantizer: of the weight.
        latent: the parameter.
        value: what transforms made of it.
        integer: whether the product runs on integers.
        dtype: of the product.
    """
    if torch.compiler.is_compiling():  # before any look at a window, or opening one would compile anew
        return *quantizer.setting(value), None
    window = quantizer.window
    if window is None or not (quantizer.training and torch.is_grad_enabled()):
        return *quantizer.detached_setting(value), None
    if not isinstance(latent, nn.Parameter) or torch._C._are_functorch_transforms_active():
        return *quantizer.setting(value), None  # weight_norm and pruning: computed anew in each forward
    kind = integer, dtype, quantizer.present_softness
    found = kept_in_window(quantizer, latent, kind)
    if found is not None:
        return quantizer.grouped(value), found.setting, found.values
    found = window.get(quantizer, latent, kind)
    known = None if found is None else (found.setting.scale, found.setting.zero_point)
    weight, setting = quantizer.detached_setting(value, known)
    if found is None:
        with torch.no_grad():
            values = quantized_weight(weight, setting, integer=integer, dtype=dtype)
        outside = fits(setting)  # of the graph
        kept = setting if outside else replace(setting, scale=setting.scale.detach(), temperature=None)
        found = Quantized(latent, kind, kept, values, outside)
        window.keep(quantizer, found)
    return weight, setting, found.values
