"""Which weights a module has, how their dimensions are read, and what stands in the way of quantizing them."""

from dataclasses import dataclass
from typing import Final, final

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_qat.quantization.granularity import Layout
from lightning_qat.quantization.recipe import CONVOLUTIONS

_TRANSPOSED: Final = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS: Final = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT: Final = (nn.RNNBase, nn.RNNCellBase)


@final
@dataclass(frozen=True)
class Slots:
    """The quantizable weights of a module.

    Args:
        names: parameter names.
        weight: how the weights are read.
        input: how the input is read, or None where it holds no real numbers.
        in_features: width of the input that transforms act on, or None where it is not one number.
    """

    names: tuple[str, ...]
    weight: Layout
    input: Layout | None
    in_features: int | None = None


def slots_of(module: nn.Module) -> Slots | None:
    """Return the quantizable weights of a module, or None if it has none that we know."""
    if isinstance(module, nn.MultiheadAttention):
        packed = module._qkv_same_embed_dim
        names = ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return Slots(names, Layout(0), Layout(None, 1), module.embed_dim if packed else None)
    if isinstance(module, CONVOLUTIONS):
        axis = 1 if isinstance(module, _TRANSPOSED) else 0
        return Slots(("weight",), Layout(axis), Layout(None, len(module.kernel_size) + 1))
    if isinstance(module, _EMBEDDINGS):
        return Slots(("weight",), Layout(0), None)
    if isinstance(module, nn.Linear):
        return Slots(("weight",), Layout(0), Layout(None, 1), module.in_features)
    if isinstance(module, _RECURRENT) or not _has_matrix(module):
        return None
    return Slots(("weight",), Layout(0), Layout(None, 1))  # a type of the user's own, named in a rule


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and not is_lazy(weight) and hasattr(weight, "dim") and weight.dim() >= 2


def obstacle(module: nn.Module) -> str | None:
    """Return why the weights of a module cannot be quantized, or None."""
    if isinstance(module, _RECURRENT):
        return "recurrent kernels read their weights as one flat buffer"
    if isinstance(module, _EMBEDDINGS) and module.max_norm is not None:
        return "max_norm renormalizes the table in place, which would act on the quantized copy"
    if isinstance(module, _EMBEDDINGS) and module.sparse:
        return "sparse gradients cannot pass the quantizer; use sparse=False"
    if slots_of(module) is None:
        return f"{type(module).__name__} has no weight matrix that we know"
    return None


def covered_parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameters that make up a weight: itself, or what weight_norm, pruning, parametrizations keep."""
    own = [module._parameters.get(name + suffix) for suffix in ("", "_orig", "_g", "_v")]
    lists = module._modules.get("parametrizations")
    parametrized = list(lists[name].parameters()) if isinstance(lists, nn.ModuleDict) and name in lists else []
    return [parameter for parameter in own if parameter is not None] + parametrized
