"""Time of the kernels on a GPU alone, by the profiler of torch: what is left when the host keeps ahead of the device.

python -m benchmarks.device_time                          # a step of 6 layers of L, bf16-mixed, blocks compiled
python -m benchmarks.device_time --elements 16384         # fake quantization of a square matrix, in copies
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import SHAPES, Model, training_step
from benchmarks.output import machine, save, show
from benchmarks.quantizers import quantizers
from benchmarks.variants import variants

_WARM_UP, _REPETITIONS = 3, 5


def kernels(run: Callable[[], object]) -> dict[str, float]:
    """Return milliseconds per call, by the name of the kernel."""
    for _ in range(_WARM_UP):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_REPETITIONS):
            run()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    return {event.key: event.device_time_total / 1e3 / _REPETITIONS for event in events if event.device_time_total}


def of_steps(num_layers: int, only: list[str] | None) -> list[dict[str, Any]]:
    """Measure training steps of some layers, with embedding and head."""
    shape = replace(SHAPES["L"], num_layers=num_layers)
    batch, built, rows = shape.example("cuda"), variants(), []
    torch._dynamo.config.recompile_limit = 2 * len(built)
    for name, build in built.items():
        if name != "float" and only and name not in only:
            continue
        with torch.device("cuda"):
            model = build(Model(shape))
        model.compile_regions()
        found = kernels(training_step(model, [batch], "bf16-mixed"))
        total = sum(found.values())
        generated = sum(time for key, time in found.items() if key.startswith("triton"))
        rows.append({"variant": name, "ratio": total / (rows[0]["ms"] if rows else total), "ms": total})
        rows[-1]["ms of generated kernels"] = generated
    return rows


def of_quantizers(size: int, only: list[str] | None) -> list[dict[str, Any]]:
    """Measure forward and backward of fake quantization alone, compiled."""
    x = nn.Parameter(torch.randn(size, size, device="cuda"))
    grad, copy = torch.randn_like(x), sum(kernels(lambda: x.detach().clone()).values())
    rows: list[dict[str, Any]] = [{"variant": "clone", "ratio": 1.0, "ms": copy}]
    for name, module in quantizers(x).items():
        if only and name not in only:
            continue
        run, wanted = torch.compile(module), list({x, *module.parameters()})
        total = sum(kernels(lambda run=run, wanted=wanted: torch.autograd.grad(run(x), wanted, grad)).values())
        rows.append({"variant": f"{name} compiled", "ratio": total / copy, "ms": total})
    return rows


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--elements", type=int, help="rows and columns of a matrix to quantize, instead of steps")
    parser.add_argument("--only", nargs="*", help="names of variants, beside the base")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.png")
    arguments = parser.parse_args()
    size, only = arguments.elements, arguments.only
    rows = of_quantizers(size, only) if size else of_steps(arguments.layers, only)
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    show(rows)
    if arguments.output:
        save(arguments.output, {"layers": arguments.layers, "elements": size}, rows, "ratio")


if __name__ == "__main__":
    main()
