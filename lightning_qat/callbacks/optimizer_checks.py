"""What has to hold of optimizers in which learned scales train."""

from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_qat.callbacks.group_splitter import FOLLOWS, MATRICES_ONLY, MULTIPLIER, Group, suffix
from lightning_qat.callbacks.parameter_group import ParameterGroup, assigned, followers, quantizer_parameters


def check_groups(model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Check that every quantizer trains with its weight, and does not decay with it.

    Raises:
        ValueError: naming the parameters of quantizers for which that does not hold, the reason and the remedy.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    found = {
        "would not be trained, though the weight is": _lost(model, groups),
        f"cannot be trained by {MATRICES_ONLY}": _misplaced(model, optimizers),
        "would decay with the weights": _decayed(model, groups),
    }
    for problem, names in found.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"QATCallback: {', '.join(names[:5])}{more} {problem}: {_remedy(optimizers)}")


def _lost(model: nn.Module, groups: list[Group]) -> list[str]:
    names, present = quantizer_parameters(model), {id(p) for group in groups for p in group["params"]}
    owned = [f for owner, found in followers(model).items() if owner in present for f in found]
    return list(dict.fromkeys(names[id(f)] for f in owned if f.requires_grad and id(f) not in present))


def _misplaced(model: nn.Module, optimizers: list[Optimizer]) -> list[str]:
    names = quantizer_parameters(model)
    matrices = [group for each in optimizers if type(each).__name__ == MATRICES_ONLY for group in each.param_groups]
    return [names[id(p)] for group in matrices for p in group["params"] if id(p) in names]


def _decayed(model: nn.Module, groups: list[Group]) -> list[str]:
    names = quantizer_parameters(model)
    mixed = [g for g in groups if g.get("weight_decay") and any(id(p) not in names for p in g["params"])]
    return [names[id(p)] for group in mixed for p in group["params"] if id(p) in names and p.requires_grad]


def _remedy(optimizers: list[Optimizer]) -> str:
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        return "LBFGS has one group for all; build it with all parameters of the module, self.parameters()"
    if any(type(optimizer).__name__ == MATRICES_ONLY for optimizer in optimizers):
        return (
            f"{MATRICES_ONLY} orthogonalizes matrices, and scales are none; give them to your other optimizer: "
            "[p for name, p in self.named_parameters() if 'quantizer' in name]"
        )
    return (
        "the optimizer was built outside configure_optimizers(); build it inside, or call prepare(model, recipe) "
        "before you build it and give the quantizers' parameters a group of their own with weight_decay=0"
    )


def check_options(model: nn.Module, optimizers: list[Optimizer], groups: tuple[ParameterGroup, ...]) -> None:
    """Check that optimizers train as ``groups`` say.

    Raises:
        ValueError: a group that matches nothing, nothing that an optimizer trains, or what an optimizer trains that was
            built where its groups could not be split.
    """
    holders = {
        id(p): str(group.get("name", "")) for each in optimizers for group in each.param_groups for p in group["params"]
    }
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    found = assigned(model, groups)
    for index, group in enumerate(groups):
        own = [key for key, place in found.items() if place == index]
        held = [key for key in own if key in holders]
        if any(not holders[key].endswith(suffix(group.kind, index)) for key in held):
            lbfgs = any(isinstance(optimizer, LBFGS) for optimizer in optimizers)
            why = (
                "LBFGS has one group for all"
                if lbfgs
                else ("the optimizer was built outside configure_optimizers(); build it inside")
            )
            raise ValueError(f"QATCallback: {group.label} has no effect: {why}")
        if not held and trainable.intersection(own):
            raise ValueError(f"QATCallback: {group.label} has no effect: what it matches is in no optimizer")


def check_resumed(stored: dict[str, Any] | None, given: dict[str, Any]) -> None:
    """Check that a run goes on with the options it began with: the optimizer's come from the checkpoint.

    Args:
        stored: ``scale_lr_multiplier`` and ``groups`` of the checkpoint, in plain types; None if it has none.
        given: those of the callback.

    Raises:
        ValueError: they differ.
    """
    stored = given if stored is None else stored
    for key in given:
        if stored[key] != given[key]:
            raise ValueError(
                f"QATCallback: the checkpoint was made with {key}={stored[key]}, the callback has {given[key]}, which "
                "would have no effect: a resumed run takes the optimizer from the checkpoint. Give the same, or load "
                "the weights alone, load_checkpoint(model, path), and train anew"
            )


def check_rates(callbacks: list[Any], multipliers: list[float | None]) -> None:
    """Check that callbacks that set rates themselves, when training starts or in the end, keep the multipliers.

    Raises:
        ValueError: one sets one rate for all groups.
    """
    if all(multiplier in (None, 1.0) for multiplier in multipliers):
        return
    for callback in callbacks:
        if hasattr(callback, "lr_find") and getattr(callback, "_update_attr", False):
            raise ValueError(
                f"QATCallback: learning rate multipliers are lost with {type(callback).__name__}, which sets the rate "
                "that it finds for all groups; find it before, Tuner(trainer).lr_find(model), or give "
                f"{type(callback).__name__}(update_attr=False)"
            )
        rates = getattr(callback, "_swa_lrs", None)
        if rates is not None and (not isinstance(rates, list) or len(set(rates)) == 1):
            raise ValueError(
                f"QATCallback: learning rate multipliers end with {type(callback).__name__}, which sets one rate for "
                "all groups; give swa_lrs=[...], one value per group of trainer.optimizers[0]"
            )


def align_rates(optimizers: list[Optimizer]) -> None:
    """Let groups split off while training follow the rate of theirs, which the callback that added it sets."""
    for optimizer in optimizers:
        groups = optimizer.param_groups
        for index, group in enumerate(groups):
            if FOLLOWS in group:
                group["lr"] = groups[index + group[FOLLOWS]]["lr"] * group[MULTIPLIER]
