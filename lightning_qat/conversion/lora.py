"""LoRA-QAT: low-rank adapters that are merged into frozen weights before these are quantized."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.plan import joined
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.state import layers, quantizers, refresh_scales
from lightning_qat.conversion.view import (
    ADAPTER_SUFFIX,
    INPUT_QUANTIZER,
    adapter,
    latent,
    view_names,
    weight_quantizer,
)
from lightning_qat.functional.low_rank import merge_low_rank, unpack_base
from lightning_qat.quantization.low_rank import LowRank, check_low_rank

Globs = str | Iterable[str]
_A: Final = f"{ADAPTER_SUFFIX}.a"


@final
@dataclass(frozen=True)
class Settings:
    """What all adapters of a model have in common; the fields are arguments of :func:`add_lora`.

    Raises:
        ValueError: a value that is not allowed.
    """

    rank: int
    alpha: float
    dropout: float
    base: str

    def __post_init__(self) -> None:
        check_low_rank(self.rank, self.alpha, self.dropout, self.base, "add_lora")

    def __str__(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}, base={self.base!r}"

    def build(self, weight: Tensor, name: str) -> LowRank:
        """Return an adapter for a weight."""
        return LowRank(
            tuple(weight.shape), self.rank, self.alpha, self.dropout, base=self.base, dtype=weight.dtype, name=name
        )

    def check(self, low_rank: LowRank, name: str) -> None:
        """Raise if an adapter is of other settings."""
        present = Settings(low_rank.rank, low_rank.alpha, low_rank.dropout, low_rank.base)
        if present != self:
            raise ValueError(f"{name}: it has an adapter with {present}, given is {self}; merge_lora(model) first")


def add_lora(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, *, match: Globs = "*",
    base: str = "same", trainable: Globs = (),
) -> tuple[str, ...]:  # fmt: skip
    r"""Give quantized weights of a prepared model low-rank adapters, in place, and freeze all but these and scales.

    What is fake-quantized is the merged weight, :math:`\hat W = Q(W + \frac{\alpha}{r} B A)`: what is trained is what
    :func:`~lightning_qat.bake` and :func:`~lightning_qat.codes` give, without a float remainder beside the codes. In
    layers with the forward of ``nn.Linear`` no merged and no quantized weight waits for backward. Learned scales of the
    layers train along, also where the layer was frozen. Equal bit for bit means on one kind of device: another rounds
    the product of the factors differently in the last bit, which may move a weight that lies on a border.

    Args:
        model: prepared, on one device. Adding the same adapters again is a no-op, except for new layers.
        rank: r, at most min(outputs, inputs) of every matching weight.
        alpha: positive; the correction is multiplied by alpha / rank.
        dropout: probability in [0, 1) of an input feature of a correction to be left out, drawn once per forward.
        match: glob, or several, over dotted layer names.
        base: how the frozen weights are stored: ``"same"`` as they are, ``"bfloat16"``, or packed with a scale per 64
            neighbors: ``"int8"``, ``"int4"``. Everything but ``"same"`` rounds them, once, here.
        trainable: glob, or several, over dotted names of other parameters that train, such as ``"head.*"``.

    Returns:
        The dotted names of the weights that have adapters.

    Raises:
        TypeError: if model is no module.
        ValueError: a model that is not prepared, a pattern that matches nothing, a rank above min(outputs, inputs), a
            weight that cannot have an adapter, or that has another one.

    Source: the adapter: LoRA, arXiv:2106.09685; quantizing the merged weight: ruvLLM's LoRA-QAT, W_q = Q(W + BA).
    """
    check_model("add_lora", model)
    check_low_rank(rank, alpha, dropout, base, "add_lora")  # before float() has its own word
    settings = Settings(rank, float(alpha), float(dropout), base)
    return adapt(model, settings, match=match, trainable=trainable, complete=True)


def adapt(model: nn.Module, settings: "Settings", *, match: Globs, trainable: Globs, complete: bool) -> tuple[str, ...]:
    """Do what :func:`add_lora` does; patterns may still wait for layers unless the model is complete."""
    owners = _owners(model, match, complete)
    shared = {id(latent(m, slot)): adapter(m, slot) for _, m, slot in owners if adapter(m, slot) is not None}
    made: list[tuple[nn.Module, str, LowRank]] = []
    for name, module, slot in owners:
        _check(module, slot, name)
        weight = latent(module, slot)
        low_rank = shared.get(id(weight))
        if low_rank is None:
            low_rank = settings.build(weight, name)
            shared[id(weight)] = low_rank
        settings.check(low_rank, name)
        made.append((module, slot, low_rank))
    for module, slot, low_rank in made:
        attach_adapter(module, slot, low_rank)
    refresh_scales(model)
    if made or complete:  # nothing to train yet: freezing all would leave an optimizer without parameters
        freeze(model, trainable, complete)
    return tuple(name for name, _, _ in owners)


def _owners(model: nn.Module, match: Globs, complete: bool) -> list[tuple[str, nn.Module, str]]:
    """Return the matching quantized weights: dotted name, layer, parameter name."""
    globs = _listed(match)
    present = [(layer, m, slot) for layer, m in layers(model).items() for slot in view_names(m)]
    if not present and complete:
        raise ValueError(
            f"add_lora: {type(model).__name__} has no quantized weight; call prepare(model, recipe) before, or list "
            "QATCallback(recipe) before LoRA(...)"
        )
    chosen = [(joined(layer, slot), m, slot) for layer, m, slot in present if _matches(layer, globs)]
    idle = [glob for glob in globs if not any(fnmatchcase(layer, glob) for layer, _, _ in present)]
    if complete and (idle or not chosen):
        names = ", ".join(dict.fromkeys(layer or "(the model itself)" for layer, _, _ in present[:5]))
        raise ValueError(f"add_lora: match={idle or globs} matches no quantized layer; there are {names}, ...")
    # By parameter: what a parametrization computes is another tensor each time, and is owned by its layer alone.
    tied = {id(m._parameters.get(slot)) for _, m, slot in chosen} - {id(None)}
    chosen_names = {name for name, _, _ in chosen}
    owners = [(joined(layer, slot), m, slot) for layer, m, slot in present]
    return [(name, m, slot) for name, m, slot in owners if name in chosen_names or id(m._parameters.get(slot)) in tied]


def _listed(globs: Globs) -> list[str]:
    return [globs] if isinstance(globs, str) else list(globs)


def _matches(name: str, globs: list[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _check(module: nn.Module, slot: str, name: str) -> None:
    parameter = module._parameters.get(slot)
    if parameter is None:
        raise ValueError(
            f"{name}: it is computed from other parameters (pruning, weight_norm, a parametrization), and cannot have "
            "an adapter; make it a plain parameter before prepare(), or leave the layer out by match="
        )
    if is_sharded(parameter):
        raise ValueError(f"{name}: adapters of sharded weights (FSDP) are not supported; use one device or DDP")


@torch.no_grad()
def attach_adapter(module: nn.Module, slot: str, low_rank: LowRank) -> None:
    """Register an adapter with a prepared layer that has none; store the weight as the adapter says."""
    if adapter(module, slot) is not None:
        return
    parameter = module._parameters[slot]
    assert parameter is not None  # noqa: S101 - add_lora() asks for it
    low_rank.to(parameter.device).train(module.training)
    module.register_module(slot + ADAPTER_SUFFIX, low_rank)
    if not _load_hooks(module):
        module.register_load_state_dict_pre_hook(_convert_base)
    if not low_rank.packed or parameter.is_floating_point():  # else another owner of the tied weight came first
        parameter.requires_grad_(False)
        stored = low_rank.store(parameter.data)
        if low_rank.base != "same":
            parameter.data = stored
            quantizer = weight_quantizer(module, slot)
            quantizer.stale = quantizer.stored and not parameter.is_meta


def freeze(model: nn.Module, trainable: Globs = (), complete: bool = True) -> None:
    """Freeze all parameters but adapters, what quantizers learn, and those whose dotted names match.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    globs = _listed(trainable)
    names = [name for name, _ in model.named_parameters()]
    idle = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]
    if idle and complete:
        raise ValueError(f"add_lora: trainable={idle} matches no parameter; there are {', '.join(names[:5])}, ...")
    keep = {id(p) for quantizer in quantizers(model).values() for p in quantizer.parameters()}
    for _, module, slot in adapters(model):
        low_rank = adapter(module, slot)
        for part in (low_rank, weight_quantizer(module, slot), module._modules.get(INPUT_QUANTIZER)):
            for parameter in () if part is None else part.parameters():
                keep.add(id(parameter))
                parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if id(parameter) not in keep:
            parameter.requires_grad_(parameter.is_floating_point() and _matches(name, globs))


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the weights with adapters: dotted name, layer, parameter name. Owners of a tied weight come one by one."""
    for layer, module in layers(model).items():
        for slot in view_names(module):
            if adapter(module, slot) is not None:
                yield joined(layer, slot), module, slot


def merge_lora(model: nn.Module) -> tuple[str, ...]:
    """Fold the adapters into the latent weights, in place; codes and scales stay what they are, bit for bit.

    For that the latent weights become float32 (float64 where they were), whatever the base was stored in: a layer that
    computes in 16 bits then wants autocast, or :func:`~lightning_qat.bake`, which needs no merge at all. Parameters
    stay frozen; ``model.requires_grad_()`` trains on.

    Returns:
        The dotted names of the weights that had adapters; none is no error.
    """
    check_model("merge_lora", model)
    return fold_adapters(model, exact=True)


@torch.no_grad()
def fold_adapters(model: nn.Module, *, exact: bool) -> tuple[str, ...]:
    """Replace adapters by merged weights: exact in float32, else rounded to the dtype that the layer computes in."""
    found = list(adapters(model))
    done: set[int] = set()
    for _, module, slot in found:
        low_rank, parameter = adapter(module, slot), module._parameters[slot]
        assert low_rank is not None and parameter is not None  # noqa: S101, PT018 - adapters() yields no others
        if id(parameter) not in done:
            done.add(id(parameter))
            merged = low_rank.merged(parameter.data)
            parameter.data = merged if exact else merged.to(low_rank.dtype)
        drop_adapter(module, slot)
    return tuple(name for name, _, _ in found)


def drop_adapter(module: nn.Module, slot: str) -> None:
    """Remove an adapter, and what came with it, from a layer; the weight stays as it is stored."""
    module._modules.pop(slot + ADAPTER_SUFFIX, None)
    if not any(isinstance(child, LowRank) for child in module._modules.values()):
        for key in _load_hooks(module):
            del module._load_state_dict_pre_hooks[key]


def _load_hooks(module: nn.Module) -> list[int]:
    hooks = module._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", None) is _convert_base]


def _convert_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let checkpoints load whatever their base is stored as: pack what comes in float, unpack what comes packed."""
    for slot in view_names(module):
        low_rank, weight = adapter(module, slot), state_dict.get(prefix + slot)
        if low_rank is None or not isinstance(weight, Tensor):
            continue
        key = f"{prefix}{slot}{ADAPTER_SUFFIX}.base_scale"
        scale = state_dict.get(key)
        packed = low_rank.packed and isinstance(scale, Tensor) and weight.dtype == latent(module, slot).dtype
        if packed:
            continue
        if isinstance(scale, Tensor):
            weight = unpack_base(weight, state_dict.pop(key), low_rank.shape)
        if weight.is_floating_point() and low_rank.packed and tuple(weight.shape) == low_rank.shape:
            weight = low_rank.store(weight.to(low_rank.a.device))
            state_dict[key] = low_rank.base_scale
        state_dict[prefix + slot] = weight


def adapter_keys(keys: Iterable[str]) -> list[str]:
    """Return the keys of a ``state_dict`` that hold the matrix A of an adapter.

    >>> adapter_keys(["head.weight", "head.weight_quantizer_lora.a", "head.weight_quantizer_lora.b"])
    ['head.weight_quantizer_lora.a']
    """
    return [key for key in keys if key.endswith(_A)]


def merged_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's state with adapters that the model lacks merged into the weights, in float32.

    Args:
        state: of the checkpoint.
        own: ``state_dict`` of the model that will load it.
    """
    merged = dict(state)
    for key in (key for key in adapter_keys(state) if key not in own):
        name = key.removesuffix(_A)
        prefix = name + ADAPTER_SUFFIX
        weight, a, b = state[name], state[key], state[f"{prefix}.b"]
        scale, alpha = state.get(f"{prefix}.base_scale"), float(state[f"{prefix}._extra_state"][0])
        if scale is not None:
            shape = own[name].shape if name in own else (b.shape[0], a.shape[1])
            weight = unpack_base(weight, scale, tuple(shape))
        merged[name] = merge_low_rank(weight, a, b, alpha / a.shape[0])
        for part in ("a", "b", "base_scale", "_extra_state"):
            merged.pop(f"{prefix}.{part}", None)
    return merged
