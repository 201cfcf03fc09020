"""One of two ranks: `python -m tests.conversion.two_processes FOLDER RANK` runs and saves every scenario."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_qat import Int, LayerSpec, QuantizerSpec, bake, calibrate, codes, float_weights, prepare, unprepare
from tests.conversion.cases import LEARNED_INPUT, STORED, network, recipe_for
from tests.processes import leave

LEARNED = recipe_for(LayerSpec(QuantizerSpec(Int(4)), STORED))
LEARNED_INPUTS = recipe_for(LayerSpec(QuantizerSpec(Int(4)), LEARNED_INPUT))
WEIGHTS = recipe_for(LayerSpec(QuantizerSpec(Int(4))))
STEPS = 3


def batches() -> list[Tensor]:
    """The data of all ranks: rank r has every second row."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 6, generator=generator) for _ in range(STEPS)]


def start(recipe: Any = LEARNED) -> nn.Sequential:
    torch.manual_seed(7)
    model = network()
    prepare(model, recipe)
    calibrate(model, batches()[:1])
    return model


def train(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Some steps; returns the gradients of the first and the parameters after the last, unsharded."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    found = {}
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        model(batch[rows]).square().mean().backward()
        if step == 0:
            found = {f"grad {name}": whole(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
    return found | {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def whole(tensor: Any) -> Tensor:
    result: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result


def shard(model: nn.Sequential) -> nn.Sequential:
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def message(action: Callable[[], object]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fsdp_trains(rank: int) -> dict[str, Tensor]:
    return train(shard(start()), slice(rank, None, 2))


def older_fsdp_trains(rank: int) -> dict[str, Tensor]:
    """The wrapper that Lightning's FSDPStrategy uses: losses of every step, over all ranks."""
    model = FullyShardedDataParallel(start(), use_orig_params=True, device_id=torch.device("cpu"))
    return {"losses": losses(model, slice(rank, None, 2))}


def losses(model: nn.Module, rows: slice) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for batch in batches():
        optimizer.zero_grad()
        loss = model(batch[rows]).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    result = torch.stack(found)
    if distributed.is_initialized():
        distributed.all_reduce(result)
        result /= distributed.get_world_size()
    return result


def on_meta_then_sharded() -> nn.Sequential:
    with torch.device("meta"):
        model = network()
    prepare(model, WEIGHTS)
    shard(model).to_empty(device="cpu")
    return model


def fsdp_from_checkpoints(rank: int) -> dict[str, Tensor]:
    """Built on meta, sharded, materialized, loaded: scales are found from whole weights, or taken over."""
    torch.manual_seed(7)
    float_state, trained = network().state_dict(), start(WEIGHTS)
    with torch.no_grad():
        trained[0].weight_quantizer.scale.mul_(1.5)
    found = {}
    for kind, state in (("float", float_state), ("quantized", trained.state_dict())):
        for broadcast in (False, True):
            model = on_meta_then_sharded()
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast, strict=kind != "float")
            given = state if rank == 0 or not broadcast else {}
            set_model_state_dict(model, copy.deepcopy(given), options=options)
            found[f"{kind} broadcast={broadcast}"] = model(batches()[0]).detach()
            found |= {f"{kind} {n}": whole(p).detach().clone() for n, p in model.named_parameters() if "scale" in n}
    return found


def fsdp_initialized_after_sharding(rank: int) -> dict[str, Tensor]:
    """Scales that are stale at the first forward are found before FSDP gathers them."""
    model = on_meta_then_sharded()
    torch.manual_seed(7)
    plain = network()
    for layer, source in zip((model[0], model[2]), (plain[0], plain[2]), strict=True):
        layer.reset_parameters()
        for name, parameter in source.named_parameters():
            shards = parameter.detach().chunk(2)
            layer.get_parameter(name).to_local().data.copy_(shards[rank])
    first = model(batches()[0]).detach()
    return {"first": first, "second": model(batches()[0]).detach()}


def fsdp_refusals(rank: int) -> dict[str, str]:
    torch.manual_seed(7)
    half = network().bfloat16()
    prepare(half, WEIGHTS)
    shard(half)
    sharded = shard(start())
    return {
        "bf16": message(lambda: half(batches()[0].bfloat16())),
        "late": message(lambda: prepare(shard(network()), LEARNED)),
        "unprepare": message(lambda: unprepare(sharded)),
        "codes": message(lambda: codes(sharded)),
        "bake": message(lambda: bake(sharded)),
    }


def tensor_parallel_refusals(rank: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,))
    parallel = {"0": ColwiseParallel()}
    before = parallelize_module(network(), mesh, parallel)
    return {
        "after": message(lambda: parallelize_module(start(), mesh, parallel)),
        "before": message(lambda: prepare(before, LEARNED)),
    }


def ddp_trains(rank: int) -> dict[str, Tensor]:
    return train(DistributedDataParallel(start()), slice(rank, None, 2))


def ddp_with_float_weights(rank: int) -> dict[str, Tensor]:
    """Every parameter gets a gradient also while quantization is off: nobody waits."""
    model = DistributedDataParallel(start(LEARNED_INPUTS))
    for off in (True, False, True):
        model.zero_grad()
        with float_weights(model) if off else torch.enable_grad():
            model(batches()[0][rank::2]).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def calibrates(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(7)
    model = network()
    prepare(model, LEARNED)
    calibrate(model, [(1 + 9 * rank) * batch[rank::2] for batch in batches()])
    return {key: value for key, value in model.state_dict().items() if "input_quantizer" in key}


SCENARIOS = [
    fsdp_trains,
    older_fsdp_trains,
    fsdp_from_checkpoints,
    fsdp_initialized_after_sharding,
    fsdp_refusals,
    tensor_parallel_refusals,
    ddp_trains,
    ddp_with_float_weights,
    calibrates,
]


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {scenario.__name__: copy.deepcopy(scenario(rank)) for scenario in SCENARIOS}
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
