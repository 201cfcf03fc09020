"""The weight view: parameters that read as fake-quantized while they stay what they are.

A module's class becomes a cached subclass of its own class in which the weight's name is a property. The Parameter
stays in ``module._parameters``, so that optimizers, ``state_dict`` keys, EMA, sharding, tied weights see nothing new.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_qat.conversion.derived import derive
from lightning_qat.conversion.sharding import find_scale_of, is_sharded, refuse_mixed_dtypes, refuse_shard, whole
from lightning_qat.functional.levels import narrow
from lightning_qat.quantization.grid import Grid
from lightning_qat.quantization.low_rank import LowRank
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.transform import Transform

QUANTIZER_SUFFIX: Final = "_quantizer"
INPUT_QUANTIZER: Final = "input_quantizer"
TRANSFORMS: Final = "quantizer_transforms"
ADAPTER_SUFFIX: Final = "_quantizer_lora"
FUSED: Final = "_fused"  # marks views whose forward quantizes the input itself
FUSED_FORWARDS: Final[dict[Any, Callable[..., Tensor]]] = {}
"""What takes the place of a stock forward in views of ``weight`` alone; ``fused.py``, which reads views, fills it."""

_READS_LATENT: Final = "_reads_latent"

# Who reads a weight to change or replace it, not to compute with it: pruning ranks latent weights, weight_norm splits
# them, FSDP takes what it reads for the parameter itself, get_parameter() promises a Parameter.
_READERS_OF_LATENTS: Final = (
    "torch.nn.utils.",
    "torch.nn.modules.module",
    "torch.distributed",
    "lightning.pytorch.callbacks.pruning",
    "pytorch_lightning.callbacks.pruning",
)
_VIEWS: WeakValueDictionary[tuple[type, tuple[str, ...]], type[nn.Module]] = WeakValueDictionary()


def is_view(module: nn.Module) -> bool:
    """Whether a module's weights are read through the view."""
    return hasattr(type(module), "_view_names")


def view_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that are read through the view."""
    return getattr(type(module), "_view_names", ())


def weight_quantizer(module: nn.Module, name: str) -> FakeQuantizer:
    """Return the quantizer of a weight that is read through the view."""
    quantizer = module._modules[name + QUANTIZER_SUFFIX]
    assert isinstance(quantizer, FakeQuantizer)  # noqa: S101 - attach() asks for it
    return quantizer


def adapter(module: nn.Module, name: str) -> LowRank | None:
    """Return what LoRA adds to a weight before it is quantized, or None."""
    child = module._modules.get(name + ADAPTER_SUFFIX)
    return child if isinstance(child, LowRank) else None


def latent(module: nn.Module, name: str) -> Tensor:
    """Return the full-precision tensor behind a view (or behind an ordinary attribute).

    Raises:
        AttributeError: if the module holds no such tensor.
    """
    parameter = module._parameters.get(name)
    if parameter is not None:
        return parameter
    if name in module.__dict__:  # weight_norm, spectral_norm and pruning keep a plain tensor there
        value: Tensor = module.__dict__[name]
        return value
    above = getattr(base_class(type(module)), name, None)  # a parametrization is a property of the class above
    if isinstance(above, property) and above.fget is not None:
        result: Tensor = above.fget(module)
        return result
    raise AttributeError(f"{type(module).__name__} holds no {name!r}")


@torch.no_grad()
def settled(module: nn.Module, name: str) -> Tensor:
    """Return the latent tensor as the next evaluation computes with it, without gradient.

    Where pruning, weight_norm or spectral_norm recompute it before each forward, what lies in the module is older than
    the last optimizer step; in training, spectral_norm moves with every read. LoRA adapters are merged.
    """
    found: Tensor | None = None
    for hook in module._forward_pre_hooks.values():
        hook_: Any = hook
        if getattr(hook, "_tensor_name", None) == name and hasattr(hook, "apply_mask"):
            found = hook_.apply_mask(module)
        elif getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
            still = {"do_power_iteration": False} if hasattr(hook, "n_power_iterations") else {}
            found = hook_.compute_weight(module, **still)
    if found is None:
        with _evaluating(module._modules.get("parametrizations")):
            found = latent(module, name)
    return with_adapter(module, name, found.detach())


def with_adapter(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """Return the float weight that a stored one stands for, without gradient."""
    low_rank = adapter(module, name)
    return weight if low_rank is None else low_rank.merged(weight)


@contextmanager
def _evaluating(parametrizations: nn.Module | None) -> Iterator[None]:
    flags = {module: module.training for module in (parametrizations.modules() if parametrizations else ())}
    try:
        for module in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def transformed(module: nn.Module, weight: Tensor) -> Tensor:
    """Return what the quantizer of a weight sees."""
    transforms: Any = module._modules.get(TRANSFORMS) or ()
    for transform in transforms:
        weight = transform.weight(weight)
    return weight


def find_scale(module: nn.Module, name: str) -> None:
    """Find the stored scale of a weight from the present latent weight."""
    quantizer = weight_quantizer(module, name)
    if quantizer.stored:
        find_scale_of(quantizer, transformed(module, whole(settled(module, name))))
    quantizer.stale = False


def fake_quantized(module: nn.Module, name: str) -> Tensor:
    """Return a weight as the layer computes with it: transformed and fake-quantized."""
    weight, quantizer, low_rank = latent(module, name), weight_quantizer(module, name), adapter(module, name)
    weight = weight if low_rank is None else low_rank(weight)
    result: Tensor = quantizer(transformed(module, weight) if quantizer.enabled else weight)
    return result if low_rank is None else narrow(result, low_rank.dtype)


def _fake_quantized_without_gradient(module: nn.Module, name: str) -> Tensor:
    """Return a weight that looks like a Parameter to torch.

    torch.matmul chooses its kernel by ``requires_grad``, even under no_grad and inference_mode: outputs would differ in
    the last bit from those of the plain module that holds the same values.
    """
    with torch.inference_mode(False), torch.no_grad():
        value = fake_quantized(module, name)
        parameter = module._parameters.get(name)
        trains = parameter is None or parameter.requires_grad
        return value.requires_grad_() if trains and not torch._C._are_functorch_transforms_active() else value


def _read(module: nn.Module, name: str, caller: FrameType) -> Tensor:
    reader, function = caller.f_globals.get("__name__", ""), caller.f_code.co_name
    if reader == "torch.nn.utils.parametrize" and function in ("register_parametrization", "remove_parametrizations"):
        raise RuntimeError(
            f"{where(module)}.{name}: parametrizations of a prepared weight cannot change, because they would replace "
            "the quantized weight silently; change them before prepare(), or unprepare() first"
        )
    if reader.startswith("torch.distributed.fsdp"):
        _before_sharded_training(module, name)
    if _READS_LATENT in module.__dict__ or reader.startswith(_READERS_OF_LATENTS):
        return latent(module, name)
    parameter = module._parameters.get(name)
    if parameter is not None and is_sharded(parameter):
        if function == "forward":
            refuse_shard(f"{where(module)}.{name}")
        return parameter
    return fake_quantized(module, name) if torch.is_grad_enabled() else _fake_quantized_without_gradient(module, name)


def _before_sharded_training(module: nn.Module, name: str) -> None:
    weight, quantizer = latent(module, name), weight_quantizer(module, name)
    refuse_mixed_dtypes(f"{where(module)}.{name}", weight, quantizer)
    if quantizer.stale and not weight.is_meta:  # later, only a copy of the scale that FSDP throws away could be set
        find_scale(module, name)


def where(module: nn.Module) -> str:
    """Return the dotted name that a prepared module had in its model."""
    owners = (child.owner for child in module._modules.values() if isinstance(child, FakeQuantizer))
    return next(owners, "") or type(module).__name__


def _getter(name: str) -> Callable[[nn.Module], Tensor]:
    def get(module: nn.Module) -> Tensor:
        if torch.compiler.is_compiling():
            return fake_quantized(module, name)
        try:
            return _read(module, name, sys._getframe(1))
        except AttributeError as error:
            if name not in module._parameters:
                raise
            # nn.Module.__getattr__ would be asked next, and would answer with the latent weight.
            raise RuntimeError(f"{where(module)}.{name}: cannot be fake-quantized: {error}") from error

    return get


def _setter(name: str) -> Callable[[nn.Module, Tensor], None]:
    def set_(module: nn.Module, value: Tensor) -> None:
        above = getattr(base_class(type(module)), name, None)
        if isinstance(above, property) and above.fset is not None:
            above.fset(module, value)
        else:
            module.__dict__[name] = value

    return set_


def _deleter(name: str) -> Callable[[nn.Module], None]:
    def delete(module: nn.Module) -> None:
        if name not in module.__dict__:
            raise AttributeError(name)
        del module.__dict__[name]

    return delete


def _caller_outside_modules() -> str:
    """Return which Python module made nn.Module.__setattr__ or register_parameter be called."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "torch.nn.modules.module":
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    caller, target = _caller_outside_modules(), name.removesuffix("_orig")
    if caller == "torch.nn.utils.prune" and target != name and target in view_names(self):
        transforms: Any = self._modules.get(TRANSFORMS) or ()
        problem = zero_problem(weight_quantizer(self, target).grid, [transform.value for transform in transforms])
        problem = "a LoRA adapter is added to them; merge_lora(model) first" if adapter(self, target) else problem
        if problem:
            raise ValueError(f"{where(self)}.{target}: pruned weights cannot stay zero, because {problem}")
    base_class(type(self)).register_parameter(self, name, param)  # not super(): FSDP puts a class of its own on top
    if param is None or name not in view_names(self):
        return
    if is_sharded(param) and not caller.startswith("torch.distributed.fsdp"):
        refuse_shard(f"{where(self)}.{name}")
    if not caller.startswith(_READERS_OF_LATENTS):  # another weight was assigned
        mark_stale(self)


def zero_problem(grid: Grid, transforms: Iterable[Transform]) -> str | None:
    """Return why a zero in the latent weight does not stay zero, or None."""
    if not grid.has_zero:
        return f"the grid {grid!r} has no zero; use a grid with zero, such as Int or Ternary"
    moving = [transform for transform in transforms if transform.changes_weight]
    return f"the transform {moving[0]!r} moves it; leave out the transform for this layer" if moving else None


def _reading_latents(method: str) -> Callable[..., Any]:
    """Wrap an initializer so that it writes into the latent weights; scales are found anew afterwards."""

    def initialize(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outermost = _READS_LATENT not in self.__dict__
        vars(self)[_READS_LATENT] = True
        try:
            return getattr(base_class(type(self)), method)(self, *args, **kwargs)
        finally:
            if outermost:
                del self.__dict__[_READS_LATENT]
                mark_stale(self)

    return initialize


def mark_stale(module: nn.Module) -> None:
    """Let stored weight scales be found anew before their next use."""
    for name in view_names(module):
        weight_quantizer(module, name).outdate()


def _reduce(self: nn.Module, protocol: Any) -> Any:
    return _rebuild, (base_class(type(self)), view_names(self)), self.__getstate__()


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    view = view_class(base, names)
    return view.__new__(view)


def view_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of a module class in which the named parameters read as fake-quantized; always the same."""
    known = _VIEWS.get((base, names))
    if known is not None:
        return known
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_view_base": base,
        "_view_names": names,
        "register_parameter": _register_parameter,
    }
    fused = FUSED_FORWARDS.get(base.forward) if names == ("weight",) else None
    if fused is not None:
        namespace |= {"forward": fused, FUSED: True}
    for name in names:
        namespace[name] = property(_getter(name), _setter(name), _deleter(name))
    for method in ("reset_parameters", "_reset_parameters"):
        if hasattr(base, method):
            namespace[method] = _reading_latents(method)
    return _VIEWS.setdefault((base, names), derive(base, namespace))


def base_class(cls: type) -> type[nn.Module]:
    """Return the class that a view was made of, or the class itself."""
    for kind in cls.__mro__:
        if "_view_base" in vars(kind):
            base: type[nn.Module] = vars(kind)["_view_base"]
            return base
    return cls


def attach(module: nn.Module, names: tuple[str, ...]) -> None:
    """Turn a module into its view. Quantizers named ``<parameter>_quantizer`` must be registered before."""
    module.__class__ = view_class(type(module), names)


def check_detachable(module: nn.Module) -> None:
    """Raise if a view cannot be given its own class back.

    Raises:
        RuntimeError: if another class was put on top since, as ``fully_shard`` does.
    """
    if is_view(module) and "_view_base" not in vars(type(module)):
        raise RuntimeError(
            f"{where(module)}: its class was changed to {type(module).__name__} after prepare(); undo that first"
        )


def detach(module: nn.Module) -> None:
    """Give a module its own class back."""
    check_detachable(module)
    module.__class__ = base_class(type(module))
