"""The life of a module in a Trainer: layers wherever they are made, every stage, checkpoints in every direction."""

import copy
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_qat import Calibration, QATCallback, Recipe, Rule, bake, load_checkpoint, prepare, recipes
from lightning_qat.callbacks.attachment import is_attached
from lightning_qat.callbacks.parameter_group import quantizer_parameters
from tests.callbacks._models import (
    FLAVORS,
    HIDDEN,
    LEARNED_INPUTS,
    STORED_INPUTS,
    WIDTH,
    Net,
    assert_equal_states,
    data,
    fake_quantizers,
    fit,
    grid_distance,
    loader,
    state,
    trainer,
)
from tests.learned import learned

PLACES = ("__init__", "setup", "configure_model")
QUANTIZERS = {f"{layer}.{part}_quantizer" for layer in ("first", "head") for part in ("weight", "input")}


def saved_run(folder: Path, recipe: Recipe = LEARNED_INPUTS, **options: Any) -> tuple[Any, Path]:
    """A trained module and its checkpoint."""
    model = Net(**options)
    made = fit(model, QATCallback(recipe), Calibration())
    made.save_checkpoint(folder / "run.ckpt")
    return model, folder / "run.ckpt"


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("pl", "kind"), FLAVORS)
def test_layers_train_wherever_they_are_made(pl: ModuleType, kind: type[Any], where: str, tmp_path: Path) -> None:
    model = kind(where=where)
    made = fit(model, QATCallback(LEARNED_INPUTS), Calibration(), val=loader(), pl=pl)
    assert set(fake_quantizers(model)) == QUANTIZERS
    groups = {id(p) for group in made.optimizers[0].param_groups for p in group["params"]}
    assert set(quantizer_parameters(model)) <= groups
    moments = [made.optimizers[0].state[q.scale]["exp_avg"] for q in fake_quantizers(model).values()]
    assert all(float(moment.abs().sum()) > 0 for moment in moments)
    made.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {f"{name}.scale" for name in QUANTIZERS} <= saved["state_dict"].keys()
    assert max(grid_distance(model, "first"), grid_distance(model, "head")) < 1e-5
    assert type(model) is kind
    again = kind(where=where)
    tested = trainer(QATCallback(LEARNED_INPUTS), pl=pl).test(again, loader(), tmp_path / "a.ckpt", verbose=False)
    assert tested == made.test(model, loader(), verbose=False)
    assert_equal_states(state(model), state(again))


@pytest.mark.parametrize("where", PLACES)
def test_every_quantizer_runs_in_the_first_step(where: str) -> None:
    ran: set[str] = set()

    class Watched(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            for name, quantizer in fake_quantizers(self).items():
                quantizer.register_forward_hook(lambda module, args, output, name=name: ran.add(name))

    fit(Watched(where=where), QATCallback(LEARNED_INPUTS), Calibration(), limit_train_batches=1)
    assert ran == QUANTIZERS


def test_scales_exist_before_the_optimizer(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Watched(Net):
        def configure_optimizers(self) -> Any:
            seen.append({name for name, _ in self.named_parameters() if "quantizer" in name})
            return super().configure_optimizers()

    fit(Watched(where="setup"), QATCallback())
    assert seen == [{"first.weight_quantizer.scale", "head.weight_quantizer.scale"}]


def test_weights_that_setup_initializes_are_initialized() -> None:
    """What users write there reaches the weights, and their scales are those of the new weights."""

    class Initializes(Net):
        def setup(self, stage: str) -> None:
            with torch.no_grad():
                self.first.weight.mul_(100.0)
                self.head.weight.data.fill_(3.0)

    reference = Net()
    with torch.no_grad():
        reference.first.weight.mul_(100.0)
        reference.head.weight.fill_(3.0)
    prepare(reference, recipes.int4())
    model = Initializes()
    fit(model, QATCallback(), max_steps=0)
    assert_equal_states(state(reference), state(model))


def test_weights_that_setup_loads_or_ties_follow(tmp_path: Path) -> None:
    class Autoencoder(Net):
        def __init__(self) -> None:
            super().__init__()
            self.back = nn.Linear(HIDDEN, HIDDEN)
            self.twin = nn.Linear(HIDDEN, HIDDEN)

        def setup(self, stage: str) -> None:
            self.first.load_state_dict({"weight": torch.ones(HIDDEN, WIDTH), "bias": torch.zeros(HIDDEN)})
            self.twin.weight = self.back.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.twin(self.back(self.first(x))))
            return out

    model = Autoencoder()
    fit(model, QATCallback(), max_steps=0)
    assert torch.equal(model.first.weight.detach(), torch.ones(HIDDEN, WIDTH))
    assert model.twin._parameters["weight"] is model.back._parameters["weight"]
    assert torch.equal(model.twin.weight.detach(), model.back.weight.detach())


def test_a_second_fit_does_not_search_scales_again() -> None:
    model = Net()
    fit(model, QATCallback())
    before = state(model)
    fit(model, QATCallback(), max_steps=0)
    assert_equal_states(before, state(model))


# --- stages and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("recipe", [LEARNED_INPUTS, STORED_INPUTS, recipes.bitnet(), recipes.piq2()])
def test_evaluation_of_a_checkpoint_without_fit(recipe: Recipe, where: str, tmp_path: Path) -> None:
    model, path = saved_run(tmp_path, recipe, where=where)
    expected = torch.cat(trainer().predict(model, loader()))
    for stage in ("predict", "test", "validate"):
        fresh, made = Net(where=where, seed=5), trainer(QATCallback(recipe))
        assert fresh.strict_loading
        getattr(made, stage)(fresh, loader(), ckpt_path=path, **({} if stage == "predict" else {"verbose": False}))
        assert_equal_states(state(model), state(fresh))
        assert torch.equal(torch.cat(made.predict(fresh, loader())), expected)


def test_evaluation_after_fit_with_and_without_checkpoint(tmp_path: Path) -> None:
    model = Net()
    saves = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    made = fit(model, QATCallback(LEARNED_INPUTS), Calibration(), saves, val=loader(), max_epochs=2)
    for stage in ("validate", "test"):
        results = [getattr(made, stage)(model, loader(), ckpt_path=ckpt, verbose=False) for ckpt in ("last", None)]
        assert results[0] == results[1]
    assert torch.equal(*(torch.cat(made.predict(model, loader(), ckpt_path=ckpt)) for ckpt in ("last", None)))
    made.validate(model, loader(), ckpt_path="best", verbose=False)
    assert not is_attached(model)


def test_a_quantized_model_evaluates_in_a_trainer_without_callbacks() -> None:
    model = Net()
    made = fit(model, QATCallback())
    assert trainer().test(model, loader(), verbose=False) == made.test(model, loader(), verbose=False)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_changes_nothing(stage: str) -> None:
    model = Net()
    made = fit(model, QATCallback(STORED_INPUTS), Calibration())
    before = state(model)
    getattr(made, stage)(model, loader())
    assert_equal_states(before, state(model))
    assert all(quantizer.observer is None for quantizer in fake_quantizers(model).values())


def test_evaluation_of_a_float_model_is_of_the_quantized_one() -> None:
    model = Net()
    x = torch.randn(4, WIDTH)
    before = model(x).detach()
    trainer(QATCallback(recipes.int2())).validate(model, loader(), verbose=False)
    assert float((model(x) - before).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_of_another_recipe_is_refused(stage: str, tmp_path: Path) -> None:
    _, path = saved_run(tmp_path)
    message = (
        r"QATCallback: the checkpoint was made with another recipe.\n  rule '\*': weight.grid.bits: checkpoint 4, "
        r"callback 2\n  rule '\*': input: checkpoint QuantizerSpec\(.*\), callback None\nUse the recipe of"
    )
    with pytest.raises(ValueError, match=message):
        getattr(trainer(QATCallback(learned("int2"))), stage)(Net(), loader(), ckpt_path=path)


def test_a_checkpoint_of_an_equal_recipe_that_has_a_name_is_taken(tmp_path: Path) -> None:
    _, path = saved_run(tmp_path, recipes.int4())
    unnamed = Recipe(tuple(Rule(rule.match, rule.spec, rule.types) for rule in recipes.int4().rules))
    trainer(QATCallback(unnamed)).test(Net(), loader(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_resuming_loads_plain_types_alone(weights_only: bool | None, tmp_path: Path) -> None:
    _, path = saved_run(tmp_path)
    made = trainer(QATCallback(LEARNED_INPUTS), Calibration(), max_epochs=2)
    made.fit(Net(), loader(), ckpt_path=path, weights_only=weights_only)
    assert made.global_step == 8


def float_run(folder: Path) -> tuple[Net, Path]:
    """A float module and its checkpoint."""
    plain = Net(seed=3)
    fit(plain).save_checkpoint(folder / "float.ckpt")
    return plain, folder / "float.ckpt"


def test_float_checkpoints_load_strictly_and_scales_follow(tmp_path: Path) -> None:
    plain, path = float_run(tmp_path)
    model = Net()
    trainer(QATCallback(recipes.int4())).validate(model, loader(), ckpt_path=path, verbose=False)
    prepare(plain, recipes.int4())
    assert_equal_states(state(plain), state(model))


def test_training_starts_from_a_float_checkpoint(tmp_path: Path) -> None:
    plain, path = float_run(tmp_path)
    model = load_checkpoint(Net(), path)
    fit(model, QATCallback(recipes.int4()), max_steps=0)
    prepare(plain, recipes.int4())
    assert_equal_states(state(plain), state(model))


def test_resuming_a_float_run_says_what_to_do(tmp_path: Path) -> None:
    _, path = float_run(tmp_path)
    with pytest.raises(ValueError, match=r"whose optimizer knows no scales.* load_checkpoint\(model, path\), and call"):
        fit(Net(), QATCallback(), ckpt=path, max_epochs=2)
    fit(Net(), QATCallback(recipes.bitnet()), ckpt=path, max_epochs=2)  # no scale is learned, and all is known


def test_quantized_checkpoints_load_into_the_plain_class(tmp_path: Path) -> None:
    model, path = saved_run(tmp_path)
    keys = {name for name, _ in model.named_parameters()}
    assert {"first.weight", "head.weight"} <= keys
    with pytest.raises(RuntimeError, match=r"Unexpected key.*quantizer"):
        Net.load_from_checkpoint(path)
    with pytest.warns(UserWarning, match="was trained quantized"):
        plain = load_checkpoint(Net(seed=9), path)
    assert not fake_quantizers(plain)
    assert torch.equal(plain.first.weight.detach(), model.first._parameters["weight"].detach())
    whole = load_checkpoint(Net(seed=9), path, quantized=True)
    assert_equal_states(state(model), state(whole))
    x = torch.randn(5, WIDTH)
    assert torch.equal(whole(x), model(x))
    assert torch.equal(bake(whole)(x), model.eval()(x))


def test_the_recipe_is_in_checkpoints_of_weights_alone(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    model = Net()
    fit(model, QATCallback(LEARNED_INPUTS), Calibration(), saves)
    assert_equal_states(state(model), state(load_checkpoint(Net(), tmp_path / "weights.ckpt", quantized=True)))


def test_the_state_of_callbacks_is_plain(tmp_path: Path) -> None:
    _, path = saved_run(tmp_path)
    saved = torch.load(path, weights_only=True)
    assert Recipe.from_dict(saved["lightning_qat"]["recipe"]) == LEARNED_INPUTS
    assert "QATCallback" not in str(saved["callbacks"])  # nothing that the step count and the weights do not say


def test_strict_loading_needs_no_callback_state(tmp_path: Path) -> None:
    """Callback state arrives after the weights: no key or shape may depend on it."""
    model, path = saved_run(tmp_path)
    fresh = Net()
    prepare(fresh, LEARNED_INPUTS)
    fresh.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)
    assert_equal_states(state(model), state(fresh))


# --- copies ----------------------------------------------------------------------------------------------------------


class Copies(Net):
    """Copies itself while it is attached, in the middle of training."""

    copies: dict[str, Any]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            assert is_attached(self)
            self.copies = {"deepcopy": copy.deepcopy(self), "pickle": pickle.loads(pickle.dumps(self))}
            self.reference = self(data().tensors[0]).detach()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_an_attached_module(way: str) -> None:
    model = Copies()
    fit(model, QATCallback(LEARNED_INPUTS), Calibration())
    twin = model.copies[way]
    assert type(twin) is Copies
    assert not is_attached(twin)
    assert torch.equal(twin(data().tensors[0]), model.reference)
    fit(twin, QATCallback())
    assert not torch.equal(twin(data().tensors[0]), model.reference)


def test_torch_save_of_the_whole_trained_module(tmp_path: Path) -> None:
    model, _ = saved_run(tmp_path)
    torch.save(model, tmp_path / "whole.pt")
    twin = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(twin(data().tensors[0]), model(data().tensors[0]))


def test_the_module_is_whole_again_after_an_error() -> None:
    class Fails(Net):
        fails = True

        def on_train_start(self) -> None:
            if self.fails:
                raise RuntimeError("mine")

    model = Fails()
    with pytest.raises(RuntimeError, match="mine"):
        fit(model, QATCallback())
    model.fails = False
    fit(model, QATCallback())
    assert type(model) is Fails
    fit(model)


def test_callbacks_that_the_module_brings_itself() -> None:
    class Brings(Net):
        def configure_callbacks(self) -> list[Any]:
            return [QATCallback(LEARNED_INPUTS), Calibration()]

    model = Brings()
    fit(model)
    assert set(fake_quantizers(model)) == QUANTIZERS
