"""GradualQuantization: the identity at first, rounding in the end, and rounding always where nothing trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_qat import (
    GradualQuantization,
    Int,
    LayerSpec,
    ProgressiveBitWidth,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    Ternary,
    recipes,
)
from tests.callbacks._models import Net, StatefulLoader, assert_equal_states, fake_quantizers, fit, loader, state
from tests.learned import learned


class Watching(Net):
    """Remembers how far the weight that each step computes with is from latent weight and levels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, float, float]] = []
        self.evaluated: list[float] = []

    def _distance(self) -> float:
        layer: Any = self.first
        hard = layer.weight_quantizer.quantize(layer._parameters["weight"]).dequantize()
        return float((layer.weight.detach() - hard).abs().max())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        layer: Any = self.first
        latent, quantizer = layer._parameters["weight"].detach(), layer.weight_quantizer
        scale = quantizer.scale.detach().abs()
        clipped = latent.clamp(quantizer.lo * scale, quantizer.hi * scale)
        softness = 0.0 if quantizer.softness is None else float(quantizer.softness)
        self.seen.append((softness, float((layer.weight.detach() - clipped).abs().max()), self._distance()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(self._distance())
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("recipe", ["int2", "ternary", "binary", "seq2", "bitnet"])
def test_from_the_identity_to_rounding(recipe: str) -> None:
    model = Watching()
    if recipe == "bitnet":  # scales that are recomputed
        fit(Net(), QATCallback(recipes.bitnet()), GradualQuantization(0.5, most_levels=4), train=loader(64))
        return
    callbacks = [QATCallback(learned(recipe)), GradualQuantization(0.5, most_levels=4, power=2)]
    fit(model, *callbacks, train=loader(64), val=loader(8),
        val_check_interval=2, num_sanity_val_steps=1)  # fmt: skip
    assert [round(softness, 6) for softness, _, _ in model.seen] == [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0, 0.0, 0.0]
    assert model.seen[0][1] < 1e-6  # the identity, within the range
    assert all(distance > 0 for _, _, distance in model.seen[:3])
    assert all(distance == 0 for _, _, distance in model.seen[4:])
    assert model.evaluated == [0.0] * 5
    assert all(quantizer.softness is None for quantizer in fake_quantizers(model).values())


def test_two_levels_and_scales_that_are_recomputed_take_longer() -> None:
    class Both(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            now = {q.owner: q.softness for q in fake_quantizers(self).values() if not q.layout.is_input}
            seen.append(tuple(0.0 if now[name] is None else float(now[name]) for name in names))

    seen: list[tuple[float, ...]] = []
    kinds = {"first": recipes.bitnet, "more": recipes.binary, "most": recipes.bitnet1}
    own, names = (Rule(name, kind().rules[0].spec) for name, kind in kinds.items()), (*kinds, "head")
    model = Both()
    model.more, model.most = nn.Linear(8, 8), nn.Linear(8, 8)
    fit(model, QATCallback(Recipe((*own, *learned("ternary").rules))), GradualQuantization(), train=loader(64))
    steps = [step / 8 for step in range(8)]
    settings = (0.75, 2), (0.75, 4), (0.6, 2), (0.3, 2)
    expected = [tuple(max(0.0, 1 - step / share) ** power for share, power in settings) for step in steps]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))


@pytest.mark.parametrize("power", [1, 2.0, 4.0])
def test_slopes_are_levels_before_float32_cannot_tell_them(power: float) -> None:
    class Long(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            now = next(q.softness for q in fake_quantizers(self).values() if not q.layout.is_input)
            seen.append(0.0 if now is None else float(now))

    seen: list[float] = []
    fit(
        Long(),
        QATCallback(recipes.ternary()),
        GradualQuantization(1.0, power=power),
        train=loader(8 * 256),
        max_steps=256,
    )
    expected = [(1 - step / 256) ** power for step in range(256)]
    expected = [softness if softness >= 1e-4 else 0.0 for softness in expected]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))
    assert (min(seen) == 0) == (power > 1)


def test_a_grid_of_two_levels_that_comes_late_is_soft_still() -> None:
    class Late(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            now = next(q.softness for q in fake_quantizers(self).values() if not q.layout.is_input)
            seen.append(0.0 if now is None else float(now))

    seen: list[float] = []
    drops = ProgressiveBitWidth({0: 8, 4: 1}, unit="step")
    fit(Late(), QATCallback(recipes.int4()), drops, GradualQuantization(), train=loader(64))
    expected = [0.0] * 4 + [max(0.0, 1 - step / 8 / 0.75) ** 4 for step in range(4, 8)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([x if x >= 1e-4 else 0.0 for x in expected]))


def test_every_parameter_trains_from_the_first_step() -> None:
    model = Net()
    before = None

    class Start(Watching):
        def on_train_start(self) -> None:
            nonlocal before
            before = state(self)

    model = Start()
    fit(
        model, QATCallback(learned("int2")), GradualQuantization(1.0, most_levels=4), limit_train_batches=1, max_steps=1
    )
    assert before is not None
    after = state(model)
    assert all(not torch.equal(value, after[name]) for name, value in before.items() if "extra_state" not in name)


def test_a_resumed_run_goes_on_bit_identically(tmp_path: Path) -> None:
    def run(folder: Path, ckpt: Path | None = None) -> dict[str, Tensor]:
        model = Net()
        saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        train = StatefulLoader(list(loader()))
        callbacks = [QATCallback(recipes.ternary()), GradualQuantization(0.6, most_levels=4), saves]
        fit(model, *callbacks, train=train, ckpt=ckpt, max_epochs=2, accumulate_grad_batches=2)
        return state(model)

    whole = run(tmp_path)
    for step in (1, 2, 3):
        assert_equal_states(run(tmp_path / "resumed", tmp_path / f"step={step}.ckpt"), whole)


def test_only_the_layers_that_match() -> None:
    model = Watching()
    fit(model, QATCallback(learned("int2")), GradualQuantization(1.0, match="head", most_levels=4))
    assert all(distance == 0 for _, _, distance in model.seen)


def test_a_run_that_breaks_off_leaves_rounding() -> None:
    class Breaks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("broken")

    model = Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, QATCallback(learned("int2")), GradualQuantization())
    assert all(quantizer.softness is None for quantizer in fake_quantizers(model).values())


def test_clear_errors() -> None:
    for fraction in (0, 1.5, "all"):
        with pytest.raises(ValueError, match="fraction="):
            GradualQuantization(fraction)  # type: ignore[arg-type]
    for power in (0, -1.0, float("inf"), float("nan"), "all", True):
        with pytest.raises(ValueError, match="GradualQuantization: power="):
            GradualQuantization(power=power)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"match='haed' matches no layer .* there are \['first', 'head'\]"):
        fit(Net(), QATCallback(learned("int2")), GradualQuantization(match="haed"))
    with pytest.raises(ValueError, match="QATCallback"):
        fit(Net(), GradualQuantization())
    with pytest.raises(ValueError, match="no end"):
        fit(Net(), QATCallback(learned("int2")), GradualQuantization(), max_epochs=-1)
    wide = Recipe((Rule("*", LayerSpec(QuantizerSpec(Ternary(0.7)))),))
    with pytest.raises(ValueError, match="not in the middle"):
        fit(Net(), QATCallback(wide), GradualQuantization(most_levels=4))
    with pytest.raises(ValueError, match="most_levels=1 is not allowed; choose 2 or more"):
        GradualQuantization(most_levels=1)
    assert repr(GradualQuantization()) == "GradualQuantization(None, '*', most_levels=None, power=None)"


def test_grids_with_more_levels_are_rounded_at_once(caplog: pytest.LogCaptureFixture) -> None:
    rules = (Rule("first", LayerSpec(QuantizerSpec(Int(3)))), Rule("*", LayerSpec(QuantizerSpec(Int(2)))))
    for most_levels, seen in ((4, False), (8, True)):
        model = Watching()
        fit(model, QATCallback(Recipe(rules)), GradualQuantization(most_levels=most_levels), train=loader(16))
        assert (model.seen[0][2] > 0) == seen
    assert "most_levels" not in caplog.text
    with caplog.at_level("INFO"):
        fit(Net(), QATCallback(learned("int2")), GradualQuantization())
    assert "all weights have more levels than most_levels=None allows" in caplog.text


def test_a_lower_width_on_the_way_softens_and_resumes_bit_identically(tmp_path: Path) -> None:
    def run(folder: Path, ckpt: Path | None = None) -> tuple[Watching, dict[str, Tensor]]:
        model = Watching()
        saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        lower = ProgressiveBitWidth({0: 8, 1: 3, 3: 2}, unit="step")
        callbacks = [QATCallback(learned("int2")), lower, GradualQuantization(1.0, most_levels=4), saves]
        fit(model, *callbacks, train=StatefulLoader(list(loader(48))), ckpt=ckpt)
        return model, state(model)

    model, whole = run(tmp_path)
    assert [softness > 0 for softness, _, _ in model.seen] == [False, False, False, True, True, True]
    for step in (2, 4):
        assert_equal_states(run(tmp_path / "resumed", tmp_path / f"step={step}.ckpt")[1], whole)
