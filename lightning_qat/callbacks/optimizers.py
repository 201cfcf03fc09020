"""Optimizer groups of learned scales: in the optimizer of their weight, without weight decay."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_qat.conversion.view import INPUT_QUANTIZER, QUANTIZER_SUFFIX, latent, view_names
from lightning_qat.quantization.quantizer import FakeQuantizer

_OWNERS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def quantizer_parameters(model: nn.Module) -> dict[int, str]:
    """Return the names of the parameters of all quantizers (scales, temperatures) by their id."""
    return {
        id(parameter): f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizer)
        for key, parameter in module.named_parameters(recurse=False)
    }


def followers(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Return for each weight, by its id, the trainable parameters of the quantizers of its layer."""
    found: dict[int, list[nn.Parameter]] = {}
    for module in model.modules():
        inputs = module._modules.get(INPUT_QUANTIZER)
        for slot in view_names(module):
            quantizer = module._modules[slot + QUANTIZER_SUFFIX]
            for parameter in _stored_parameters(module, slot):
                _extend(found, parameter, quantizer)
                _extend(found, parameter, inputs)
        if inputs is not None and not view_names(module):
            for parameter in module.parameters(recurse=False):
                _extend(found, parameter, inputs)
    return found


def _stored_parameters(module: nn.Module, slot: str) -> list[nn.Parameter]:
    own = latent(module, slot)
    if isinstance(own, nn.Parameter):
        return [own]
    return [p for name, p in module.named_parameters() if slot in name and QUANTIZER_SUFFIX not in name]


def _extend(found: dict[int, list[nn.Parameter]], owner: nn.Parameter, quantizer: nn.Module | None) -> None:
    present = found.setdefault(id(owner), [])
    for parameter in () if quantizer is None else quantizer.parameters():
        if parameter.requires_grad and all(parameter is not p for p in present):
            present.append(parameter)


@final
class GroupSplitter:
    """Splits parameter groups so that parameters of quantizers stand in groups of their own.

    Args:
        model: the prepared model.
        lr_multiplier: learning rate of scales relative to that of their weights, positive.
    """

    def __init__(self, model: nn.Module, lr_multiplier: float = 1.0) -> None:
        self.names = quantizer_parameters(model)
        self.followers = followers(model)
        self.lr_multiplier = lr_multiplier
        self.group_counts: dict[str, int] = {}

    def split(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the groups, each followed by the group of its quantizers' parameters.

        A group that holds nothing but parameters of quantizers was made by the user and stays as it is.
        """
        own = {id(_tensor(p)) for group in groups if self._only_quantizers(group) for p in group["params"]}
        result, placed = [], set(own)
        for group in groups:
            if self._only_quantizers(group):
                result.append(group)
                continue
            rest = [p for p in group["params"] if id(_tensor(p)) not in self.names]
            wanted = [_tensor(p) for p in group["params"] if id(_tensor(p)) in self.names]
            wanted += [f for p in rest for f in self.followers.get(id(_tensor(p)), ())]
            scales = []
            for parameter in wanted:
                if id(parameter) not in placed:
                    placed.add(id(parameter))
                    scales.append(parameter)
            result.append({**group, "params": rest})
            if scales:
                result.append(self._scale_group(group, scales, defaults))
        return result

    def _only_quantizers(self, group: dict[str, Any]) -> bool:
        return bool(group["params"]) and all(id(_tensor(p)) in self.names for p in group["params"])

    def _scale_group(self, group: dict[str, Any], scales: list[Tensor], defaults: dict[str, Any]) -> dict[str, Any]:
        named = any(isinstance(p, tuple) for p in group["params"])
        new = {**group, "params": [(self.names[id(p)], p) for p in scales] if named else scales}
        if "weight_decay" in defaults or "weight_decay" in group:
            new["weight_decay"] = 0.0
        lr = group.get("lr", defaults.get("lr"))
        if lr is not None and self.lr_multiplier != 1.0:
            new["lr"] = lr * self.lr_multiplier
        return new


def _tensor(parameter: Any) -> Tensor:
    tensor: Tensor = parameter[1] if isinstance(parameter, tuple) else parameter
    return tensor


def _as_groups(params: Any) -> list[dict[str, Any]]:
    if isinstance(params, Tensor):  # an error of the user that torch explains
        return params  # type: ignore[return-value]
    listed = list(params)
    if listed and isinstance(listed[0], dict):
        return [{**group, "params": _as_list(group["params"])} for group in listed]
    return [{"params": listed}]


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


@contextmanager
def separate_scales(model: nn.Module, lr_multiplier: float = 1.0) -> Iterator[GroupSplitter]:
    """Give learned scales groups of their own in every optimizer that is built inside the context.

    Adding the groups afterwards would break most schedulers, which remember one value per group.

    Args:
        model: the prepared model.
        lr_multiplier: learning rate of scales relative to that of their weights, positive.

    Raises:
        ValueError: from the user's scheduler, with the number of groups that it needs to know.
    """
    splitter = GroupSplitter(model, lr_multiplier)
    original = Optimizer.__init__

    def build(self: Optimizer, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if splitter.names and not isinstance(self, LBFGS) and not isinstance(params, Tensor):
            groups = _as_groups(params)
            params = splitter.split(groups, defaults)
            splitter.group_counts[type(self).__name__] = len(params)
        original(self, params, defaults)

    Optimizer.__init__ = build  # type: ignore[method-assign]
    try:
        yield splitter
    except (ValueError, IndexError) as error:
        if not splitter.group_counts:
            raise
        counts = ", ".join(f"{name}: {count}" for name, count in splitter.group_counts.items())
        raise type(error)(
            f"{error} -- QATCallback keeps learned scales in parameter groups of their own, each right after the group of "
            f"its weights. Number of groups ({counts}); a list with one value per group needs that length."
        ) from error
    finally:
        Optimizer.__init__ = original  # type: ignore[method-assign]


def check_groups(model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Check that every quantizer trains with its weight.

    Raises:
        ValueError: naming parameters whose weight is in an optimizer while they are in none.
    """
    present = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = quantizer_parameters(model)
    lost = [
        names[id(parameter)]
        for owner, parameters in followers(model).items()
        if owner in present
        for parameter in parameters
        if id(parameter) not in present
    ]
    if lost:
        raise ValueError(
            f"QATCallback: {', '.join(lost[:5])} would not be trained, though the weight is: the optimizer was built "
            "outside configure_optimizers(). Build it inside, or call prepare(model, recipe) before you build it."
        )


def stop_decay(model: nn.Module, optimizers: list[Optimizer]) -> list[str]:
    """Move parameters of quantizers out of groups with weight decay that came later; return their names.

    ``BackboneFinetuning`` and the like add groups while training, outside ``configure_optimizers``.
    """
    names, moved = quantizer_parameters(model), []
    for optimizer in optimizers:
        for group in list(optimizer.param_groups):
            scales = [p for p in group["params"] if id(p) in names]
            if not scales or not group.get("weight_decay") or len(scales) == len(group["params"]):
                continue
            group["params"] = [p for p in group["params"] if id(p) not in names]
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            optimizer.add_param_group({**settings, "params": scales, "weight_decay": 0.0})
            moved += [names[id(p)] for p in scales]
    return moved


def reset_state(optimizers: list[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Forget what optimizers remember of parameters whose values were found anew."""
    for parameter in parameters:
        for optimizer in optimizers:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
