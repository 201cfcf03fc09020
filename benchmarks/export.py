"""Size and quality of what is exported, for every recipe: the float model against the file that was written and loaded.

    python -m benchmarks.export --output benchmarks/export.json

The float models, data, batches and learning rates are those of benchmarks/accuracy.py (tasks digits and text). Each
recipe trains from the float model with ``recommended_callbacks(recipe)``, the head stays float, and is exported as
safetensors, which verifies itself. Quality is that of the loaded file on the test data.
"""

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.accuracy import TASKS, but_head, float_model, quiet_trainer
from benchmarks.output import machine, show
from lightning_qat import recipes, recommended_callbacks
from lightning_qat.export import export, load

METRICS = {"digits": "accuracy", "text": "bits_per_byte"}


def _test(module: L.LightningModule, name: str, seed: int) -> float:
    found = quiet_trainer(1, []).test(module, datamodule=TASKS[name].data(seed, 0, 64, 1), verbose=False)[0]
    return float(found[f"test_{METRICS[name]}"])


def _float_size(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def run(name: str, recipe: str, steps: int, seed: int, cache: Path, folder: Path) -> dict[str, Any]:
    """Train, export, load and test."""
    task = TASKS[name]
    module = float_model(task, name, recipe, seed, cache)
    callbacks = recommended_callbacks(but_head(recipes.named(recipe), module))
    L.seed_everything(seed + 1000, verbose=False)
    quiet_trainer(steps, callbacks).fit(module, datamodule=task.data(seed, seed + 1000, task.batch_size, steps))
    data: Any = task.data(seed, 0, 64, 1)
    data.setup("fit")
    batches = [next(iter(data.val_dataloader()))[0]]
    path = folder / f"{name}_{recipe}.safetensors"
    export(module, path, batches=batches)
    fresh = float_model(task, name, recipe, seed, cache)
    loaded = load(path, fresh)
    quality = _test(loaded, name, seed)
    return {"task": name, "recipe": recipe, "bytes": path.stat().st_size, METRICS[name]: quality}


def main() -> None:
    """Run what is asked for, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=sorted(METRICS), default=sorted(METRICS))
    parser.add_argument("--recipe", nargs="+", choices=recipes.names(), default=list(recipes.names()))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/export.json"))
    parser.add_argument("--cache", type=Path, default=Path("outputs/accuracy"), help="folder of the float models")
    parser.add_argument("--folder", type=Path, default=Path("outputs/export"), help="where the files go")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for folder in (arguments.cache, arguments.folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in arguments.task:
        module = float_model(TASKS[name], name, "float", arguments.seed, arguments.cache)
        quality = _test(module, name, arguments.seed)
        rows.append({"task": name, "recipe": "float", "bytes": _float_size(module), METRICS[name]: quality})
        for recipe in arguments.recipe:
            rows.append(run(name, recipe, arguments.steps, arguments.seed, arguments.cache, arguments.folder))
            print(rows[-1], flush=True)
            content = {"machine": machine(), "steps": arguments.steps, "seed": arguments.seed, "rows": rows}
            arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
