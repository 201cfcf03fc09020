"""The weight view: parameters that read as fake-quantized while they stay what they are.

A module's class becomes a cached subclass of its own class in which the weight's name is a property. The Parameter stays
in ``module._parameters``, so that optimizers, ``state_dict`` keys, EMA, sharding and tied weights see nothing new.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

QUANTIZER_SUFFIX: Final = "_quantizer"
INPUT_QUANTIZER: Final = "input_quantizer"
TRANSFORMS: Final = "quantizer_transforms"
_READS_LATENT: Final = "_reads_latent"
_NEEDS_LATENT: Final = ("torch.nn.utils.prune", "torch.distributed")


def is_view(module: nn.Module) -> bool:
    """Whether a module's weights are read through the view."""
    return hasattr(type(module), "_view_names")


def view_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that are read through the view."""
    return getattr(type(module), "_view_names", ())


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
    above = getattr(_base(type(module)), name, None)  # a parametrization is a property of the class above
    if isinstance(above, property) and above.fget is not None:
        result: Tensor = above.fget(module)
        return result
    raise AttributeError(f"{type(module).__name__} holds no {name!r}")


def fake_quantized(module: nn.Module, name: str) -> Tensor:
    """Return a weight as the layer computes with it: transformed and fake-quantized."""
    weight = latent(module, name)
    quantizer = module._modules[name + QUANTIZER_SUFFIX]
    assert quantizer is not None  # noqa: S101 - attach() sets it
    if quantizer.enabled:
        for transform in _transforms(module):
            weight = transform.weight(weight)
    result: Tensor = quantizer(weight)
    return result


def _transforms(module: nn.Module) -> Any:
    return module._modules.get(TRANSFORMS) or ()


def _read(module: nn.Module, name: str) -> Tensor:
    if not torch.compiler.is_compiling():
        if _READS_LATENT in module.__dict__:
            return latent(module, name)
        caller = sys._getframe(2)
        reader = caller.f_globals.get("__name__", "")
        if reader.startswith(_NEEDS_LATENT):
            # Pruning ranks latent weights; FSDP takes what it reads for the parameter itself.
            return latent(module, name)
        if reader == "torch.nn.utils.parametrize":
            _refuse_parametrization(module, name, caller.f_code.co_name)
        if _is_sharded(module, name):
            return _read_sharded(module, name, caller.f_code.co_name)
    return fake_quantized(module, name)


def _refuse_parametrization(module: nn.Module, name: str, function: str) -> None:
    if function == "register_parametrization":
        raise RuntimeError(
            f"{where(module)}.{name}: a parametrization registered after prepare() would replace the quantized weight "
            "silently; register it first, then prepare()"
        )


def _is_sharded(module: nn.Module, name: str) -> bool:
    parameter = module._parameters.get(name)
    return parameter is not None and type(parameter) is not nn.Parameter and hasattr(parameter, "placements")


def _read_sharded(module: nn.Module, name: str, function: str) -> Tensor:
    if function == "forward":
        raise RuntimeError(
            f"{where(module)}.{name} is a sharded DTensor inside forward: tensor parallelism of quantized weights is not "
            "supported, because a shard would train in float; use fully_shard (FSDP2) or DDP"
        )
    return latent(module, name)


def where(module: nn.Module) -> str:
    """Return the dotted name that a prepared module had in its model."""
    for child in module._modules.values():
        name = getattr(child, "owner", None)
        if isinstance(name, str):
            return name
    return type(module).__name__


def _getter(name: str) -> Callable[[nn.Module], Tensor]:
    def get(module: nn.Module) -> Tensor:
        return _read(module, name)

    return get


def _setter(name: str) -> Callable[[nn.Module, Tensor], None]:
    def set_(module: nn.Module, value: Tensor) -> None:
        above = getattr(_base(type(module)), name, None)
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


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    target = name.removesuffix("_orig")
    if target != name and target in view_names(self):  # pruning starts
        quantizer = self._modules[target + QUANTIZER_SUFFIX]
        if not quantizer.grid.has_zero:  # type: ignore[union-attr]
            raise ValueError(
                f"{where(self)}.{target}: the grid {quantizer.grid!r} has no zero, so that pruned weights "  # type: ignore[union-attr]
                "cannot stay zero; use a grid with zero (Int, Ternary) for layers that are pruned"
            )
    _base(type(self)).register_parameter(self, name, param)  # not super(): FSDP puts a class of its own on top
    if param is not None and hasattr(param, "placements") and name in view_names(self):
        raise RuntimeError(
            f"{where(self)}.{name}: tensor parallelism of quantized weights is not supported, because a shard would train "
            "in float; use fully_shard (FSDP2) or DDP"
        )


def _reading_latents(method: str) -> Callable[..., Any]:
    """Wrap an initializer so that it writes into the latent weights; scales are found anew afterwards."""

    def initialize(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[_READS_LATENT] = True
        try:
            return getattr(_base(type(self)), method)(self, *args, **kwargs)
        finally:
            del self.__dict__[_READS_LATENT]
            mark_stale(self)

    return initialize


def mark_stale(module: nn.Module) -> None:
    """Let stored weight scales be found anew before their next use."""
    for name in view_names(module):
        quantizer = module._modules[name + QUANTIZER_SUFFIX]
        if quantizer is not None:
            quantizer.stale = True


def _reduce(self: nn.Module, protocol: Any) -> Any:
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _rebuild, (_base(type(self)), view_names(self)), state


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    view = view_class(base, names)
    return view.__new__(view)


@functools.cache
def view_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of a module class in which the named parameters read as fake-quantized."""
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_view_base": base,
        "_view_names": names,
        "register_parameter": _register_parameter,
    }
    for name in names:
        namespace[name] = property(_getter(name), _setter(name), _deleter(name))
    for method in ("reset_parameters", "_reset_parameters"):
        if hasattr(base, method):
            namespace[method] = _reading_latents(method)
    return type(base.__name__, (base,), namespace)


def _base(cls: type) -> type[nn.Module]:
    for kind in cls.__mro__:
        if "_view_base" in vars(kind):
            base: type[nn.Module] = vars(kind)["_view_base"]
            return base
    return cls


def attach(module: nn.Module, names: tuple[str, ...]) -> None:
    """Turn a module into its view. Quantizers named ``<parameter>_quantizer`` must be registered before."""
    module.__class__ = view_class(type(module), names)


def detach(module: nn.Module) -> None:
    """Give a module its own class back.

    Raises:
        RuntimeError: if another class was put on top since, as ``fully_shard`` and parametrizations do.
    """
    if "_view_base" not in vars(type(module)):
        raise RuntimeError(
            f"{where(module)}: its class was changed to {type(module).__name__} after prepare(); undo that first"
        )
    module.__class__ = _base(type(module))
