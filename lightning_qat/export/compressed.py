"""A copy of a baked model that holds integer codes instead of float weights and dequantizes them when it reads them."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.conversion.baked_linear import multiply_floats
from lightning_qat.conversion.derived import derive
from lightning_qat.export.source import Source
from lightning_qat.quantization.tensor import QuantizedTensor


def compress(source: Source) -> nn.Module:
    """Return the model with int8 codes, scales and zero points as buffers ``<weight>_codes`` and so on.

    The class of each owner becomes a subclass in which the weight is a property that dequantizes: the same numbers,
    computed in the graph, so that whatever traces the model keeps the codes.
    """
    model = copy.deepcopy(source.model)
    for module in model.modules():
        multiply_floats(module)  # tracing takes float products in any case; codes of the others would lie there twice
    for name in (*source.weights, *source.aliases):
        weight = source.weights.get(source.aliases.get(name, name))
        if weight is None:
            continue
        owner, _, slot = name.rpartition(".")
        module = model.get_submodule(owner)
        del module._parameters[slot]
        for part, tensor in parts_of(weight).items():
            module.register_buffer(f"{slot}_{part}", tensor)
        module.__class__ = derive(type(module), {slot: property(_reader(slot, weight))})
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


def standing_in(model: nn.Module, call: Callable[..., Any]) -> nn.Module:
    """Return a shallow copy of a model that computes something else when it is called.

    Its other methods, such as ``predict_step``, are the model's own, so that whatever runs the model runs this, too.

    Args:
        model: stays as it is.
        call: takes the arguments of the model's ``forward``; the model's hooks are its affair.
    """
    stand = copy.copy(model)
    hooks: dict[str, Any] = {
        name: OrderedDict() for name, value in vars(model).items() if "forward" in name and name.endswith("hooks")
    }
    vars(stand).update(hooks, forward=call, _compiled_call_impl=None)
    return stand


def example_arguments(source: Source) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which the model is called for the first batch.

    Raises:
        ValueError: no batches, or a forward that does not call the model itself.
    """
    if not source.batches:
        raise ValueError("export: this format traces the model and needs a real input; give batches=[one or more]")
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return source.model(*args, **kwargs)

    with torch.no_grad():
        source.forward(standing_in(source.model, record), source.batches[0])
    if not seen:
        raise ValueError("export: forward= does not call the model; this format exports what model(...) computes")
    return seen[0]
