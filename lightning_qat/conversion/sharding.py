"""Weights that are spread over processes (DTensor): what is supported, and what is refused by name."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_qat.quantization.quantizer import FakeQuantizer


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "placements")


def refuse_shard(name: str) -> NoReturn:
    """Raise because a quantized weight is a shard where a layer computes with it.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"{name} is a DTensor where the layer computes with it: tensor parallelism of quantized weights is not "
        "supported, because a shard would train in float; use fully_shard (FSDP2) or DDP"
    )


def refuse_mixed_dtypes(name: str, weight: Tensor, quantizer: FakeQuantizer) -> None:
    """Refuse 16-bit weights beside learned float32 scales under FSDP, which shards one dtype at a time.

    Raises:
        RuntimeError: naming the weight and the remedy.
    """
    if quantizer.learned and weight.requires_grad and weight.dtype != quantizer.scale.dtype:
        raise RuntimeError(
            f"{name}: FSDP cannot shard {weight.dtype} weights together with learned float32 scales; train with "
            'precision="bf16-mixed" (float32 weights) instead of "bf16-true", or choose scales that are not learned'
        )


@torch.no_grad()
def find_scale_of(quantizer: FakeQuantizer, weight: Tensor | None = None) -> None:
    """Find a stored scale from a weight, or from what its observer has seen.

    Where weight or scale are sharded, all processes must call this.
    """
    if not is_sharded(quantizer.scale):
        quantizer.find_scale(weight)
        return
    from torch.distributed.tensor import distribute_tensor

    shape = () if weight is None else tuple(weight.shape)
    alone = FakeQuantizer(quantizer.spec, shape, quantizer.layout, name=quantizer.name).to(quantizer.scale.device)
    alone.set_grid(quantizer.grid)
    alone.observer = quantizer.observer
    alone.find_scale(weight)
    tensors: list[tuple[Any, Any]] = [(quantizer.scale, alone.scale), (quantizer.zero_point, alone.zero_point)]
    for target, found in tensors:
        if target is not None:
            sharded = is_sharded(target)
            target.copy_(distribute_tensor(found, target.device_mesh, target.placements) if sharded else found)
    quantizer.calibrated, quantizer.stale = True, False


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, which must all call this; an ordinary tensor as it is."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
