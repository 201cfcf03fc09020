"""Which weights a module has, how their dimensions are read, and what stands in the way of quantizing them."""

import inspect
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from lightning_qat.conversion.view import ADAPTER_SUFFIX, INPUT_QUANTIZER, QUANTIZER_SUFFIX, view_names
from lightning_qat.quantization.granularity import Layout
from lightning_qat.quantization.recipe import CONVOLUTIONS

_TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS: Final = (nn.Embedding, nn.EmbeddingBag)
_PACKED: Final = ("in_proj_weight",)
_SEPARATE: Final = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_CELL: Final = ("weight_ih", "weight_hh")
_TOKENS: Final = Layout(None, 1)
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

QUANTIZER_NAMES: Final = frozenset(
    [INPUT_QUANTIZER, *(name + QUANTIZER_SUFFIX for name in ("weight", *_PACKED, *_SEPARATE, *_CELL))]
    + [name + ADAPTER_SUFFIX for name in ("weight", *_PACKED, *_SEPARATE, *_CELL)]
)
"""Names of the children that prepare() and add_lora() register; a user's module may be called ``vector_quantizer``."""


@final
@dataclass(frozen=True)
class Slots:
    """The quantizable weights of a module.

    Args:
        names: parameter names.
        weight: how the weights are read.
        input: how the input is read, or None where it cannot be quantized.
        in_features: width of the input that transforms act on, or None where it is not one number.
        arguments: names of the forward's leading arguments that make up the input.
        no_input: why the input cannot be quantized.
        unreachable: whether the module's forward is never called, so that its input stays as it is.
    """

    names: tuple[str, ...]
    weight: Layout
    input: Layout | None
    in_features: int | None = None
    arguments: tuple[str, ...] = ("input",)
    no_input: str = ""
    unreachable: bool = False


def slots_of(module: nn.Module) -> Slots | None:
    """Return the quantizable weights of a module, or None if it has none that we know."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if isinstance(module, nn.MultiheadAttention):
        packed = module._qkv_same_embed_dim
        width, names = (module.embed_dim, _PACKED) if packed else (None, _SEPARATE)
        return Slots(names, Layout(0), _TOKENS, width, ("query", "key", "value"))
    if isinstance(module, CONVOLUTIONS):
        axis = 1 if isinstance(module, _TRANSPOSED) else 0
        return Slots(("weight",), Layout(axis), Layout(None, len(module.kernel_size) + 1), None, _arguments(module))
    if isinstance(module, _EMBEDDINGS):
        return Slots(("weight",), Layout(0), None, no_input="it holds indices, not numbers")
    if isinstance(module, nn.RNNCellBase):
        return Slots(_CELL, Layout(0), None, no_input="a recurrent cell also reads its hidden state")
    if isinstance(module, nn.Linear):
        bypassed = isinstance(module, NonDynamicallyQuantizableLinear)  # attention reads out_proj's weight directly
        return Slots(("weight",), Layout(0), _TOKENS, module.in_features, _arguments(module), unreachable=bypassed)
    if isinstance(module, nn.RNNBase) or not _has_matrix(module):
        return None
    if isinstance(module, nn.Bilinear):
        return Slots(("weight",), Layout(0), None, no_input="there are two of them")
    return Slots(("weight",), Layout(0), _TOKENS, None, _arguments(module))  # a type of the user's own, named in a rule


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Return the name of the first argument of a module's forward."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return (parameters[0].name,) if parameters and parameters[0].kind in named else ("input",)


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if weight is None or is_lazy(weight) or not hasattr(weight, "dim") or weight.dim() < 2:
        return False
    return bool(covered_parameters(module, "weight"))


def obstacle(module: nn.Module) -> str | None:
    """Return why the weights of a module cannot be quantized, or None."""
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__} reads its weights as one flat buffer"
    if isinstance(module, _EMBEDDINGS) and module.max_norm is not None:
        return "max_norm renormalizes the table in place, which would act on the quantized copy"
    if isinstance(module, _EMBEDDINGS) and module.sparse:
        return "sparse gradients cannot pass the quantizer; use sparse=False"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has compiled how it reads its weights"
    slots = slots_of(module)
    if slots is None:
        return f"{type(module).__name__} has no weight matrix that we know"
    if view_names(module):  # with LoRA, it holds codes of our own
        return None
    kinds = [parameter.dtype for slot in slots.names for parameter in covered_parameters(module, slot)]
    others = [kind for kind in kinds if kind not in _FLOATS]
    return f"its weight is in {others[0]}, not in floating point of 16 bits or more" if others else None


def covered_parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameters that make up a weight: itself, or what weight_norm, pruning, parametrizations keep."""
    own = [module._parameters.get(name + suffix) for suffix in ("", "_orig", "_g", "_v")]
    lists = module._modules.get("parametrizations")
    parametrized = list(lists[name].parameters()) if isinstance(lists, nn.ModuleDict) and name in lists else []
    return [parameter for parameter in own if parameter is not None] + parametrized
