"""A copy of a baked model that holds integer codes instead of float weights and dequantizes them when it reads them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.export.source import Source
from lightning_qat.quantization.tensor import QuantizedTensor


def compress(source: Source) -> nn.Module:
    """Return the model with int8 codes, scales and zero points as buffers ``<weight>_codes`` and so on.

    The class of each owner becomes a subclass in which the weight is a property that dequantizes: the same numbers,
    computed in the graph, so that whatever traces the model keeps the codes.
    """
    model = copy.deepcopy(source.model)
    for name in (*source.weights, *source.aliases):
        weight = source.weights.get(source.aliases.get(name, name))
        if weight is None:
            continue
        owner, _, slot = name.rpartition(".")
        module = model.get_submodule(owner)
        del module._parameters[slot]
        for part, tensor in parts_of(weight).items():
            module.register_buffer(f"{slot}_{part}", tensor)
        module.__class__ = type(type(module).__name__, (type(module),), {slot: property(_reader(slot, weight))})
    return model.eval()


def parts_of(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of a quantized weight by the name of their field."""
    found = {"codes": weight.codes, "scale": weight.scale}
    return found if weight.zero_point is None else found | {"zero_point": weight.zero_point}


def _reader(slot: str, weight: QuantizedTensor) -> Any:
    def read(module: nn.Module) -> Tensor:
        return rebuilt(weight, {part: module._buffers[f"{slot}_{part}"] for part in parts_of(weight)}).dequantize()

    return read


def rebuilt(weight: QuantizedTensor, parts: dict[str, Any]) -> QuantizedTensor:
    """Return a quantized weight with other numbers and the same description."""
    return QuantizedTensor(
        parts["codes"], parts["scale"], parts.get("zero_point"), weight.offset, weight.grid, weight.granularity,
        weight.layout, weight.dtype,
    )  # fmt: skip


class _Recorder(nn.Module):
    """Stands in for a model and remembers what it is called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.args: tuple[Any, ...] | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        self.args, self.kwargs = args, kwargs
        return self.model(*args, **kwargs)


def example_arguments(source: Source) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which the model is called for the first batch.

    Raises:
        ValueError: no batches, or a forward that does not call the model itself.
    """
    if not source.batches:
        raise ValueError("export: this format traces the model and needs a real input; give batches=[one or more]")
    recorder = _Recorder(source.model)
    with torch.no_grad():
        source.forward(recorder, source.batches[0])
    if recorder.args is None:
        raise ValueError("export: forward= does not call the model; this format exports what model(...) computes")
    return recorder.args, recorder.kwargs
