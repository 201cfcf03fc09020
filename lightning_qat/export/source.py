"""What back ends read: a baked model, its integer codes, and everything else by name."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.bake import bake, codes
from lightning_qat.conversion.baked_input import BAKED_INPUT
from lightning_qat.conversion.calibrate import default_forward
from lightning_qat.conversion.prepare import prepared_state
from lightning_qat.conversion.restore import InputDescription, describe_inputs, strip_baked
from lightning_qat.export.errors import RefusedError
from lightning_qat.quantization.recipe import to_plain
from lightning_qat.quantization.tensor import QuantizedTensor

Forward = Callable[[nn.Module, Any], Any]


@final
@dataclass(frozen=True, eq=False)
class Source:
    """A trained model in the form in which back ends read it.

    Args:
        model: baked, in evaluation mode.
        weights: integer codes by dotted parameter name; tied weights once.
        inputs: what happens to inputs, by dotted module name.
        floats: every other tensor of the ``state_dict``; tied ones once.
        aliases: names of tied entries, and the name that holds their values.
        recipe: plain data, or None where the model was given baked.
        batches: real inputs, possibly none.
        forward: called with (model, batch).
    """

    model: nn.Module
    weights: Mapping[str, QuantizedTensor]
    inputs: Mapping[str, InputDescription]
    floats: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    recipe: dict[str, Any] | None
    batches: tuple[Any, ...] = ()
    forward: Forward = default_forward

    @property
    def float_bytes(self) -> int:
        """Size of the ``state_dict`` in float, tied entries once."""
        floats = sum(tensor.nbytes for tensor in self.floats.values())
        return floats + sum(w.codes.numel() * w.dtype.itemsize for w in self.weights.values())

    def with_values(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return a runnable copy of the model with the tensors of a file in the place of its weights and floats."""
        model = blank(self.model, strip=False)
        tensors = dict(state) | {name: state[first] for name, first in self.aliases.items()}
        result = model.load_state_dict(tensors, strict=False)
        missing = [name for name in result.missing_keys if BAKED_INPUT not in name.split(".")]
        assert not missing, missing  # noqa: S101 - a back end reads all that it wrote
        return model.eval()


def read_source(model: nn.Module, batches: Iterable[Any] | None = None, forward: Forward | None = None) -> Source:
    """Bake a prepared model, or take a baked one, and sort its tensors.

    Args:
        model: prepared or baked; it stays as it is.
        batches: real inputs for verification and tracing.
        forward: called with (model, batch); the default is that of ``calibrate``.

    Raises:
        ValueError: a model that is neither prepared nor baked.
        TypeError: one batch in the place of several.
        RefusedError: state that is no tensor.
    """
    check_model("export", model)
    if isinstance(batches, Tensor | Mapping | str):
        raise TypeError(
            f"export: batches= takes a list of batches, here is one {type(batches).__name__}; give batches=[it]"
        )
    state = prepared_state(model)
    recipe = None if state is None else to_plain(state.recipe)
    baked = bake(model) if state is not None else copy.deepcopy(model)
    weights = codes(baked)
    baked.eval()
    floats, aliases = _other_tensors(baked, weights)
    return Source(
        baked, weights, describe_inputs(baked), floats, aliases, recipe,
        () if batches is None else tuple(batches), forward or default_forward,
    )  # fmt: skip


def _other_tensors(
    baked: nn.Module, weights: Mapping[str, QuantizedTensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    first: dict[int, str] = {}
    floats: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in baked.state_dict(keep_vars=True).items():
        if BAKED_INPUT in name.split("."):
            continue
        if not isinstance(value, Tensor):
            raise RefusedError(
                f"{name}: {type(value).__name__} in the state_dict is no tensor; only tensors are exported"
            )
        if id(value) in first:
            aliases[name] = first[id(value)]
            continue
        first[id(value)] = name
        if name not in weights:
            floats[name] = value.detach()
    return floats, aliases


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU, contiguous, and none a view of another's memory, which safetensors would refuse."""
    found, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        found[name] = value.clone() if memory in seen else value
        seen.add(memory)
    return found


def blank(baked: nn.Module, *, strip: bool = True) -> nn.Module:
    """Return a copy of a baked model without its values, as if it were freshly built.

    What is not in the ``state_dict`` stays: it comes from the constructor.

    Args:
        baked: the model.
        strip: also take away what bake() put around it: codes and quantized inputs.
    """
    copied = copy.deepcopy(baked)
    plain = strip_baked(copied) if strip else copied
    with torch.no_grad():
        for name, tensor in plain.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and BAKED_INPUT not in name.split("."):
                tensor.fill_(float("nan"))
    return plain
