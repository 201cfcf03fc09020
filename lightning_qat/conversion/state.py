"""What a prepared model remembers and holds, by dotted name."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor, nn

from lightning_qat.conversion.view import (
    _READS_LATENT,
    TRANSFORMS,
    adapter,
    find_scale,
    is_view,
    latent,
    settled,
    view_names,
    weight_quantizer,
    with_adapter,
)
from lightning_qat.quantization.low_rank import LowRank
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.recipe import Recipe

_STATE: Final = "_lightning_qat"


@final
@dataclass(frozen=True)
class PreparedState:
    """What a prepared root module remembers: plain attribute, not part of its state_dict."""

    recipe: Recipe
    arithmetic: str


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or the model itself."""
    children = dict(model.named_children())  # scripted modules keep theirs elsewhere than in _modules
    return children.get("_orig_mod", model)


def prepared_state(model: nn.Module) -> PreparedState | None:
    """Return what a prepared root module remembers, or None."""
    state: PreparedState | None = uncompiled(model).__dict__.get(_STATE)
    return state


def remember(model: nn.Module, state: PreparedState) -> None:
    """Keep the state in a root module."""
    vars(uncompiled(model))[_STATE] = state


def forget(module: nn.Module) -> None:
    """Drop the state of a module, if it has one."""
    vars(module).pop(_STATE, None)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the user's modules by dotted name: without quantizers, and without what torch.compile puts between."""
    return dict(_walk(uncompiled(model), "", set()))


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = uncompiled(module)
    if id(module) in seen or isinstance(module, FakeQuantizer | LowRank):
        return
    seen.add(id(module))
    yield name, module
    for key, child in module._modules.items():
        if child is not None and key != TRANSFORMS:
            yield from _walk(child, f"{name}.{key}" if name else key, seen)


def quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Return the quantizers of a model by dotted name; a shared one appears once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantizer)}


def stored(module: nn.Module, name: str) -> Tensor:
    """Return the latent weight of a layer as it lies there, without gradient; LoRA adapters are merged."""
    return with_adapter(module, name, latent(module, name).detach())


def stored_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape of a weight, also where its base is packed."""
    low_rank = adapter(module, name)
    return tuple(latent(module, name).shape) if low_rank is None else low_rank.shape


def refresh_scales(model: nn.Module) -> None:
    """Find the weight scales anew that a float checkpoint, ``to_empty`` or an initializer made stale.

    Where weights are sharded (FSDP2), all processes must call this.
    """
    for module in model.modules():
        for slot in view_names(module):
            if weight_quantizer(module, slot).stale and not settled(module, slot).is_meta:
                find_scale(module, slot)


def refresh_after_load(module: nn.Module, incompatible_keys: Any) -> None:
    """Post-hook of ``load_state_dict``; a module-level function, so that models pickle."""
    _follow_from_meta(module)
    refresh_scales(module)


def _follow_from_meta(module: nn.Module) -> None:
    """Take what prepare() added from the meta device, where ``load_state_dict(assign=True)`` took only the weight."""
    for name, child in module._modules.items():
        ours = isinstance(child, FakeQuantizer) or name == TRANSFORMS
        if child is not None and ours and any(t.is_meta for t in (*child.parameters(), *child.buffers())):
            child.to_empty(device=settled(module, view_names(module)[0]).device)


@contextmanager
def reading_latents(model: nn.Module) -> Iterator[None]:
    """Let prepared weights read as the Parameters that they are, inside: to initialize them, or to collect them.

    What computes inside computes in float. Scales do not follow by themselves; :func:`mark_stale` asks for that.
    """
    views = [module for module in model.modules() if is_view(module) and _READS_LATENT not in vars(module)]
    try:
        for module in views:
            vars(module)[_READS_LATENT] = True
        yield
    finally:
        for module in views:
            vars(module).pop(_READS_LATENT, None)
