"""Layers of the package ``peft``, recognized without importing it."""

from torch import nn

from lightning_qat.conversion.plan import Decision
from lightning_qat.conversion.state import layers


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of peft that wrap a base layer, by dotted name."""
    return {name: module for name, module in layers(model).items() if _is_tuner(module)}


def _is_tuner(module: nn.Module) -> bool:
    kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(module).__mro__}
    return ("peft", "BaseTunerLayer") in kinds and hasattr(module, "base_layer")


def refuse_tuners(model: nn.Module, decisions: list[Decision]) -> None:
    """Refuse to quantize parts of a layer of peft, whose sum would have no codes.

    Raises:
        ValueError: naming the layer and what to call instead.
    """
    tuners = tuner_layers(model)
    for decision in decisions:
        for owner in decision.owners:
            inside = next((name for name in tuners if owner.layer.startswith(f"{name}.")), None)
            if inside is not None and owner.spec is not None:
                raise ValueError(
                    f"{inside} is a {type(tuners[inside]).__name__} layer of peft: quantizing its base layer and its "
                    "adapters apart would train a sum that has no codes. Call adopt_peft(model, recipe) instead of "
                    "prepare(), which quantizes the merged weights; or merge_and_unload() in peft, then prepare() and "
                    f'add_lora(); or leave it in float, Rule("{inside}.*", None)'
                )
