"""What is left of a model at 8 to 1 bits: our recipes, peers and the float model, for the same training budget.

    python -m benchmarks.accuracy --task text --width int2 ternary --seed 0 1 2     # adds to benchmarks/accuracy.json
    python -m benchmarks.accuracy --report                                           # table and plot of what is there

A float model is trained for a fixed number of steps. From its weights, each with a third of those steps, the same
optimizer, schedule and batches: training goes on in float (the reference, with and without a teacher), or with
quantization by a method. The teacher is the float model as it was. Weights of all linear layers but the head are
quantized, one scale per output channel (bitnet: per tensor). Figures are losses on the test data in nats; excess is the
loss above the float reference of the same seed. Ours is ``QATCallback(recipe), GPTQ(), OrthogonalUpdates(),
GradualQuantization(), Distillation(fade_below=1.0)`` (1 bit: ``Distillation()``), at 3, 2 and 1 bits with
``groups=[ParameterGroup(kind="others", lr_multiplier=4.0)]``, at 1.58 bits with 8.0, from 3 to 1.58 bits with
``features=(FeatureMatch(fade_below=0.1),)``, at 4 bits with ``scale_lr_multiplier=0.1``, the same for every task, with
the defaults of the package otherwise; all was chosen on validation data.
"""

import argparse
import json
import logging
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.accuracy_methods import (
    AFTER_TRAINING,
    WIDTHS,
    applies,
    callbacks_of,
    methods,
    without_teacher,
)
from benchmarks.accuracy_report import plot, report
from benchmarks.accuracy_tasks import RATE, RATES, TASKS, Task
from benchmarks.output import machine
from benchmarks.peers import PEERS, parq
from lightning_qat import QATCallback


def _module(task: Task, seed: int, rate: float, weight_decay: float) -> L.LightningModule:
    L.seed_everything(seed, verbose=False)
    return task.model(learning_rate=rate * task.learning_rate, weight_decay=weight_decay)


def quiet_trainer(steps: int, callbacks: list[Any]) -> L.Trainer:
    """Return a trainer on the CPU that shows and keeps nothing."""
    return L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, limit_val_batches=0,
    )  # fmt: skip


def _fit(task: Task, module: L.LightningModule, seed: int, stage: int, callbacks: list[Any]) -> None:
    L.seed_everything(seed, verbose=False)
    steps = (task.steps, task.steps // 3)[stage]
    quiet_trainer(steps, callbacks).fit(module, datamodule=task.data(seed, task.batch_sizes[stage], steps))


def _evaluate(task: Task, module: L.LightningModule, callbacks: list[Any]) -> dict[str, float]:
    converting = [each for each in callbacks if isinstance(each, QATCallback)]
    found = quiet_trainer(1, converting).test(module, datamodule=task.data(0, 64, 1), verbose=False)[0]
    return {name.removeprefix("test_"): float(value) for name, value in found.items()}


def float_model(task: Task, name: str, width: str, seed: int, folder: Path) -> L.LightningModule:
    """Return the float model of a seed, ready to go on from; trained at the first call."""
    path = folder / f"{name}{seed}_{task.steps}.pt"
    if not path.is_file():
        module = _module(task, seed, 1.0, 0.1)
        _fit(task, module, seed, 0, [])
        torch.save(module.state_dict(), path)
    module = _module(task, seed, RATES.get(width, RATE) * task.rate, 0.0)
    module.load_state_dict(torch.load(path, weights_only=True))
    return module


def run(name: str, width: str, method: str, seed: int, folder: Path) -> dict[str, float]:
    """Return the test metrics of one training."""
    task = TASKS[name]
    module = float_model(task, name, width, seed, folder)
    callbacks = callbacks_of(method, width, module, task.mask)
    peer = PEERS.get(without_teacher(method))
    if peer is not None:
        if peer.convert is None:
            parq(module, width)
        else:
            peer.convert(module, width, _example(task))
    if not method.startswith(AFTER_TRAINING):
        _fit(task, module, seed + 1000, 1, callbacks)
    return _evaluate(task, module, callbacks)


def _example(task: Task) -> torch.Tensor:
    data: Any = task.data(0, 4, 1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    example: torch.Tensor = batch["tokens"] if isinstance(batch, dict) else batch[0]
    return example


def _jobs(arguments: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    return [
        (task, width, method, seed)
        for task in arguments.task
        for width in arguments.width
        for method in (arguments.method or methods(width))
        for seed in arguments.seed
        if applies(method, width)
    ]


def main() -> None:
    """Carry out what is asked for and not there yet, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=sorted(TASKS), default=["digits", "text", "arithmetic"])
    parser.add_argument("--width", nargs="+", choices=("float", *WIDTHS), default=["float", *WIDTHS])
    parser.add_argument("--method", nargs="+", help="default: all")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, help="of what follows the float training; default: see TASKS")
    parser.add_argument("--learning-rate", type=float, default=1.0, help="factor of that of what follows")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/accuracy.json"))
    parser.add_argument("--cache", type=Path, default=Path("outputs/accuracy"), help="folder of the float models")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--report", action="store_true", help="only show what is there, and draw the plot")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/accuracy.png"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        then = arguments.batch_size or task.batch_sizes[1]
        TASKS[name] = replace(task, batch_sizes=(task.batch_sizes[0], then), rate=arguments.learning_rate)
    unknown = [each for each in arguments.method or () if not any(applies(each, w) for w in ("float", *WIDTHS))]
    if unknown:
        parser.error(f"no such method, or a peer that is not installed: {', '.join(unknown)}")
    if not arguments.report:
        for task, width, method, seed in _jobs(arguments):
            _carry_out(arguments, task, width, method, seed)
    results = _read(arguments.output)["results"]
    report(results)
    if arguments.report:
        plot(results, arguments.plot)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"machine": machine(), "results": {}}
    return content


def _carry_out(arguments: argparse.Namespace, task: str, width: str, method: str, seed: int) -> None:
    key = f"{task}/{width}/{method}"
    if str(seed) in _read(arguments.output)["results"].get(key, {}) and not arguments.again:
        return
    began = time.perf_counter()
    found = run(task, width, method, seed, arguments.cache)
    print(f"{key:45} seed {seed}  loss {found['loss']:.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    content = _read(arguments.output)  # read again: runs of other tasks may write beside this one
    content["results"].setdefault(key, {})[str(seed)] = found
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
