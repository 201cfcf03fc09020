"""Which jobs share a float training, and that a file appears whole or not at all."""

from pathlib import Path

import pytest

from lightning_qat.cli.build import FLOAT, stage_config
from lightning_qat.cli.float_cache import float_key, write_atomically
from tests.cli.conftest import Compose


def key(compose_job: Compose, *overrides: str, folder: str = "run") -> str:
    return float_key(stage_config(compose_job(*overrides, folder=folder), FLOAT))


@pytest.mark.parametrize(
    "override",
    ["recipe=int2", "recipe.group_size=8", "qat.model.learning_rate=0.1", "qat.trainer.max_epochs=9",
     "callbacks.calibration.num_batches=2", "+export.x=1"],
)  # fmt: skip
def test_shared(override: str, compose_job: Compose) -> None:
    assert key(compose_job, override, folder="elsewhere") == key(compose_job)


@pytest.mark.parametrize(
    "override",
    ["seed=1", "data.batch_size=8", "model.hidden_size=32", "model.learning_rate=0.1", "trainer.max_epochs=9",
     "+float.trainer.max_epochs=9", "float.callbacks=[]", "callbacks.learning_rate.logging_interval=epoch"],
)  # fmt: skip
def test_not_shared(override: str, compose_job: Compose) -> None:
    assert key(compose_job, override) != key(compose_job)


def test_write_atomically(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "weights.ckpt"
    write_atomically(target, lambda path: Path(path).write_text("first") and None)
    assert target.read_text() == "first"

    def fail(path: str) -> None:
        Path(path).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, fail)
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]
