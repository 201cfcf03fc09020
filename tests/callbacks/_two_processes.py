"""Runs on two processes, started by test_qat_ddp.py: `python -m tests.callbacks._two_processes KIND FOLDER`."""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from lightning_qat import (
    GPTQ,
    BitAllocation,
    Calibration,
    GradualQuantization,
    LoRA,
    OrthogonalUpdates,
    ProgressiveBitWidth,
    QATCallback,
    prepare,
)
from tests.callbacks._models import LEARNED_INPUTS, Net, fake_quantizers, loader, state
from tests.learned import learned
from tests.processes import leave

OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 2,
    "max_epochs": 2,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Watch(pl.Callback):
    """Keeps what each process has; turns quantization off for a step, as delayed quantization does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        torch.save(state(pl_module), self.folder / f"start{trainer.global_rank}.pt")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for quantizer in fake_quantizers(pl_module).values():
            quantizer.enabled = batch_idx != 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(state(pl_module), self.folder / f"end{trainer.global_rank}.pt")


def ddp(folder: Path) -> None:
    """What users write: strategy="ddp", which starts this very script once more."""
    calibration = Calibration(2, {"chat": loader(), "code": [(3 * x, y) for x, y in loader(16)]})
    callbacks = [QATCallback(LEARNED_INPUTS), calibration, Watch(folder)]
    trainer = pl.Trainer(strategy="ddp", callbacks=callbacks, **OPTIONS)
    model = Net()
    trainer.fit(model, loader(), loader(8))
    trainer.save_checkpoint(folder / "run.ckpt")
    torch.save(calibration.samples, folder / f"samples{trainer.global_rank}.pt")
    assert trainer.test(model, loader(8), verbose=False)


def bits(folder: Path) -> None:
    """Widths from the data of both processes."""
    callback = BitAllocation(3.0, num_batches=2)
    trainer = pl.Trainer(strategy="ddp", callbacks=[QATCallback(), callback, Watch(folder)], **OPTIONS)
    trainer.fit(Net(), loader())
    assert callback.allocation is not None
    callback.allocation.save(folder / f"bits{trainer.global_rank}.json")


def lora(folder: Path) -> None:
    """Adapters on a packed base; each process draws its own masks of dropout."""
    callbacks = [QATCallback(LEARNED_INPUTS), LoRA(2, 8.0, 0.2, base="int8"), Calibration(1), Watch(folder)]
    pl.Trainer(strategy="ddp", callbacks=callbacks, **OPTIONS).fit(Net(), loader())


def compensated(folder: Path) -> None:
    """GPTQ's rounding from the data of both processes, rounding that sets in gradually, orthogonal updates."""
    rounding = GPTQ(2)
    callbacks = [QATCallback(learned("int2")), rounding, GradualQuantization(0.5), OrthogonalUpdates(), Watch(folder)]
    pl.Trainer(strategy="ddp", callbacks=callbacks, **OPTIONS).fit(Net(), loader())
    assert list(rounding.compensated) == ["first", "head"]


def fork(folder: Path) -> None:
    """Processes that hand their weights back to this one."""
    model = Net()
    refused = pl.Trainer(strategy="ddp_fork", callbacks=[QATCallback(LEARNED_INPUTS), Calibration()], **OPTIONS)
    try:
        refused.fit(model, loader())
    except Exception as error:
        (folder / "error.txt").write_text(str(error), encoding="utf-8")
    prepare(model, LEARNED_INPUTS)
    trainer = pl.Trainer(strategy="ddp_fork", callbacks=[QATCallback(), Calibration(), Watch(folder)], **OPTIONS)
    trainer.fit(model, loader())
    torch.save(state(model), folder / "back.pt")


class Sharded(Net):
    """Shards itself by FSDP2 where Lightning says: in configure_model."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for part in (self.first, self.head, self):
            fully_shard(part, mesh=mesh)


def whole(model: Any) -> dict[str, Tensor]:
    """The state with shards put together; all processes must ask."""
    return {key: getattr(value, "full_tensor", value.clone)() for key, value in model.state_dict().items()}


def shard(folder: Path) -> None:
    """FSDP2 for two epochs, once without a break and once with; and DDP on the same data."""

    def run(name: str, epochs: int, ckpt: Path | None = None) -> None:
        model: Any = Net() if name == "ddp" else Sharded(seed=0 if ckpt is None else 9)
        strategy: Any = "ddp" if name == "ddp" else ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
        lower = ProgressiveBitWidth({0: 4, 1: 3}, unit="step")
        callbacks = [QATCallback(LEARNED_INPUTS), Calibration(1), lower]
        trainer = pl.Trainer(strategy=strategy, callbacks=callbacks, **OPTIONS | {"max_epochs": epochs})
        trainer.fit(model, loader(), ckpt_path=None if ckpt is None else str(ckpt))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        found = whole(model)
        if trainer.is_global_zero:
            torch.save(found, folder / f"{name}.pt")

    run("ddp", 2)
    run("whole", 2)
    run("half", 1)
    run("resumed", 2, folder / "half.ckpt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    {"ddp": ddp, "bits": bits, "compensated": compensated, "fork": fork, "lora": lora, "shard": shard}[sys.argv[1]](
        Path(sys.argv[2])
    )
    leave()
