"""calibrate(): scales of inputs from data, without a trace elsewhere."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.sharding import find_scale_of
from lightning_qat.conversion.state import quantizers, refresh_scales
from lightning_qat.conversion.undisturbed import eagerly, evaluating, undisturbed_loaders, undisturbed_randomness
from lightning_qat.quantization.quantizer import FakeQuantizer


def stored_inputs(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Return the quantizers of inputs whose scale is stored, by dotted name."""
    return {name: q for name, q in quantizers(model).items() if q.layout.is_input and q.stored}


def uncalibrated(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Return the quantizers of inputs whose scale was never found."""
    return {name: quantizer for name, quantizer in stored_inputs(model).items() if quantizer.needs_calibration}


def calibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> dict[str, int]:
    """Find the stored scales of inputs from data.

    The model runs in evaluation mode without gradients, and eagerly where it is compiled. Random number generators
    (also those of a DataLoader and its samplers), training flags, BatchNorm statistics and gradients are unchanged
    afterwards. All processes of a distributed run end with equal scales, found from the data of all.

    Args:
        model: a prepared model.
        batches: what to run; tensors must be on the model's device.
        forward: called with (model, batch). By default a dict is passed as keywords, and of a tuple or list the first
            element.

    Returns:
        The number of batches that each quantizer saw, by dotted name; empty where nothing is to be calibrated.

    Raises:
        TypeError: if model is no module.
        ValueError: no batches, or layers that saw no data.
    """
    check_model("calibrate", model)
    return find_input_scales(model, stored_inputs(model), batches, forward)


def find_input_scales(
    model: nn.Module,
    targets: dict[str, FakeQuantizer],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, int]:
    """Do what :func:`calibrate` does for some of the quantizers of a model, by dotted name; the others stay."""
    if not targets:
        return {}
    refresh_scales(model)
    run = forward or default_forward
    with undisturbed_randomness(), undisturbed_loaders([batches]), evaluating(model), eagerly(model), torch.no_grad():
        try:
            for quantizer in targets.values():
                quantizer.observer = quantizer.new_observer()
            for batch in batches:
                run(model, batch)
            return _finish(targets)
        finally:
            for quantizer in targets.values():
                quantizer.observer = None


def _finish(targets: dict[str, FakeQuantizer]) -> dict[str, int]:
    seen: dict[str, int] = {}
    for name, quantizer in targets.items():
        assert quantizer.observer is not None  # noqa: S101 - calibrate() set it
        quantizer.observer.synchronize()
        seen[name] = quantizer.observer.num_batches
    blind = [name for name, count in seen.items() if not count]
    if blind:
        raise ValueError(
            f"calibrate: no finite data reached {', '.join(blind[:5])} in the calibration batches; pass more batches "
            "or a forward= that uses the layer, or leave its input in float with a rule"
        )
    for quantizer in targets.values():
        find_scale_of(quantizer)
    return seen


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a dict as keywords, of a tuple or list the first element, else the batch itself."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def calibration_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the scales and zero points of inputs by dotted name, for an artifact."""
    state: dict[str, Tensor] = {}
    for name, quantizer in stored_inputs(model).items():
        state[f"{name}.scale"] = quantizer.scale.detach().clone()
        if quantizer.zero_point is not None:
            state[f"{name}.zero_point"] = quantizer.zero_point.clone()
    return state


@torch.no_grad()
def load_calibration_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Set the scales and zero points of inputs from an artifact.

    Raises:
        ValueError: quantizers that the artifact lacks, or entries that the model lacks.
    """
    expected = calibration_state(model)
    if expected.keys() != state.keys():
        missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        raise ValueError(f"calibration artifact: missing {missing[:5]}, unexpected {extra[:5]}; it is of another model")
    for name, quantizer in stored_inputs(model).items():
        quantizer.scale.copy_(state[f"{name}.scale"])
        if quantizer.zero_point is not None:
            quantizer.zero_point.copy_(state[f"{name}.zero_point"])
        quantizer.calibrated = True
