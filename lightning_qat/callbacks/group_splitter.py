"""GroupSplitter: groups of their own for what quantizers learn and for weights with options of their own."""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple, final

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qat.callbacks.parameter_group import Kind, ParameterGroup, assigned, followers, quantizer_parameters

Group = dict[str, Any]
MATRICES_ONLY: Final = "Muon"
FOLLOWS: Final = "follows"
"""Key of a group that was split off while training: the user's group stands so many places behind it."""
MULTIPLIER: Final = "lr_multiplier"
METHOD: Final = "add_param_group"
_DECAYS: Final = ("weight_decay", "lambd")  # the second is ASGD's
_ALL: Final[tuple[Kind, ...]] = ("weights", "scales", "temperatures", "others")
_LEARNED: Final = ("scales", "temperatures")
"""What belongs to quantizers: it comes last, and does not decay unless it is told to."""
_REST: Final = -1


class Made(NamedTuple):
    """A group that was split off.

    Args:
        group: what the optimizer got.
        origin: the user's group, or None where nothing stayed in it and another took its place.
        multiplier: of the learning rate.
        rate: the learning rate after multiplication.
        option: the argument that asks for it.
    """

    group: Group
    origin: Group | None
    multiplier: float
    rate: float
    option: str


@final
class GroupSplitter:
    """Splits parameter groups so that parameters of quantizers, and all that a group matches, have their own.

    Args:
        model: the prepared model.
        lr_multiplier: learning rate of scales relative to that of their weights, positive.
        groups: exceptions from it; the first that matches a parameter decides.

    Raises:
        ValueError: a group or a multiplier without effect.
    """

    def __init__(self, model: nn.Module, lr_multiplier: float = 1.0, groups: tuple[ParameterGroup, ...] = ()) -> None:
        self.names = quantizer_parameters(model)
        self.followers = followers(model)
        self.assigned = assigned(model, groups)
        self.lr_multiplier = lr_multiplier
        self.groups = (*groups, ParameterGroup(kind="scales"))  # the last one holds what remains
        self.built: list[Optimizer] = []
        self.made: list[Made] = []
        self.added: list[Group] = []
        own = [self.groups[self.assigned.get(key, -1)].lr_multiplier for key in self.names]
        if lr_multiplier != 1.0 and own and None not in own:
            raise ValueError(
                f"QATCallback: scale_lr_multiplier={lr_multiplier} has no effect, because groups give all scales and "
                "temperatures an lr_multiplier; leave it out"
            )

    def split(
        self, groups: list[Group], defaults: dict[str, Any], kinds: tuple[Kind, ...] = _ALL
    ) -> tuple[list[Group], list[Group]]:
        """Return the user's groups without what has groups of its own, and those groups, to come after them.

        A group that holds nothing but parameters of quantizers was made by the user: it stays as it is, except for
        what a `ParameterGroup` says, and that it does not decay unless it says so.

        Args:
            groups: of one optimizer.
            defaults: what holds where a group says nothing.
            kinds: what the optimizer can train in groups of their own.
        """
        placed = {id(tensor_of(p)) for group in groups if self._only_quantizers(group) for p in group["params"]}
        kept: list[Group] = []
        derived: list[Group] = []
        for number, group in enumerate(groups, start=1):
            rest, made = self._divide(group, self._parts(group, placed, kinds), f"pg{number}", defaults)
            if made and not rest["params"]:  # some optimizers look at the first parameter of a group
                made = [each._replace(origin=None) for each in made]
                rest = made[0].group
            kept.append(rest)
            derived += [each.group for each in made if each.group is not rest]
            self.made += made
        self.added += derived
        return kept, derived

    def split_later(self, group: Group, optimizer: Optimizer) -> list[Group]:
        """Return the groups for one that comes while training, the user's last: finetuning callbacks set its rate."""
        placed = {id(p) for present in optimizer.param_groups for p in present["params"]}
        parts = self._parts(group, placed, kinds_of(optimizer))
        name = f"pg{len(optimizer.param_groups) + len(parts)}"
        rest, made = self._divide(group, parts, name, optimizer.defaults)
        for index, each in enumerate(made):
            each.group.update({FOLLOWS: len(made) - index, MULTIPLIER: each.multiplier})
        return [*(each.group for each in made), rest]

    def _parts(self, group: Group, placed: set[int], kinds: tuple[Kind, ...]) -> dict[int, list[Any]]:
        """Return the parameters by index of the `ParameterGroup`, and what stays; ``placed`` ones are elsewhere."""
        params = group["params"]
        whole = self._only_quantizers(group) or "scales" not in kinds
        named = any(isinstance(p, tuple) for p in params)
        parts: dict[int, list[Any]] = {_REST: []}
        for parameter in params:
            key = id(tensor_of(parameter))
            if whole or key not in self.names:
                parts.setdefault(self.assigned.get(key, _REST), []).append(parameter)
        for found in () if whole else self._followed(params, placed):
            index = self.assigned.get(id(found), len(self.groups) - 1)
            parts.setdefault(index, []).append((self.names[id(found)], found) if named else found)
        return parts

    def _followed(self, parameters: list[Any], placed: set[int]) -> list[Tensor]:
        """Return the quantizers' parameters that are in a group or belong to its weights, each once."""
        tensors = [tensor_of(p) for p in parameters]
        wanted = [p for p in tensors if id(p) in self.names]
        wanted += [f for p in tensors for f in self.followers.get(id(p), ()) if f.requires_grad]
        found = []
        for parameter in wanted:
            if id(parameter) not in placed:
                placed.add(id(parameter))
                found.append(parameter)
        return found

    def _only_quantizers(self, group: Group) -> bool:
        return bool(group["params"]) and all(id(tensor_of(p)) in self.names for p in group["params"])

    def _divide(
        self, group: Group, parts: dict[int, list[Any]], name: str, defaults: dict[str, Any]
    ) -> tuple[Group, list[Made]]:
        """Return what stays of a group, and a group for each other part: weights first, in the order of the groups."""
        still: Group = {key: 0.0 for key in _DECAYS if key in defaults}
        if self._only_quantizers(group):
            group = {**still, **group}
            still = {}
        rest = {**group, "params": parts[_REST]}
        made = []
        for index in sorted(parts.keys() - {_REST}, key=lambda i: (self.groups[i].kind in _LEARNED, i)):
            new = {**group, "params": parts[index], "name": f"{group.get('name', name)}{self.suffix(index)}"}
            new |= still if self.groups[index].kind in _LEARNED else {}
            made.append(self._with_options(new, rest, index, defaults))
        return rest, made

    def suffix(self, index: int) -> str:
        """Return what ends the name of a group; LearningRateMonitor shows names, and refuses to see one twice."""
        return suffix(self.groups[index].kind, index if index < len(self.groups) - 1 else None)

    def _with_options(self, new: Group, origin: Group, index: int, defaults: dict[str, Any]) -> Made:
        wanted = self.groups[index]
        multiplier, option = wanted.lr_multiplier, f"{wanted.label}: lr_multiplier"
        if multiplier is None:
            multiplier, option = (self.lr_multiplier if wanted.kind in _LEARNED else 1.0), "scale_lr_multiplier"
        lr = new.get("lr", defaults.get("lr"))
        if multiplier != 1.0:
            if lr is None:
                raise ValueError(
                    f"QATCallback: {option}={multiplier} has no effect: the optimizer has no lr to multiply"
                )
            lr = new["lr"] = lr * multiplier
        if wanted.weight_decay is not None:
            if "weight_decay" not in defaults:
                raise ValueError(f"QATCallback: {wanted.label}: the optimizer has no weight_decay; leave it out")
            new["weight_decay"] = wanted.weight_decay
        return Made(new, origin, multiplier, float(lr or 0.0), option)

    def watch(self, optimizer: Optimizer) -> None:
        """Split groups that come later, too: ``BackboneFinetuning`` and the like add them while training."""
        add = optimizer.add_param_group

        def add_param_group(param_group: Group) -> None:
            groups = as_groups([param_group]) if isinstance(param_group, dict) else None
            if groups is None:
                add(param_group)  # torch says what is wrong with it
                return
            for group in self.split_later(groups[0], optimizer):
                add(group)

        vars(optimizer)[METHOD] = add_param_group
        self.built.append(optimizer)


def suffix(kind: Kind, index: int | None) -> str:
    """Return how the names of groups end: that of the n-th `ParameterGroup`, or None for what none matches.

    >>> suffix("weights", 0), suffix("scales", None)
    ('-weights-1', '-scales')
    """
    return f"-{kind}" if index is None else f"-{kind}-{index + 1}"


def kinds_of(optimizer: Optimizer) -> tuple[Kind, ...]:
    """Return what an optimizer can train in groups of their own."""
    return ("weights",) if type(optimizer).__name__ == MATRICES_ONLY else _ALL


def tensor_of(parameter: Any) -> Tensor:
    """Return the tensor of an entry of a group, which may be (name, tensor)."""
    tensor: Tensor = parameter[1] if isinstance(parameter, tuple) else parameter
    return tensor


def is_ordered(params: Any) -> bool:
    """Whether torch accepts a collection of parameters."""
    return isinstance(params, Iterable) and not isinstance(params, set | Tensor)


def as_groups(params: list[Any]) -> list[Group] | None:
    """Return what an optimizer is built with as groups that hold lists, or None where torch will refuse it."""
    if not params:
        return None
    if not isinstance(params[0], dict):
        return [{"params": params}]
    groups = []
    for group in params:
        own: Any = group.get("params") if isinstance(group, dict) else None
        own = [own] if isinstance(own, Tensor) else own
        if not is_ordered(own):
            return None
        groups.append({**group, "params": list(own)})
    return groups
