"""Optimizer groups of learned scales: in the optimizer of their weight, without weight decay."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, final

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_qat.conversion.state import reading_latents
from lightning_qat.conversion.view import INPUT_QUANTIZER, QUANTIZER_SUFFIX, latent, view_names
from lightning_qat.quantization.quantizer import FakeQuantizer

_Group = dict[str, Any]
_METHOD: Final = "add_param_group"
_DECAYS: Final = ("weight_decay", "lambd")  # the second is ASGD's
_SUFFIX: Final = "-scales"
_SCHEDULERS: Final = "torch.optim.lr_scheduler"
_MATRICES_ONLY: Final = "Muon"


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
        if all(parameter is not p for p in present):
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
        self.built: list[Optimizer] = []
        self.pairs: list[tuple[_Group, _Group]] = []

    def split(
        self, groups: list[_Group], defaults: dict[str, Any], present: Iterable[Tensor] = (), first: int = 1
    ) -> tuple[list[_Group], list[_Group]]:
        """Return the groups without parameters of quantizers, and groups of these, one for each that needs one.

        A group that holds nothing but parameters of quantizers was made by the user: it stays as it is, except that
        it does not decay unless it says so.

        Args:
            groups: of one optimizer.
            defaults: what holds where a group says nothing.
            present: parameters that the optimizer has already.
            first: number of the first group, for the names of groups.
        """
        own = [group for group in groups if self._only_quantizers(group)]
        placed = {id(p) for p in present} | {id(_tensor(p)) for group in own for p in group["params"]}
        kept, scales = [], []
        for index, group in enumerate(groups, start=first):
            if self._only_quantizers(group):
                kept.append({**self._without_decay(defaults), **group})
                continue
            rest = [p for p in group["params"] if id(_tensor(p)) not in self.names]
            kept.append({**group, "params": rest})
            followed = self._followed(group["params"], placed)
            if followed:
                scales.append(self._scale_group(group, f"pg{index}", followed, defaults))
                self.pairs.append((kept[-1], scales[-1]))
        return kept, scales

    def _followed(self, parameters: list[Any], placed: set[int]) -> list[Tensor]:
        """Return the quantizers' parameters that are in a group or belong to its weights, each once."""
        tensors = [_tensor(p) for p in parameters]
        wanted = [p for p in tensors if id(p) in self.names]
        wanted += [f for p in tensors for f in self.followers.get(id(p), ()) if f.requires_grad]
        found = []
        for parameter in wanted:
            if id(parameter) not in placed:
                placed.add(id(parameter))
                found.append(parameter)
        return found

    def _only_quantizers(self, group: _Group) -> bool:
        return bool(group["params"]) and all(id(_tensor(p)) in self.names for p in group["params"])

    def _scale_group(self, group: _Group, name: str, scales: list[Tensor], defaults: dict[str, Any]) -> _Group:
        named = any(isinstance(p, tuple) for p in group["params"])
        params = [(self.names[id(p)], p) for p in scales] if named else scales
        # LearningRateMonitor shows the name, and refuses to see one twice.
        new = {
            **group,
            "params": params,
            "name": f"{group.get('name', name)}{_SUFFIX}",
            **self._without_decay(defaults),
        }
        lr = group.get("lr", defaults.get("lr"))
        if lr is not None and self.lr_multiplier != 1.0:
            new["lr"] = lr * self.lr_multiplier
        return new

    @staticmethod
    def _without_decay(defaults: dict[str, Any]) -> dict[str, float]:
        return {key: 0.0 for key in _DECAYS if key in defaults}

    def watch(self, optimizer: Optimizer) -> None:
        """Split groups that come later, too: ``BackboneFinetuning`` and the like add them while training."""
        add = optimizer.add_param_group

        def add_param_group(param_group: _Group) -> None:
            groups = _as_groups([param_group]) if isinstance(param_group, dict) else None
            if groups is None:
                add(param_group)  # torch says what is wrong with it
                return
            present = [p for group in optimizer.param_groups for p in group["params"]]
            kept, scales = self.split(groups, optimizer.defaults, present, first=len(optimizer.param_groups) + 2)
            for group in (*scales, *kept):  # the last group is the user's: finetuning callbacks set its rate
                add(group)

        vars(optimizer)[_METHOD] = add_param_group
        self.built.append(optimizer)


def unwatch(optimizers: Iterable[Optimizer]) -> None:
    """Give optimizers their own ``add_param_group`` back."""
    for optimizer in optimizers:
        vars(optimizer).pop(_METHOD, None)


def _tensor(parameter: Any) -> Tensor:
    tensor: Tensor = parameter[1] if isinstance(parameter, tuple) else parameter
    return tensor


def _is_ordered(params: Any) -> bool:
    return isinstance(params, Iterable) and not isinstance(params, set | Tensor)


def _as_groups(params: list[Any]) -> list[_Group] | None:
    """Return what an optimizer is built with as groups that hold lists, or None where torch will refuse it."""
    if not params:
        return None
    if not isinstance(params[0], dict):
        return [{"params": params}]
    groups = []
    for group in params:
        own: Any = group.get("params") if isinstance(group, dict) else None
        own = [own] if isinstance(own, Tensor) else own
        if not _is_ordered(own):
            return None
        groups.append({**group, "params": list(own)})
    return groups


@contextmanager
def separate_scales(model: nn.Module, lr_multiplier: float = 1.0) -> Iterator[GroupSplitter]:
    """Give learned scales groups of their own in every optimizer that is built inside the context.

    They follow the groups of the user, so that the indices of those stay. Adding them afterwards would break most
    schedulers, which remember one value per group.

    Args:
        model: the prepared model.
        lr_multiplier: learning rate of scales relative to that of their weights, positive.

    Raises:
        ValueError: from the user's scheduler, with the number of groups that it needs to know; or a scheduler under
            which ``lr_multiplier`` has no effect.
    """
    splitter = GroupSplitter(model, lr_multiplier)
    original = Optimizer.__init__

    def build(self: Optimizer, params: Any, defaults: dict[str, Any]) -> None:
        splittable = splitter.names and not isinstance(self, LBFGS) and type(self).__name__ != _MATRICES_ONLY
        if splittable and _is_ordered(params):
            params = list(params)
            groups = _as_groups(params)
            if groups is not None:
                kept, scales = splitter.split(groups, defaults)
                params = [*kept, *scales]
        original(self, params, defaults)
        if splittable:
            splitter.watch(self)

    Optimizer.__init__ = build  # type: ignore[method-assign]
    try:
        with reading_latents(model):  # layer.weight is what an optimizer can take
            yield splitter
        _check_multiplier(splitter)
    except (ValueError, IndexError, TypeError) as error:
        if not splitter.pairs or not _raised_by_scheduler(error.__traceback__):
            raise
        raise type(error)(f"{str(error).rstrip('.')}. {_explanation(splitter)}") from error
    finally:
        Optimizer.__init__ = original  # type: ignore[method-assign]


def _raised_by_scheduler(traceback: TracebackType | None) -> bool:
    last = None
    while traceback is not None:
        last, traceback = traceback.tb_frame, traceback.tb_next
    return last is not None and last.f_globals.get("__name__") == _SCHEDULERS


def _explanation(splitter: GroupSplitter) -> str:
    counts = []
    for optimizer in splitter.built:
        total = len(optimizer.param_groups)
        scales = sum(any(scales is group for group in optimizer.param_groups) for _, scales in splitter.pairs)
        counts.append(f"{total} for {type(optimizer).__name__}, the last {scales} of them for scales")
    return (
        "QATCallback trains learned scales in parameter groups of their own, which come after yours; a list with one "
        f"value per group needs {'; '.join(counts)}"
    )


def _check_multiplier(splitter: GroupSplitter) -> None:
    for weights, scales in splitter.pairs if splitter.lr_multiplier != 1.0 else ():
        rates = [float(group.get("initial_lr") or group.get("lr") or 0.0) for group in (weights, scales)]
        if rates[0] == rates[1] and rates[0] != 0:
            raise ValueError(
                f"QATCallback: scale_lr_multiplier={splitter.lr_multiplier} has no effect, because the scheduler sets "
                f"one rate, {rates[0]:g}, for all groups; give it one rate per group. {_explanation(splitter)}"
            )


def check_groups(model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Check that every quantizer trains with its weight, and does not decay with it.

    Raises:
        ValueError: naming the parameters of quantizers for which that does not hold, the reason and the remedy.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    found = {
        "would not be trained, though the weight is": _lost(model, groups),
        f"cannot be trained by {_MATRICES_ONLY}": _misplaced(model, optimizers),
        "would decay with the weights": _decayed(model, groups),
    }
    for problem, names in found.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"QATCallback: {', '.join(names[:5])}{more} {problem}: {_remedy(optimizers)}")


def _lost(model: nn.Module, groups: list[_Group]) -> list[str]:
    names, present = quantizer_parameters(model), {id(p) for group in groups for p in group["params"]}
    owned = [f for owner, found in followers(model).items() if owner in present for f in found]
    return list(dict.fromkeys(names[id(f)] for f in owned if f.requires_grad and id(f) not in present))


def _misplaced(model: nn.Module, optimizers: list[Optimizer]) -> list[str]:
    names = quantizer_parameters(model)
    matrices = [group for each in optimizers if type(each).__name__ == _MATRICES_ONLY for group in each.param_groups]
    return [names[id(p)] for group in matrices for p in group["params"] if id(p) in names]


def _decayed(model: nn.Module, groups: list[_Group]) -> list[str]:
    names = quantizer_parameters(model)
    mixed = [g for g in groups if g.get("weight_decay") and any(id(p) not in names for p in g["params"])]
    return [names[id(p)] for group in mixed for p in group["params"] if id(p) in names and p.requires_grad]


def _remedy(optimizers: list[Optimizer]) -> str:
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        return "LBFGS has one group for all; build it with all parameters of the module, self.parameters()"
    if any(type(optimizer).__name__ == _MATRICES_ONLY for optimizer in optimizers):
        return (
            f"{_MATRICES_ONLY} orthogonalizes matrices, and scales are none; give them to your other optimizer: "
            "[p for name, p in self.named_parameters() if 'quantizer' in name]"
        )
    return (
        "the optimizer was built outside configure_optimizers(); build it inside, or call prepare(model, recipe) "
        "before you build it and give the quantizers' parameters a group of their own with weight_decay=0"
    )


def align_rates(model: nn.Module, optimizers: list[Optimizer], lr_multiplier: float) -> None:
    """Let scales that came while training follow the rate of their weights, which the callback that added them sets."""
    owned = followers(model)
    for optimizer in optimizers:
        groups = optimizer.param_groups
        for scales, weights in itertools.pairwise(groups):
            followed = {id(f) for p in weights["params"] for f in owned.get(id(p), ())}
            ours = str(scales.get("name", "")).endswith(_SUFFIX)
            if ours and all(id(p) in followed for p in scales["params"]):
                scales["lr"] = weights["lr"] * lr_multiplier
