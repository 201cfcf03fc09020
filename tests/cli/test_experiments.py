"""Every experiment runs, from the first stage to the exported artifact, on a few batches."""

from pathlib import Path

import pytest

from lightning_qat.cli.train import train
from tests.cli.conftest import Compose

EXPERIMENTS = sorted((Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment(path: Path, compose_job: Compose) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# @package _global_", f"# lightning-qat experiment={path.stem}"]
    assert lines[2].startswith("# "), "says what it shows"
    cfg = compose_job(f"experiment={path.stem}", "debug=fast", "data.batch_size=4", "callbacks.progress_bar=null",
                      "float.callbacks=[]", "logger=none")  # fmt: skip
    metrics, _ = train(cfg)
    assert metrics["baked_equals_trained"]
    assert metrics["qat"]["bits_per_weight"] < 32


def test_arithmetic(compose_job: Compose) -> None:
    """Batches that are dictionaries, outputs that are generated."""
    cfg = compose_job("data=arithmetic", "debug=fast", "data.num_train=8", "data.num_test=8", "data.num_val=8",
                      "data.batch_size=4", "model.num_layers=1", "model.hidden_size=16", "callbacks.progress_bar=null",
                      "float.callbacks=[]", "logger=none")  # fmt: skip
    metrics, _ = train(cfg)
    assert "exact_match" in metrics["qat"]
