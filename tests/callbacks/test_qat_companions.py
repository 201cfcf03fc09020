"""QATCallback beside Lightning's own callbacks: pruning, tuners, stopping, summaries, checkpoints."""

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_qat import Calibration, QATCallback, bake, codes, recipes
from tests.callbacks._models import (
    LEARNED_INPUTS,
    STORED_INPUTS,
    WIDTH,
    Net,
    assert_equal_states,
    fake_quantizers,
    fit,
    grid_distance,
    loader,
    state,
    trainer,
)

# --- pruning ---------------------------------------------------------------------------------------------------------


def zeros(model: Any, layer: str) -> Tensor:
    """Which latent weights are zero."""
    weight: Tensor = model.get_submodule(layer)._parameters["weight"].detach()
    return weight == 0


@pytest.mark.parametrize("first", ["pruning", "qat"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("lottery", [True, False])
def test_pruning_and_quantization_in_one_run(given: bool, first: str, lottery: bool) -> None:
    model = Net()
    start = {name: getattr(model, name).weight.detach().clone() for name in ("first", "head")}
    targets = [(model.first, "weight"), (model.head, "weight")] if given else ()
    pruning = ModelPruning("l1_unstructured", targets, ["weight"], amount=0.5, use_lottery_ticket_hypothesis=lottery)
    callbacks = [pruning, QATCallback(recipes.int4())]
    captured: dict[str, Tensor] = {}

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            captured.update({name: getattr(pl_module, name).weight_orig.detach().clone() for name in start})

    order = callbacks if first == "pruning" else callbacks[::-1]
    fit(model, *order, Watch(), max_epochs=1)
    pruned = torch.cat([zeros(model, name).flatten() for name in start])
    assert int(pruned.sum()) == 36  # half of 6 x 8 + 8 x 3
    for name in start:
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight.detach() == 0, (layer.weight.detach() == 0) | zeros(model, name))
        assert "weight" in layer._parameters
        if lottery:  # what is left has its first value back
            assert torch.equal(captured[name], start[name])
    assert grid_distance(model, "first") < 1e-5


def test_pruning_ranks_latent_weights() -> None:
    """At 2 bits most quantized weights are equal: ranking those would prune others."""
    model, seen = Net(), {}

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen["weight"] = pl_module.first._parameters["weight"].detach().clone()

    pruning = ModelPruning(
        "l1_unstructured", [(model.first, "weight")], amount=0.25, use_lottery_ticket_hypothesis=False
    )
    fit(model, QATCallback(recipes.int2()), Watch(), pruning)
    magnitude = seen["weight"].abs().flatten()
    assert set(zeros(model, "first").flatten().nonzero().flatten().tolist()) == set(magnitude.argsort()[:12].tolist())


def test_pruned_and_quantized_weights_are_exported(tmp_path: Path) -> None:
    model = Net()
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.5)
    made = fit(model, QATCallback(LEARNED_INPUTS), Calibration(), pruning, max_epochs=2)
    made.save_checkpoint(tmp_path / "pruned.ckpt")
    fresh = Net(seed=8)
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.5)
    trainer(QATCallback(LEARNED_INPUTS), pruning).test(fresh, loader(), tmp_path / "pruned.ckpt", verbose=False)
    assert_equal_states(state(model), state(fresh))
    x = loader().dataset[:4][0]
    assert torch.equal(bake(model)(x), model.eval()(x))
    assert int((codes(model)["first.weight"].codes == 0).sum()) >= int(zeros(model, "first").sum()) > 0


def test_pruning_on_a_grid_without_zero_is_refused() -> None:
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.5)
    with pytest.raises(ValueError, match=r"first.weight: pruned weights cannot stay zero, because the grid Binary\(\)"):
        fit(Net(), QATCallback(recipes.binary()), pruning)


# --- tuners ----------------------------------------------------------------------------------------------------------


class Tunable(Net):
    """Has what the tuners change."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.5
        self.batch_size = 2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return loader(64, self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(8)


lr_find_warns = pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of torch: the finder's scheduler steps first


@lr_find_warns
@pytest.mark.parametrize("recipe", [recipes.int4(), LEARNED_INPUTS])
def test_lr_find(recipe: Any, tmp_path: Path) -> None:
    model, callbacks = Tunable(), (QATCallback(recipe), Calibration())
    made = trainer(*callbacks, max_epochs=2, default_root_dir=tmp_path)
    found = Tuner(made).lr_find(model, num_training=30, min_lr=1e-5, max_lr=0.1)
    assert found is not None
    assert model.lr == found.suggestion()
    assert model.lr < 0.1
    made.fit(model)
    assert [group["lr"] for group in made.optimizers[0].param_groups] == [model.lr, model.lr]
    assert grid_distance(model, "first") < 1e-5


@lr_find_warns
def test_learning_rate_finder_as_callback_leaves_the_start_as_it_was(tmp_path: Path) -> None:
    states = []
    for callbacks in ((), (LearningRateFinder(num_training_steps=12, update_attr=False),)):
        model = Tunable()
        fit(model, QATCallback(LEARNED_INPUTS), Calibration(), *callbacks, train=model.train_dataloader(),
            default_root_dir=tmp_path)  # fmt: skip
        states.append(state(model))
    assert_equal_states(*states)


def test_batch_size_finder(tmp_path: Path) -> None:
    model = Tunable()
    finder = BatchSizeFinder(mode="power", steps_per_trial=1, init_val=2, max_trials=2)
    made = trainer(QATCallback(LEARNED_INPUTS), Calibration(), finder, default_root_dir=tmp_path)
    made.fit(model)
    assert model.batch_size > 2
    assert all(not quantizer.needs_calibration for quantizer in fake_quantizers(model).values() if quantizer.stored)


# --- others ----------------------------------------------------------------------------------------------------------


def test_model_checkpoint_and_early_stopping(tmp_path: Path) -> None:
    model = Net()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best", save_last=True)
    stop = EarlyStopping("constant", patience=1, check_on_train_epoch_end=True)
    made = fit(model, QATCallback(LEARNED_INPUTS), Calibration(), best, stop, val=loader(), max_epochs=9)
    assert made.current_epoch == 2
    result = made.test(model, loader(), ckpt_path=best.best_model_path, verbose=False)
    assert result[0]["test_loss"] == pytest.approx(float(best.best_model_score), rel=1e-6)


@pytest.mark.parametrize("summary", [ModelSummary(max_depth=-1), RichModelSummary(max_depth=-1)])
def test_summaries(summary: Any) -> None:
    fit(Net(), QATCallback(), summary)


@pytest.mark.filterwarnings("ignore:.*.fit.ckpt_path=:UserWarning")  # of OnExceptionCheckpoint at its first fit
def test_timer_and_checkpoint_on_exception(tmp_path: Path) -> None:
    class Fails(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(Fails(), QATCallback(LEARNED_INPUTS), Calibration(), Timer(), OnExceptionCheckpoint(tmp_path))
    saved = torch.load(next(tmp_path.iterdir()), weights_only=True)
    assert "lightning_qat" in saved
    assert saved["global_step"] == 2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["pruning", "averaging"])  # these two do not go together: pruning reorders parameters
def test_all_together(kind: str, reverse: bool, tmp_path: Path) -> None:
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.3)
    rest = [
        EarlyStopping("train_loss", patience=5),
        ModelCheckpoint(tmp_path),
        Timer(),
        pruning if kind == "pruning" else StochasticWeightAveraging(1e-2, 1, 1),
    ]
    model = Net()
    callbacks = [QATCallback(LEARNED_INPUTS), Calibration(), *(rest[::-1] if reverse else rest)]
    fit(model, *callbacks, val=loader(), max_epochs=2)
    assert max(grid_distance(model, "first"), grid_distance(model, "head")) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recipe", ["int4", "int8", "bitnet", "piq2"])
def test_graph_in_tensorboard(recipe: str, tmp_path: Path) -> None:
    """Lightning lets torch.jit.trace look at the model before training, in training mode."""
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    model = Net()
    model.example_input_array = torch.randn(2, WIDTH)
    made = fit(model, QATCallback(recipes.named(recipe)), logger=logger)
    assert made.global_step == 4


def test_fast_dev_run_and_limits() -> None:
    for options in ({"fast_dev_run": True}, {"limit_train_batches": 1}, {"overfit_batches": 1}, {"max_steps": 1}):
        model = Net()
        made = fit(model, QATCallback(STORED_INPUTS), Calibration(), val=loader(), **options)
        assert made.global_step == 1
        assert all(not quantizer.needs_calibration for quantizer in fake_quantizers(model).values())


def test_no_callback_looks_at_the_kind_of_another() -> None:
    """The packages lightning and pytorch_lightning have classes of their own."""
    folder = Path(__import__("lightning_qat").__file__).parent / "callbacks"
    for path, line in itertools.chain.from_iterable(
        ((path, line) for line in path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.py")
    ):
        assert "isinstance(callback, pl" not in line, path
