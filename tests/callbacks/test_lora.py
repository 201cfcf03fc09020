"""LoRA in a Trainer: adapters exist before the optimizer does, nothing else trains, runs resume, order is checked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_qat import (
    Calibration,
    Distillation,
    LoRA,
    ProgressiveBitWidth,
    QATCallback,
    QuantizationStatistics,
    bake,
    codes,
    load_checkpoint,
    merge_lora,
    prepare,
    recipes,
)
from tests.callbacks._models import (
    FLAVORS,
    LEARNED_INPUTS,
    Net,
    StatefulLoader,
    adamw,
    assert_equal_states,
    fit,
    loader,
    state,
    trainer,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning",
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:QuantizationStatistics. .* lie outside the range of the grid:UserWarning",
)
PARTS = ("weight_quantizer.scale", "weight_quantizer_lora.a", "weight_quantizer_lora.b")


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("pl", "kind"), FLAVORS)
def test_only_adapters_and_scales_train(pl: Any, kind: type[Any]) -> None:
    model = kind()
    before = state(model)
    made = fit(model, QATCallback(recipes.int4()), LoRA(2, 4.0), pl=pl)
    expected = {f"{layer}.{part}" for layer in ("first", "head") for part in PARTS}
    assert trainable(model) == expected
    assert_equal_states({key: model.state_dict()[key] for key in before}, before)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (optimizer,) = made.optimizers
    assert {names[id(parameter)] for parameter in optimizer.state} == expected
    scales = [group for group in optimizer.param_groups if group["weight_decay"] == 0]
    assert {names[id(p)] for group in scales for p in group["params"]} == {
        "first.weight_quantizer.scale",
        "head.weight_quantizer.scale",
    }
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in expected)


@pytest.mark.parametrize("where", ["__init__", "setup", "configure_model"])
@pytest.mark.parametrize("recipe", [recipes.int4(), recipes.w8a8(), recipes.bitnet()], ids=["int4", "w8a8", "bitnet"])
def test_what_trained_is_deployed(where: str, recipe: Any) -> None:
    """Wherever layers are made; and merging changes no code."""
    model = Net(where)
    fit(model, QATCallback(recipe), LoRA(2, 8.0, 0.1))
    model.eval()
    x = torch.randn(5, 6)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(bake(model)(x), expected)
    found = codes(model)
    for name, tensor in found.items():
        assert torch.equal(tensor.dequantize(), model.get_submodule(name.removesuffix(".weight")).weight)
    assert model.head.weight_quantizer_lora.b.count_nonzero() > 0
    merge_lora(model)
    for name, tensor in codes(model).items():
        assert torch.equal(tensor.codes, found[name].codes)
        assert torch.equal(tensor.dequantize(), found[name].dequantize())
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def filtered(module: Any) -> Any:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)


def adapters_alone(module: Any) -> Any:
    return torch.optim.AdamW([p for name, p in module.named_parameters() if "lora" in name], lr=1e-2)


@pytest.mark.parametrize("optimizer", [filtered, adapters_alone])
def test_scales_follow_the_adapters(optimizer: Any) -> None:
    model = Net(optimizer=optimizer)
    made = fit(model, QATCallback(recipes.int4()), LoRA(2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (built,) = made.optimizers
    assert {names[id(parameter)] for parameter in built.state} == trainable(model)
    assert [group["weight_decay"] for group in built.param_groups] == [0.01, 0.0]


def without_adapters(module: Any) -> Any:
    return torch.optim.AdamW([p for name, p in module.named_parameters() if "lora" not in name], lr=1e-2)


def test_an_optimizer_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"first.weight_quantizer_lora, head.* would not be trained: no optimizer"):
        fit(Net(optimizer=without_adapters), QATCallback(recipes.int4()), LoRA(2))


def test_other_parameters_may_train() -> None:
    model = Net()
    before = state(model)
    fit(model, QATCallback(recipes.int4()), LoRA(2, match="first", trainable=("head.*",)))
    assert trainable(model) == {f"first.{part}" for part in PARTS} | {
        "head.weight",
        "head.bias",
        "head.weight_quantizer.scale",
    }
    assert not torch.equal(model.state_dict()["head.weight"], before["head.weight"])


def test_order() -> None:
    with pytest.raises(ValueError, match=r"LoRA is listed before QATCallback, .*list QATCallback first"):
        fit(Net(), LoRA(2), QATCallback(recipes.int4()))
    with pytest.raises(ValueError, match=r"LoRA: Net has no quantized weight; .*QATCallback\(recipe\) before LoRA"):
        fit(Net(), LoRA(2))
    with pytest.raises(ValueError, match=r"EMAWeightAveraging is listed before LoRA, .*list LoRA before EMAWeight"):
        fit(Net(), QATCallback(recipes.int4()), EMAWeightAveraging(), LoRA(2))
    with pytest.raises(ValueError, match="LoRA: one per trainer"):
        fit(Net(), QATCallback(recipes.int4()), LoRA(2, match="first"), LoRA(1, match="head"))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="LoRA: rank=0 is not allowed"):
        LoRA(0)
    with pytest.raises(ValueError, match="LoRA: alpha='16' is not allowed; choose a positive number such as 16"):
        LoRA(alpha="16")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LoRA: match=3 is not a glob over names"):
        LoRA(match=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LoRA: first.weight: rank=7 exceeds min\(outputs, inputs\) = min\(8, 6\)"):
        fit(Net(), QATCallback(recipes.int4()), LoRA(7))
    with pytest.raises(ValueError, match=r"LoRA: match=\['hed'\] matches no quantized layer; there are first, head"):
        fit(Net("setup"), QATCallback(recipes.int4()), LoRA(2, match="hed"))
    callback = LoRA(4, 8.0, 0.1, match=("a", "b"), base="int8", trainable="head.*")
    assert repr(eval(repr(callback))) == repr(callback)


def trained_alone(module: Any) -> Any:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)


def test_without_qat_the_message_is_ours_and_not_of_an_optimizer_that_finds_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r"LoRA: Net has no quantized weight; .*QATCallback\(recipe\) before LoRA"):
        fit(Net(optimizer=trained_alone), LoRA(2))


def test_sharding_is_refused() -> None:
    callback = LoRA(2)
    strategy = type("FSDPStrategy", (), {})()
    given: Any = SimpleNamespace(callbacks=[callback], strategy=strategy)
    with pytest.raises(ValueError, match=r"LoRA: adapters of sharded weights \(FSDPStrategy\) are not supported"):
        callback.setup(given, Net(), "fit")


def test_a_model_that_was_prepared_before() -> None:
    model = Net()
    prepare(model, recipes.int4())
    fit(model, LoRA(2))
    assert "first.weight_quantizer_lora.a" in trainable(model)


def epochs(model: Net, ckpt: Path | None = None, *extra: Any, **options: Any) -> Any:
    """Two epochs of batches that know where they are."""
    callbacks = [QATCallback(LEARNED_INPUTS), LoRA(2, base="int8"), Calibration(1), *extra]
    train = StatefulLoader(list(loader()))
    return fit(model, *callbacks, train=train, ckpt=ckpt, max_epochs=2, **options)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_resumed_runs_are_identical(stop: int, tmp_path: Path) -> None:
    whole = Net()
    epochs(whole)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, save_on_train_epoch_end=False)
    made = epochs(Net(), None, saving, max_steps=stop)
    assert made.global_step == stop
    (path,) = tmp_path.glob("*.ckpt")
    resumed = Net(seed=1)
    epochs(resumed, path)
    assert_equal_states(state(resumed), state(whole))


def saved(model: Net, path: Path, *callbacks: Any) -> Path:
    fit(model, *callbacks).save_checkpoint(path)
    return path


def test_checkpoints_of_other_runs(tmp_path: Path) -> None:
    """Refused to train on from; evaluated with merged weights where the model has no adapters."""
    model = Net()
    lora = saved(model, tmp_path / "lora.ckpt", QATCallback(recipes.int4()), LoRA(2, 4.0))
    plain = saved(Net(), tmp_path / "plain.ckpt", QATCallback(recipes.int4()))
    with pytest.raises(ValueError, match=r"the model lacks .*; add LoRA\(rank=2, alpha=4\) after QATCallback"):
        fit(Net(), QATCallback(recipes.int4()), ckpt=lora)
    with pytest.raises(ValueError, match="LoRA: ckpt_path is a checkpoint of a run without adapters"):
        fit(Net(), QATCallback(recipes.int4()), LoRA(2, 4.0), ckpt=plain)
    with pytest.raises(RuntimeError, match="the checkpoint has alpha=4, the model alpha=16"):
        fit(Net(), QATCallback(recipes.int4()), LoRA(2), ckpt=lora)
    model.eval()
    x = torch.randn(4, 6)
    expected = model(x)
    for callbacks in ([], [LoRA(2, 4.0)]):
        tested = Net(seed=3)
        trainer(QATCallback(recipes.int4()), *callbacks).test(tested, loader(), ckpt_path=lora, verbose=False)
        tested.eval()
        assert torch.equal(tested(x), expected)
    continued = load_checkpoint(Net(seed=3), plain, quantized=True)
    before = state(continued)
    fit(continued, QATCallback(), LoRA(2), max_epochs=0)
    assert_equal_states({key: value for key, value in state(continued).items() if key in before}, before)


def outputs(model: Net, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)


def test_composes() -> None:
    """With every other callback that reads or changes what LoRA touches."""
    model = Net()
    averaging = EMAWeightAveraging(decay=0.5)
    statistics = QuantizationStatistics(every_n_steps=1, oscillation_samples=4)
    callbacks = (
        QATCallback(recipes.w8a8()), LoRA(2, 8.0, 0.1, base="int4"), Calibration(1), averaging,
        ProgressiveBitWidth({0: 8, 1: 3}), Distillation(), statistics,
    )  # fmt: skip
    fit(model, *callbacks, max_epochs=2, log_every_n_steps=1)
    assert model.first.weight_quantizer.grid.bits == 3
    x = torch.randn(5, 6)
    expected = outputs(model, x)
    assert torch.equal(bake(model)(x), expected)
    assert torch.isfinite(expected).all()


def test_the_teacher_is_the_float_model() -> None:
    model, x = Net(), torch.randn(5, 6)
    expected = outputs(model, x)
    model.train()
    distillation = Distillation()
    fit(model, QATCallback(recipes.int4()), LoRA(2, 50.0), distillation)
    teacher = distillation.teacher.module
    assert teacher is not None
    assert torch.equal(teacher(x), expected)
    assert not any("lora" in name for name, _ in teacher.named_parameters())


def test_statistics_measure_the_merged_weight() -> None:
    from lightning_qat.callbacks.measures import slots

    model = Net()
    fit(model, QATCallback(recipes.int4()), LoRA(2, 50.0, base="int4"))
    (slot,) = [each for each in slots(model) if each.layer == "head"]
    assert slot.weight().shape == (3, 8)
    assert torch.equal(slot.quantizer.quantize(slot.weight()).codes, codes(model)["head.weight"].codes)
    assert slot.numel == 24


def test_bf16_true() -> None:
    model = Net(optimizer=adamw)
    fit(model, QATCallback(recipes.int4()), LoRA(2), precision="bf16-true")
    low_rank = model.first.weight_quantizer_lora
    assert low_rank.a.dtype == torch.float32
    assert model.first._parameters["weight"].dtype == torch.bfloat16
    assert model.first.weight.dtype == torch.bfloat16
    assert torch.equal(codes(model)["first.weight"].dequantize(), model.eval().first.weight)
