"""Static input scales from several domains: what each one gave, and an artifact that a later run takes them from.

Run: python examples/calibration_domains.py
"""

import argparse
import json
import tempfile
from pathlib import Path

import lightning as L

from lightning_qat import Calibration, Int, LayerSpec, Learned, PerTensor, QATCallback, QuantizerSpec, Recipe, Rule
from lightning_qat.data import DigitsData, train_dataloader
from lightning_qat.models import SequenceClassifier

INPUT = QuantizerSpec(Int(8), PerTensor(), Learned())
RECIPE = Recipe((Rule("*", LayerSpec(weight=QuantizerSpec(Int(4)), input=INPUT)),))


def main() -> None:
    """Calibrate on dark and on faint images, then train another model from the artifact."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    data = DigitsData()
    dark = [(samples, labels) for samples, labels in train_dataloader(data)]
    domains = {"dark": dark, "faint": [(0.3 * samples, labels) for samples, labels in dark[:2]]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.safetensors"
        options = {
            "max_epochs": 10,
            "limit_train_batches": 2 if fast else 1.0,
            "max_steps": 2 if fast else -1,
            "logger": False,
            "enable_checkpointing": False,
        }
        for calibration in (Calibration(4, domains, path=path), Calibration(artifact=path)):
            trainer = L.Trainer(callbacks=[QATCallback(RECIPE), calibration], **options)
            trainer.fit(model := SequenceClassifier(), data)
            trainer.test(model, data)
            print(calibration.samples)
        print(json.dumps(json.loads(path.with_suffix(".json").read_text())["domains"], indent=2))


if __name__ == "__main__":
    main()
