"""Bytes that autograd keeps for backward, quantized / float, parameters not counted.

    python -m benchmarks.memory --model S --precision fp32 --mode eager

Counted is the storage of every saved tensor, once.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import SHAPES, Model, soften
from benchmarks.output import machine, save, show
from benchmarks.variants import variants


def bytes_kept(model: nn.Module, forward: nn.Module, batch: Tensor, precision: str) -> int:
    """Return the size of all storages that backward of one forward pass waits with, without those of parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), batch)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run() -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss: Tensor = forward(batch)
        return loss

    run().backward()  # compiles; the first pass may keep more
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()  # held, so that no storage is freed and counted under another's address
    total = sum(kept.values())
    loss.backward()
    return total


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="S")
    parser.add_argument("--precision", choices=("fp32", "bf16-mixed"), default="fp32")
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--only", nargs="*", help="names of variants, beside float")
    parser.add_argument("--softness", type=float, help="of the rounding of weights, in (0, 1]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, build in variants().items():
        if name != "float" and arguments.only and name not in arguments.only:
            continue
        torch.manual_seed(0)
        torch.compiler.reset()  # all variants share the code of the model, which is compiled anew for each
        model = build(Model(SHAPES[arguments.model]).to(arguments.device))
        if arguments.softness is not None:
            soften(model, arguments.softness)
        batch = model.shape.example(arguments.device)
        forward = torch.compile(model, fullgraph=True) if arguments.mode == "compiled" else model
        size = bytes_kept(model, forward, batch, arguments.precision)
        rows.append({"variant": name, "ratio": size / (rows[0]["MB"] * 1e6 if rows else size), "MB": size / 1e6})
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    show(rows)
    if arguments.output:
        settings = {key: getattr(arguments, key) for key in ("model", "precision", "mode", "softness")}
        save(arguments.output, settings, rows, "ratio")


if __name__ == "__main__":
    main()
