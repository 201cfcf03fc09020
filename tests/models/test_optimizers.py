"""Weight decay groups and the schedule."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_qat.conversion import prepare
from lightning_qat.data import DigitsData
from lightning_qat.models import LanguageModel, SequenceClassifier
from lightning_qat.models.optimizers import adamw_with_cosine, warmup_cosine, weight_decay_groups
from lightning_qat.quantization import recipes


def decayed(module: nn.Module) -> set[str]:
    groups = weight_decay_groups(module, 0.1)
    chosen = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    return {name for name, parameter in module.named_parameters() if id(parameter) in chosen}


def test_weights_decay_and_nothing_else() -> None:
    module = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "linear": nn.Linear(4, 4),
            "conv": nn.Conv2d(4, 4, 3),
            "norm": nn.LayerNorm(4),
            "batch_norm": nn.BatchNorm2d(4),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    assert decayed(module) == {
        "linear.weight",
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    groups = weight_decay_groups(module, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_a_weight_tied_to_an_embedding_does_not_decay() -> None:
    assert "head.weight" in decayed(LanguageModel(hidden_size=8, num_layers=1))
    assert not {"head.weight", "embedding.weight"} & decayed(
        LanguageModel(hidden_size=8, num_layers=1, tie_embeddings=True)
    )


def test_scales_of_a_prepared_model_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare(model, recipes.int4())
    assert decayed(model) == {"0.weight"}


def test_frozen_parameters_are_left_out_and_empty_groups_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].requires_grad_(False)
    (group,) = weight_decay_groups(model, 0.1)
    assert len(group["params"]) == 1
    assert group["params"][0] is model[1].weight


def test_schedule_rises_then_falls_along_a_cosine() -> None:
    values = [warmup_cosine(step, num_steps=110, num_warmup=10) for step in range(111)]
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 100) for step in range(101)])
    assert warmup_cosine(1000, num_steps=110, num_warmup=10) == 0


@pytest.mark.parametrize(("num_warmup", "first"), [(0, 1.0), (1, 1.0), (4, 0.25)])
def test_schedule_without_and_with_warmup_only(num_warmup: int, first: float) -> None:
    values = [warmup_cosine(step, num_steps=4, num_warmup=num_warmup) for step in range(5)]
    assert values[0] == first
    assert max(values) == 1


class Tiny(L.LightningModule):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.rates: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss: torch.Tensor = self.layer(batch[0]).mean()
        return loss

    def configure_optimizers(self):  # type: ignore[no-untyped-def]  # noqa: ANN201
        return adamw_with_cosine(self, learning_rate=0.5, weight_decay=0.0, warmup_fraction=0.5)


def fit(num_batches: int = 4, **arguments: int) -> list[float]:
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(num_batches, 2)))
    module = Tiny()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,  # type: ignore[arg-type]
    )
    trainer.fit(module, data)
    return module.rates


def test_the_schedule_spans_the_training_and_moves_at_each_step() -> None:
    assert fit(max_epochs=2) == pytest.approx(
        [0.5 * warmup_cosine(step, num_steps=8, num_warmup=4) for step in range(8)]
    )
    accumulated = fit(max_epochs=2, accumulate_grad_batches=2)
    assert accumulated[::2] == pytest.approx(
        [0.5 * warmup_cosine(step, num_steps=4, num_warmup=2) for step in range(4)]
    )


def test_a_training_without_end_raises() -> None:
    with pytest.raises(ValueError, match=r"Tiny: the cosine schedule needs an end of training.*Trainer\(max_steps"):
        fit(max_epochs=-1)


@pytest.mark.parametrize("stop", [2, 3])
def test_a_run_resumed_inside_an_epoch_ends_where_the_uninterrupted_one_does(stop: int, tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0 if ckpt is None else 1)
        module = SequenceClassifier(
            10, embed_dim=8, hidden_size=8, num_heads=2, num_layers=1, window_size=8, dropout=0.0
        )
        saves = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(
            max_epochs=2, limit_val_batches=0, accelerator="cpu", logger=False, callbacks=[saves],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DigitsData(512), ckpt_path=ckpt)
        assert trainer.global_step == 6
        return module.state_dict()

    whole, resumed = run(), run(tmp_path / f"step={stop}.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
