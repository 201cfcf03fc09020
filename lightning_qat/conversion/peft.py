"""Models whose adapters come from the package ``peft``: refused as they are, adopted on request."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.lora import attach_adapter
from lightning_qat.conversion.prepare import prepare
from lightning_qat.conversion.report import ConversionReport
from lightning_qat.conversion.state import layers, refresh_scales
from lightning_qat.conversion.tuners import tuner_layers
from lightning_qat.quantization.low_rank import LowRank
from lightning_qat.quantization.recipe import Recipe


@final
@dataclass(frozen=True, eq=False)
class _Adapter:
    """What a layer of peft computes with."""

    name: str
    layer: nn.Linear
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


def adopt_peft(model: nn.Module, recipe: Recipe, *, arithmetic: str = "auto", base: str = "same") -> ConversionReport:
    r"""Prepare a model with LoRA adapters of ``peft``, in place, so that the merged weights are quantized.

    A LoRA layer of peft adds the product of its factors to the output of its base layer. Quantized as it is, that would
    be three quantized layers, and the trained sum would have no codes. Here each such layer gives way to its base
    layer, whose adapter of ours takes factors, scaling and dropout over; what trained, trains on, and learned scales
    with it. Names become those of the model without peft (``q_proj.base_layer.weight`` is ``q_proj.weight`` again).
    From here on use ``QATCallback()`` without :class:`~lightning_qat.LoRA`, checkpoints of Lightning, ``merge_lora()``
    and ``bake()``; peft's own ``save_pretrained`` and ``merge_and_unload`` no longer find adapters.

    Args:
        model: holds LoRA layers of peft on ``nn.Linear``, with one active, unmerged adapter each.
        recipe: which layers get which quantizers, by the names of the model without peft; all layers with an adapter
            must get one for their weight.
        arithmetic: as for :func:`~lightning_qat.prepare`.
        base: how the frozen weights are stored: ``"same"``, ``"bfloat16"``, ``"int8"``, ``"int4"``.

    Returns:
        The report of :func:`~lightning_qat.prepare`.

    Raises:
        TypeError: if model is no module.
        ValueError: no layer of peft, or one that cannot be adopted (DoRA and other variants, several or merged
            adapters, a bias, another kind of layer), or that the recipe leaves in float; the model is untouched then.
    """
    check_model("adopt_peft", model)
    found = [_read(name, module) for name, module in tuner_layers(model).items()]
    if not found:
        raise ValueError(f"adopt_peft: {type(model).__name__} holds no layer of peft; use prepare() and add_lora()")
    for adapter in found:
        rule = recipe.rule_for(adapter.name, adapter.layer)
        if rule is None or rule.spec is None or rule.spec.weight is None:
            raise ValueError(
                f"adopt_peft: {adapter.name} has an adapter, but the recipe leaves its weight in float; give it a rule "
                "with a weight quantizer, or merge_and_unload() it in peft"
            )
    present = layers(model)
    for adapter in found:
        parent, _, key = adapter.name.rpartition(".")
        setattr(present[parent], key, adapter.layer)
    report = prepare(model, recipe, arithmetic=arithmetic)
    for adapter in found:
        attach_adapter(adapter.layer, "weight", _build(adapter, base))
    refresh_scales(model)
    return report


def _build(adapter: _Adapter, base: str) -> LowRank:
    weight, rank = adapter.layer._parameters["weight"], adapter.a.shape[0]
    assert weight is not None  # noqa: S101 - a linear layer has one
    low_rank = LowRank(
        tuple(weight.shape), rank, adapter.scaling * rank, adapter.dropout, base=base, dtype=weight.dtype,
        name=f"{adapter.name}.weight",
    )  # fmt: skip
    with torch.no_grad():
        low_rank.a.copy_(adapter.a)
        low_rank.b.copy_(adapter.b)
    return low_rank


def _read(name: str, module: Any) -> _Adapter:
    problem = _problem(module)
    if problem:
        raise ValueError(f"adopt_peft: {name}: {problem}; merge_and_unload() in peft, then prepare() and add_lora()")
    (key,) = module.active_adapters
    dropout = float(getattr(module.lora_dropout[key], "p", 0.0))
    a, b = module.lora_A[key].weight.detach(), module.lora_B[key].weight.detach()
    return _Adapter(name, module.base_layer, a, b, float(module.scaling[key]), dropout)


def _problem(module: Any) -> str:
    """Return why a layer of peft is more than W + s B A, or an empty string."""
    if not all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling", "lora_dropout")):
        return f"{type(module).__name__} of {type(module).__module__} is no LoRA layer"
    if not isinstance(module.base_layer, nn.Linear):
        return f"its base layer is {type(module.base_layer).__name__}, not nn.Linear"
    if len(module.active_adapters) != 1 or set(module.lora_A) != set(module.active_adapters):
        return f"it has the adapters {sorted(module.lora_A)}, of which {list(module.active_adapters)} are active"
    if getattr(module, "merged", False):
        return "its adapter is merged; unmerge_adapter() first"
    if getattr(module, "disable_adapters", False):
        return "its adapter is disabled"
    (key,) = module.active_adapters
    if getattr(module, "lora_variant", {}).get(key) is not None or getattr(module, "use_dora", {}).get(key):
        return "its adapter is a variant of LoRA (DoRA or the like)"
    if module.lora_B[key].bias is not None:
        return "its adapter has a bias"
    return ""
