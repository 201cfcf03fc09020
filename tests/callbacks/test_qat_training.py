"""Training with QATCallback: batches and forwards of any shape, accumulation, clipping, precisions, compilation."""

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qat import (
    Binary,
    Calibration,
    HalfInt,
    Int,
    LayerSpec,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    Ternary,
    calibrate,
    prepare,
    recipes,
)
from tests.callbacks._models import (
    CLASSES,
    HIDDEN,
    LEARNED_INPUTS,
    WIDTH,
    Net,
    assert_equal_states,
    data,
    fake_quantizers,
    fit,
    grid_distance,
    loader,
    state,
)
from tests.learned import learned


def by_hand(model: Any, batches: Any, *, accumulate: int = 1, clip: float | None = None) -> None:
    """The training loop that Lightning stands for, written out, for a prepared Net with two groups of AdamW."""
    own = [p for name, p in model.named_parameters() if "quantizer" in name]
    rest = [p for name, p in model.named_parameters() if "quantizer" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": own, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.1
    )  # fmt: skip
    for index, (x, y) in enumerate(batches):
        (F.cross_entropy(model(x), y) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
        ({"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}, {"accumulate": 2, "clip": 0.05}),
    ],
)
def test_a_run_equals_the_loop_written_out(options: dict[str, Any], same: dict[str, Any]) -> None:
    reference, model = Net(), Net()
    prepare(reference, recipes.int4())
    by_hand(reference, loader(), **same)
    made = fit(model, QATCallback(), **options)
    assert_equal_states(state(reference), state(model))
    assert made.global_step == 4 // same.get("accumulate", 1)


def test_accumulation_schedule() -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    model = Net()
    made = fit(model, QATCallback(), GradientAccumulationScheduler({0: 1, 1: 4}), max_epochs=2)
    assert made.global_step == 5
    assert grid_distance(model, "first") < 1e-5


def test_clipping_by_value_holds_for_scales_too() -> None:
    largest: dict[str, list[float]] = {"before": [], "after": []}

    class Watched(Net):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            largest["before"].append(max(float(p.grad.abs().max()) for p in self.parameters()))
            super().configure_gradient_clipping(*args, **kwargs)
            largest["after"].append(max(float(p.grad.abs().max()) for p in self.parameters()))

    fit(Watched(), QATCallback(), gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert min(largest["before"]) > 1e-3
    assert max(largest["after"]) == pytest.approx(1e-3)


GRIDS = (Int(2), Int(3), Int(4), Int(8), Ternary(), Binary(), HalfInt(2))


@pytest.mark.parametrize(
    "recipe", [Recipe((Rule("*", LayerSpec(QuantizerSpec(grid))),)) for grid in GRIDS] + [LEARNED_INPUTS]
)
def test_scales_hardly_change_the_clip_factor_of_weights(recipe: Recipe) -> None:
    """LSQ's 1 / sqrt(N hi) keeps their share of the norm small: below 2 % from N = 32 weights per scale on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.randn(64, 32), torch.randint(10, (64,))
    prepare(model, recipe)
    calibrate(model, [x])
    F.cross_entropy(model(x), y).backward()
    norms = {True: 0.0, False: 0.0}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        norms["quantizer" in key] += float(parameter.grad.square().sum())
    without, together = norms[False] ** 0.5, (norms[True] + norms[False]) ** 0.5
    assert without < together < 1.02 * without


# --- precision -------------------------------------------------------------------------------------------------------

PRECISIONS = {
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "64-true": torch.float64,
}


@pytest.mark.parametrize("where", ["__init__", "configure_model"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_with_scales_in_float32(precision: str, where: str) -> None:
    model = Net(where=where)
    made = fit(model, QATCallback(LEARNED_INPUTS), Calibration(), val=loader(), precision=precision)
    assert model.head._parameters["weight"].dtype == PRECISIONS[precision]
    for quantizer in fake_quantizers(model).values():
        assert quantizer.scale.dtype == torch.float32
        assert float(quantizer.scale.detach().abs().min()) > 0
        assert float(made.optimizers[0].state[quantizer.scale]["exp_avg"].abs().sum()) > 0
    assert torch.isfinite(made.callback_metrics["val_loss"])


def test_mixed_16_bit_precision_that_the_cpu_has_not_becomes_bf16() -> None:
    """Lightning says so and goes on."""
    model = Net()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `Trainer.*precision='16-mixed'")
        made = fit(model, QATCallback(LEARNED_INPUTS), Calibration(), precision="16-mixed")
    assert made.precision == "bf16-mixed"


def test_quantization_is_computed_in_float32_under_autocast() -> None:
    model = Net()
    fit(model, QATCallback(LEARNED_INPUTS), Calibration(), precision="bf16-mixed")
    x = torch.randn(64, WIDTH)
    plain = model.first.input_quantizer(x), model.first.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.first.input_quantizer(x), model.first.weight
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_half_precision_for_inference_keeps_scales() -> None:
    model = Net()
    made = fit(model, QATCallback(LEARNED_INPUTS), Calibration())
    before = {name: q.scale.detach().clone() for name, q in fake_quantizers(model).items()}
    model.half()
    assert all(torch.equal(before[name], q.scale) for name, q in fake_quantizers(model).items())
    del made


# --- batches and forwards --------------------------------------------------------------------------------------------


class Keywords(Net):
    """A forward with keyword-only arguments and optional ones."""

    def forward(self, *, x: Tensor, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        hidden = self.first(x if shift is None else x + shift)
        out: Tensor = self.head(hidden.relu())
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(x=batch["x"], shift=batch["shift"]), batch["y"])


class TwoInputs(Net):
    """A forward of two tensors and a step that returns a dict."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.head(self.first(left).relu() * self.first(right).relu())
        return out

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": F.cross_entropy(self(batch[0], batch[1]), batch[2])}


def dict_batches() -> list[dict[str, Tensor]]:
    return [{"x": x, "shift": torch.ones(WIDTH), "y": y} for x, y in loader()]


def triple_batches() -> list[tuple[Tensor, ...]]:
    return [(x, x.flip(0), y) for x, y in loader()]


@pytest.mark.parametrize(("kind", "batches"), [(Keywords, dict_batches), (TwoInputs, triple_batches)])
def test_forwards_and_batches_of_any_shape(kind: Any, batches: Any) -> None:
    model = kind()
    fit(model, QATCallback(LEARNED_INPUTS), Calibration(), train=DataLoader(batches(), batch_size=None))
    assert all(quantizer.calibrated for quantizer in fake_quantizers(model).values())
    assert "forward" not in vars(model)
    assert grid_distance(model, "head") < 1e-5


class Gan(pl.LightningModule):
    """Two optimizers in turns, optimized by hand, in the form of Lightning's own example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Linear(4, WIDTH)
        self.discriminator = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.generator(z)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> None:
        g, d = self.optimizers()  # type: ignore[misc]
        fake = self(torch.randn(len(batch[0]), 4))
        self.toggle_optimizer(g)
        g.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(fake)).mean())
        g.step()
        self.untoggle_optimizer(g)
        self.toggle_optimizer(d)
        d.zero_grad()
        real = F.softplus(-self.discriminator(batch[0])).mean()
        self.manual_backward(real + F.softplus(self.discriminator(fake.detach())).mean())
        d.step()
        self.untoggle_optimizer(d)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.generator, self.discriminator)]


def test_a_gan() -> None:
    model = Gan()
    prepare(model, recipes.int4())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    made = fit(model, QATCallback())
    assert made.global_step == 8
    assert not any(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


class Transformer(pl.LightningModule):
    """torch's encoder, which has a fast path that reads weights directly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        self.head = nn.Linear(16, CLASSES)
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x).mean(1))
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert torch.is_inference_mode_enabled()
        self.outputs.append(self(batch[0]).clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("recipe", [recipes.int2(), recipes.bitnet()])
def test_validation_of_a_transformer_is_quantized(recipe: Any) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 5, 16), torch.randint(CLASSES, (4,))) for _ in range(2)]
    plain, model = Transformer().eval(), Transformer()
    made = fit(model, QATCallback(recipe), train=DataLoader(batches, batch_size=None), max_steps=0)
    made.validate(model, DataLoader(batches, batch_size=None), verbose=False)
    model.eval()
    for (x, _), seen in zip(batches, model.outputs[-2:], strict=True):
        with torch.enable_grad():
            expected = model(x)
        torch.testing.assert_close(seen, expected.detach(), rtol=1e-5, atol=1e-6)
        assert float((seen - plain(x)).abs().max().detach()) > 1e-2


@pytest.mark.parametrize(
    "name", ["encoder.layers.0.self_attn.in_proj_weight", "encoder.layers.0.self_attn.out_proj.weight"]
)
def test_projections_of_attention_train_quantized(name: str) -> None:
    batches = [(torch.randn(4, 5, 16), torch.randint(CLASSES, (4,)))]
    model = Transformer()
    made = fit(model, QATCallback(learned("int2")), train=DataLoader(batches, batch_size=None))
    scale = model.get_parameter(f"{name}_quantizer.scale")
    assert float(made.optimizers[0].state[scale]["exp_avg"].abs().sum()) > 0


# --- compilation -----------------------------------------------------------------------------------------------------


class Silent(Net):
    """Logs nothing: Lightning's logging breaks compiled graphs with warnings, of float modules as well."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch._dynamo does
@pytest.mark.parametrize("place", ["module", "layer"])
def test_compiled_modules_train_as_uncompiled_ones(place: str) -> None:
    torch._dynamo.reset()
    eager, model = Silent(), Silent()
    fit(eager, QATCallback(LEARNED_INPUTS), Calibration())
    if place == "module":
        trained: Any = torch.compile(model, backend="eager")
    else:
        model.first.compile(backend="eager")
        trained = model
    fit(trained, QATCallback(LEARNED_INPUTS), Calibration())
    assert_equal_states(state(eager), state(model))
    torch._dynamo.reset()


def test_data_is_what_the_tests_think() -> None:
    assert sorted(data().tensors[1].unique().tolist()) == list(range(CLASSES))
