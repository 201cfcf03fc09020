"""Time of a training step, quantized / float, and of fake quantization alone in copies of the tensor.

    python -m benchmarks.speed --model S --precision fp32 --mode eager
    python -m benchmarks.speed --model S --one-token
    python -m benchmarks.speed --only ternary seq2 binary --softness 0.3
    python -m benchmarks.speed --model L --precision bf16-mixed --mode regions   # a GPU
    python -m benchmarks.speed --elements 2048

All variants take turns in one process, the base before each of them; a row is the median of the ratios of such
neighbors. On a CPU the clock is the CPU time of the process, because other processes may share the cores; with more
than one thread, that is not wall time.

Where weights alone are quantized, the time that this adds does not depend on the number of tokens: with one token (a
batch of one, a sequence of one) the products are small, and the difference of the fastest steps tells it from noise.

A model runs eagerly, eagerly with or without compiled kernels (CPUs have none by themselves, GPUs do), with every block
compiled by itself, or compiled as a whole.

A softness is that of weights while ``GradualQuantization`` lets their rounding set in.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import SHAPES, Model, soften, training_step
from benchmarks.output import machine, save, show
from benchmarks.quantizers import quantizers
from benchmarks.variants import variants
from lightning_qat.functional.kernels import compiled_kernels


def seconds(run: Callable[[], object], device: str) -> float:
    """Return how long a call takes."""
    if device != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


Pairs = dict[str, list[tuple[float, float]]]


def measure(runs: dict[str, Callable[[], object]], device: str, *, budget: float, least: int) -> Pairs:
    """Let all take turns until a time budget is spent; return pairs of times, of the first just before and of each."""
    for run in runs.values():
        run()
    base = next(iter(runs.values()))
    pairs: Pairs = {name: [] for name in runs}
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(next(iter(pairs.values()))) < least:
        for name, run in runs.items():
            pairs[name].append((seconds(base, device), seconds(run, device)))
    return pairs


def rows_of(pairs: Pairs) -> list[dict[str, Any]]:
    """Return quartiles of the ratios to the base, the ratio of the fastest runs, and the median time.

    The first row compares the base with itself: what differs from 1 there is noise.
    """
    fastest, rows = min(before for taken in pairs.values() for before, _ in taken), []
    for name, taken in pairs.items():
        ratios = sorted(own / before for before, own in taken)
        low, middle, high = statistics.quantiles(ratios, n=4)
        own = [own for _, own in taken]
        rows.append(
            {
                "variant": name, "ratio": middle, "quartile": low, "third quartile": high, "min": ratios[0],
                "max": ratios[-1], "of fastest": min(own) / fastest, "added ms": 1e3 * (min(own) - fastest),
                "ms": 1e3 * statistics.median(own), "runs": len(own),
            }
        )  # fmt: skip
    return rows


def _check_only(only: list[str] | None, known: Iterable[str]) -> None:
    """Leave with a message where a name is none of a variant: a misspelled one would measure the base alone."""
    if unknown := set(only or ()) - set(known):
        raise SystemExit(f"--only: no variant {', '.join(sorted(unknown))}; choose from {', '.join(known)}")


def step_times(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure training steps."""
    shape = SHAPES[arguments.model]
    shape = replace(shape, batch=1, sequence=1) if arguments.one_token else shape
    batches = [shape.example(arguments.device) for _ in range(arguments.micro_batches)]
    runs, built = {}, variants()
    _check_only(arguments.only, built)
    torch._dynamo.config.recompile_limit = 2 * len(built)  # all share the code of the model: it is compiled for each
    for name, build in built.items():
        if name != "float" and arguments.only and name not in arguments.only:
            continue
        torch.manual_seed(0)
        with torch.device(arguments.device):
            model = build(Model(shape))
        if arguments.softness is not None:
            soften(model, arguments.softness)
        if arguments.mode == "regions":
            model.compile_regions()
        forward = torch.compile(model, fullgraph=True) if arguments.mode == "compiled" else model
        runs[name] = training_step(model, batches, arguments.precision, forward)
    kernels = {"kernels": compiled_kernels(), "operations": compiled_kernels(None)}
    with kernels.get(arguments.mode, nullcontext()):
        pairs = measure(runs, arguments.device, budget=arguments.seconds, least=arguments.repetitions)
    return rows_of(pairs)


def quantizer_times(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure forward and backward of fake quantization alone."""
    x = nn.Parameter(torch.randn(arguments.elements, arguments.elements, device=arguments.device))
    grad, modules = torch.randn_like(x), quantizers(x)
    modules |= {f"{name} compiled": torch.compile(modules[name]) for name in modules}
    _check_only(arguments.only, modules)
    chosen = {name: module for name, module in modules.items() if not arguments.only or name in arguments.only}

    def run(module: nn.Module) -> Callable[[], object]:
        wanted = list({x, *module.parameters()})
        return lambda: torch.autograd.grad(module(x), wanted, grad)  # backward() would copy the gradient of x once more

    def repeated(once: Callable[[], object]) -> Callable[[], object]:
        return lambda: [once() for _ in range(10)][-1]  # a GPU is faster than a call from Python

    runs: dict[str, Callable[[], object]] = {"clone": lambda: x.detach().clone()}
    runs |= {name: run(module) for name, module in chosen.items()}
    runs = {name: repeated(once) for name, once in runs.items()} if arguments.device == "cuda" else runs
    return rows_of(measure(runs, arguments.device, budget=arguments.seconds, least=arguments.repetitions))


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="S")
    parser.add_argument("--precision", choices=("fp32", "bf16-mixed"), default="fp32")
    parser.add_argument("--mode", choices=("eager", "kernels", "operations", "regions", "compiled"), default="eager")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--one-token", action="store_true", help="a batch and a sequence of one")
    parser.add_argument("--softness", type=float, help="of the rounding of weights, in (0, 1]")
    parser.add_argument("--elements", type=int, help="measure fake quantization of a square matrix instead")
    parser.add_argument("--only", nargs="*", help="names of variants, beside float")
    parser.add_argument("--seconds", type=float, default=120.0, help="measure for so long, compilation not counted")
    parser.add_argument("--repetitions", type=int, default=5, help="but at least so often")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = quantizer_times(arguments) if arguments.elements else step_times(arguments)
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    show(rows)
    if arguments.output:
        keys = ("model", "precision", "mode", "micro_batches", "one_token", "softness", "elements")
        settings = {key: getattr(arguments, key) for key in keys}
        save(arguments.output, settings, rows, "ratio")


if __name__ == "__main__":
    main()
