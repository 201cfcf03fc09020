"""Orders of training data, and resuming inside an epoch."""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, TensorDataset

from lightning_qat.data.sampling import EpochSampler, RandomPositions, ResumableDataLoader, ShuffledOrder

SAMPLERS = [lambda seed: ShuffledOrder(20, seed=seed), lambda seed: RandomPositions(50, num_draws=20, seed=seed)]


def indices(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("make", SAMPLERS)
def test_the_order_is_a_function_of_seed_and_epoch(make: type[EpochSampler]) -> None:
    sampler = make(3)
    first = [indices(sampler, epoch) for epoch in (0, 1, 2)]
    torch.rand(5)  # the global random state plays no part, nor does the history of the sampler
    other = make(3)
    assert [indices(other, epoch) for epoch in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert len({tuple(order) for order in first}) == 3
    assert all(len(order) == len(sampler) == 20 for order in first)


@pytest.mark.parametrize("make", SAMPLERS)
def test_neighboring_seeds_share_no_epoch(make: type[EpochSampler]) -> None:
    orders = [tuple(indices(make(seed), epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_iterating_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(ShuffledOrder(10, seed=1))
    list(RandomPositions(10, num_draws=4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_shuffled_order_holds_every_index_once() -> None:
    assert sorted(ShuffledOrder(9, seed=4)) == list(range(9))


def test_random_positions_reach_both_ends() -> None:
    drawn = set(RandomPositions(5, num_draws=200, seed=0))
    assert drawn == set(range(5))


def loader(num_workers: int = 0) -> ResumableDataLoader[tuple[Tensor, ...]]:
    numbers = TensorDataset(torch.arange(12))
    return ResumableDataLoader(numbers, batch_size=2, sampler=ShuffledOrder(12, seed=0), num_workers=num_workers)


def batches(iterator: Iterator[list[Tensor]]) -> list[list[int]]:
    return [batch[0].tolist() for batch in iterator]


@pytest.mark.parametrize("given", range(7))
def test_a_loader_continues_where_another_stopped(given: int) -> None:
    whole = batches(iter(loader()))
    stopped = loader()
    iterator = iter(stopped)
    start = [next(iterator)[0].tolist() for _ in range(given)]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert start + batches(iter(resumed)) == whole
    assert batches(iter(resumed)) == whole  # once; the next iteration is a whole one


def test_the_state_of_another_epoch_is_out_of_date() -> None:
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "batches": 4})
    sampler = resumed.sampler
    assert isinstance(sampler, ShuffledOrder)
    sampler.set_epoch(1)
    assert len(batches(iter(resumed))) == 6


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_epoch_may_be_set_after_iter(num_workers: int) -> None:
    """Lightning does so at the start and on resume; workers of a plain loader would have fetched the wrong epoch."""
    early = loader(num_workers)
    iterator = iter(early)
    sampler = early.sampler
    assert isinstance(sampler, ShuffledOrder)
    sampler.set_epoch(5)
    expected = torch.tensor(indices(ShuffledOrder(12, seed=0), 5)).view(6, 2).tolist()
    assert batches(iterator) == expected


@pytest.mark.parametrize("forwards", [True, False])
def test_processes_share_an_epoch(forwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning wraps the sampler for each process; before 2.6.1 its wrapper kept the epoch to itself."""
    if not forwards:
        monkeypatch.setattr(DistributedSamplerWrapper, "set_epoch", DistributedSampler.set_epoch)
    shares = []
    for rank in range(2):
        wrapper = DistributedSamplerWrapper(ShuffledOrder(12, seed=0), num_replicas=2, rank=rank, shuffle=False)
        share = ResumableDataLoader(TensorDataset(torch.arange(12)), batch_size=3, sampler=wrapper)
        wrapper.set_epoch(5)
        shares.append(torch.tensor(batches(iter(share))).flatten())
        assert share.state_dict() == {"epoch": 5, "batches": 2}
    expected = torch.tensor(indices(ShuffledOrder(12, seed=0), 5)).view(6, 2)
    assert torch.equal(torch.stack(shares, dim=1), expected)


class Recorder(L.LightningModule):
    """Notes which numbers it was trained on, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch[0].tolist()))
        loss: Tensor = self.layer(batch[0].float().unsqueeze(1)).mean()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> list[int]:
        numbers: list[int] = batch[0].tolist()
        return numbers

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer(**arguments: object) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(max_epochs=2, **{**quiet, **arguments})  # type: ignore[arg-type]


def at_each_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)


def test_training_resumed_at_any_step_sees_the_same_batches(tmp_path: Path) -> None:
    """Steps 1 to 12 of two epochs of six batches: within an epoch, at its end, at the very end."""
    whole = Recorder()
    trainer(callbacks=[at_each_step(tmp_path)]).fit(whole, loader(), loader())
    assert len(whole.seen) == 12
    for step in range(1, 13):
        resumed = Recorder()
        again = trainer(callbacks=[at_each_step(tmp_path / "resumed")])
        again.fit(resumed, loader(), loader(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:], f"resumed after step {step}"


def test_training_resumed_at_the_end_of_an_epoch_sees_the_next(tmp_path: Path) -> None:
    def at_end(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)

    whole = Recorder()
    trainer(callbacks=[at_end(tmp_path)]).fit(whole, loader(), loader())
    resumed = Recorder()
    again = trainer(callbacks=[at_end(tmp_path / "resumed")])
    again.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.seen == whole.seen[6:]


def test_lightning_can_build_the_loader_again() -> None:
    """As it does to predict, and in every process of a distributed run."""
    assert trainer(enable_checkpointing=False).predict(Recorder(), loader()) == batches(iter(loader()))
