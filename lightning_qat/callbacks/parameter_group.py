"""ParameterGroup: learning rate and weight decay of quantized weights, scales or all else, chosen by glob."""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, final

from torch import nn

from lightning_qat.conversion.view import INPUT_QUANTIZER, QUANTIZER_SUFFIX, adapter, latent, view_names
from lightning_qat.quantization.quantizer import FakeQuantizer

Kind: TypeAlias = Literal["weights", "scales", "temperatures", "others"]
_KINDS: Final[dict[str, Kind]] = {"scale": "scales", "temperature": "temperatures"}
_MISSING: Final[dict[Kind, str]] = {
    "weights": "no layer of the model is quantized",
    "scales": "no quantizer of the recipe has scale=Learned(), which has scales that train",
    "temperatures": "no quantizer of the recipe has gradient=LearnedSoft(), which has a temperature that trains",
    "others": "the model has no parameters but weights of quantized layers and what their quantizers learn",
}
_WRAPPERS: Final = frozenset(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])


@final
@dataclass(frozen=True)
class ParameterGroup:
    """How an optimizer trains the quantized weights, the learned scales or temperatures of some layers, or the others.

    Of several groups of a kind the first that matches a parameter decides alone. Its values win over those of the
    user's optimizer group that the parameter came in.

    Args:
        match: glob over dotted names of layers or of parameters, such as ``"*.attention.*"``, ``"head"`` or, for the
            scales of inputs alone, ``"*.input_quantizer.scale"``; ``*`` also matches dots. A shared parameter matches
            by any of its names.
        kind: ``"weights"`` (latent weights of quantized layers), ``"scales"``, ``"temperatures"`` (of ``LearnedSoft``)
            or ``"others"`` (all that is in float: biases, norms, embeddings, layers that are not quantized). A short
            training at few levels gains much where these move faster: see ``benchmarks/README.md``.
        lr_multiplier: learning rate relative to that of the user's optimizer group, positive; schedulers scale both.
            None: 1 for weights and others, the callback's ``scale_lr_multiplier`` for scales and temperatures.
        weight_decay: 0 or more, not relative. None: that of the user's group for weights and others, 0 for scales and
            temperatures.

    Raises:
        TypeError: ``match`` is no text.
        ValueError: another kind, or a number out of range.

    Example:
        >>> ParameterGroup("*.attention.*", kind="weights", lr_multiplier=0.5)
        ParameterGroup(match='*.attention.*', kind='weights', lr_multiplier=0.5, weight_decay=None)
    """

    match: str = "*"
    kind: Kind = field(kw_only=True)
    lr_multiplier: float | None = field(default=None, kw_only=True)
    weight_decay: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not isinstance(self.match, str) or not self.match:
            raise TypeError(f"ParameterGroup: match={self.match!r} is not a glob over names, such as '*.attention.*'")
        if self.kind not in _MISSING:
            raise ValueError(f"ParameterGroup: kind={self.kind!r} is not allowed; choose one of {list(_MISSING)}")
        if self.lr_multiplier is not None and not 0 < self.lr_multiplier < float("inf"):
            raise ValueError(
                f"ParameterGroup: lr_multiplier={self.lr_multiplier} must be positive; freeze parameters with "
                "requires_grad_(False) instead of 0"
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"ParameterGroup: weight_decay={self.weight_decay} must be 0 or more")

    @property
    def label(self) -> str:
        """The group in a few words, for messages."""
        return f"ParameterGroup({self.match!r}, kind={self.kind!r})"


def quantizer_parameters(model: nn.Module) -> dict[int, str]:
    """Return the names of the parameters of all quantizers (scales, temperatures) by their id."""
    return {
        id(parameter): f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizer)
        for key, parameter in module.named_parameters(recurse=False)
    }


def followers(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Return for each weight, by its id, the parameters of the quantizers of its layer."""
    found: dict[int, list[nn.Parameter]] = {}
    for module in model.modules():
        inputs = module._modules.get(INPUT_QUANTIZER)
        for slot in view_names(module):
            quantizer = module._modules[slot + QUANTIZER_SUFFIX]
            for parameter in stored_parameters(module, slot):
                _extend(found, parameter, quantizer)
                _extend(found, parameter, inputs)
        if inputs is not None and not view_names(module):
            for parameter in module.parameters(recurse=False):
                _extend(found, parameter, inputs)
    return found


def assigned(model: nn.Module, groups: tuple[ParameterGroup, ...]) -> dict[int, int]:
    """Return for each parameter that a group matches, by its id, the index of the first such group.

    Args:
        model: the prepared model.
        groups: in order.

    Raises:
        ValueError: a group that matches no parameter of its kind, or only what earlier groups take.
    """
    members = _members(model) if groups else {}
    found: dict[int, int] = {}
    for index, group in enumerate(groups):
        matched = [key for key, (kind, names) in members.items() if kind == group.kind and _matches(group, names)]
        new = [key for key in matched if key not in found]
        if not new:
            raise ValueError(f"QATCallback: {group.label} has no effect: {_reason(group, groups, matched, members)}")
        found |= dict.fromkeys(new, index)
    return found


_Members: TypeAlias = dict[int, tuple[Kind, list[str]]]


def _members(model: nn.Module) -> _Members:
    """Return kind and names of each parameter that groups can match, by its id; frozen ones may thaw later."""
    found: _Members = {}
    for name, module in model.named_modules(remove_duplicate=False):
        path = [part for part in name.split(".") if part and part not in _WRAPPERS]
        for kind, layer, key, parameter in _own(module, path):
            found.setdefault(id(parameter), (kind, []))[1].extend((".".join(layer), ".".join([*path, key])))
    quantized = set(found)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in quantized:
            path = [part for part in name.split(".") if part not in _WRAPPERS]
            found.setdefault(id(parameter), ("others", []))[1].extend((".".join(path[:-1]), ".".join(path)))
    return found


def _own(module: nn.Module, path: list[str]) -> Iterator[tuple[Kind, list[str], str, nn.Parameter]]:
    if isinstance(module, FakeQuantizer):
        for key, parameter in module.named_parameters(recurse=False):
            yield _KINDS[key], path[:-1], key, parameter
    for slot in view_names(module):
        for parameter in stored_parameters(module, slot):
            yield "weights", path, slot, parameter


def _matches(group: ParameterGroup, names: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, group.match) for name in names)


def _reason(group: ParameterGroup, groups: tuple[ParameterGroup, ...], matched: list[int], members: _Members) -> str:
    if matched:
        names = members[matched[0]][1]
        earlier = next(each for each in groups if each.kind == group.kind and _matches(each, names))
        return f"all that it matches is taken by an earlier one, {earlier.label}; move it up"
    layers = sorted({names[0] for kind, names in members.values() if kind == group.kind})
    if not layers:
        return _MISSING[group.kind]
    return f"no layer with {group.kind} matches; there are {', '.join(map(repr, layers[:8]))}"


def stored_parameters(module: nn.Module, slot: str) -> list[nn.Parameter]:
    """Return the parameters that a quantized weight is made of: one, unless it is parametrized or has adapters."""
    own = latent(module, slot)
    if isinstance(own, nn.Parameter):
        low_rank = adapter(module, slot)
        return [own, *(low_rank.parameters() if low_rank else ())]
    return [p for name, p in module.named_parameters() if slot in name and QUANTIZER_SUFFIX not in name]


def _extend(found: dict[int, list[nn.Parameter]], owner: nn.Parameter, quantizer: nn.Module | None) -> None:
    present = found.setdefault(id(owner), [])
    for parameter in () if quantizer is None else quantizer.parameters():
        if all(parameter is not p for p in present):
            present.append(parameter)
