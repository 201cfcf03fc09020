"""Time of preparing a model of 0.5 B parameters, and of calibration in forward passes.

    python -m benchmarks.conversion --output benchmarks/conversion.json

Both in CPU time of the process. Calibration: of the inputs of all linear layers, over the time of as many forward
passes of the float model in evaluation, which take turns with it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import SHAPES, Model
from benchmarks.output import machine
from lightning_qat import (
    AbsMax,
    Int,
    LayerSpec,
    Learned,
    MinimumError,
    MovingAverage,
    Percentile,
    PerChannel,
    PerTensor,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    calibrate,
    prepare,
    recipes,
    unprepare,
)

RECIPES = {
    "int4, learned scale started at the least error": recipes.int4(),
    "int4, groups of 32": recipes.int4(group_size=32),
    "w8a8": recipes.w8a8(),
    "bitnet": recipes.bitnet(),
}
INPUT_SCALES = {
    "moving average": MovingAverage(),
    "percentile": Percentile(99.9),
    "least error": MinimumError(),
    "learned": Learned(init=MinimumError()),
}


def preparation(shape: str) -> dict[str, Any]:
    """Return seconds of prepare() by recipe, on a model of random weights; embedding and head stay float."""
    model = Model(SHAPES[shape])
    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    for name, recipe in RECIPES.items():
        began = time.process_time()
        prepare(model.blocks, recipe)
        found[name] = time.process_time() - began
        unprepare(model.blocks)
    return found


def calibration(shape: str, num_batches: int, repetitions: int) -> dict[str, float]:
    """Return the time of calibration over that of forward passes, by scale of the inputs."""
    weight = QuantizerSpec(Int(8), PerChannel(), AbsMax(), StraightThrough())
    found = {}
    for name, scale in INPUT_SCALES.items():
        reference, ratios = Model(SHAPES[shape]).eval(), []
        batches = [reference.shape.example("cpu") for _ in range(num_batches)]
        for _ in range(repetitions):
            model = Model(SHAPES[shape])
            inputs = QuantizerSpec(Int(8), PerTensor(), scale)
            prepare(model.blocks, Recipe((Rule("*", LayerSpec(weight, inputs)),)))
            began = time.process_time()
            calibrate(model, batches)
            middle = time.process_time()
            with torch.no_grad():
                for batch in batches:
                    reference(batch)
            ratios.append((middle - began) / (time.process_time() - middle))
        found[name] = statistics.median(ratios)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="L", help="the model that is prepared")
    parser.add_argument("--calibrated", choices=SHAPES, default="M", help="the model that is calibrated")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "machine": machine(),
        "prepare, seconds": preparation(arguments.model),
        "calibrate, forward passes": calibration(arguments.calibrated, arguments.batches, arguments.repetitions),
    }
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
