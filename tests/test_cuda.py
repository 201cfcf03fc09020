"""What training computes on a GPU: the numbers of the CPU, no waiting for the device, bit-identical resuming.

Skipped without a GPU. Everything here also holds with ``DEVICE = "cpu"``, but for the tests of synchronization.
"""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_qat import (
    AbsMax,
    Calibration,
    Clipped,
    Distillation,
    GradualQuantization,
    Int,
    OrthogonalUpdates,
    PerChannel,
    PerGroup,
    ProgressiveBitWidth,
    QATCallback,
    QuantizerSpec,
    StraightThrough,
    accumulation_window,
    bake,
    calibrate,
    codes,
    prepare,
    recipes,
)
from lightning_qat.callbacks.output_loss import OutputLoss
from lightning_qat.conversion.state import quantizers
from lightning_qat.functional import kernels
from lightning_qat.functional.integer import integer_product, integers_are_exact
from lightning_qat.functional.kernels import compiled_kernels
from lightning_qat.losses import kl_divergence
from lightning_qat.quantization import FakeQuantizer
from tests.callbacks._models import LEARNED_INPUTS, Net, StatefulLoader, assert_equal_states, fit, loader, state

DEVICE = "cuda"
ACCELERATOR = "gpu" if DEVICE == "cuda" else DEVICE
pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore"),  # torch's advice on tensor cores, and what its compiler deprecates
]
FEATURES = 48
fake_quantize_module = importlib.import_module("lightning_qat.functional.fake_quantize")  # also a function's name


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Let torch raise where an operation waits for the device."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def model(recipe: str, arithmetic: str = "simulated", device: str = DEVICE) -> nn.Module:
    """Two prepared layers, the same on every device."""
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(FEATURES, 64), nn.GELU(), nn.Linear(64, 33))
    x = torch.randn(16, FEATURES)
    prepare(layers, recipes.named(recipe), arithmetic=arithmetic)
    calibrate(layers, [x])
    return layers.to(device)


def batch(device: str = DEVICE, tokens: int = 21) -> Tensor:
    return torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(2)).to(device)


def step(layers: nn.Module, x: Tensor, *, amp: bool = False) -> list[Tensor]:
    """Output and gradients, on the CPU."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        y = layers(x)
    wanted = [x, *(p for p in layers.parameters() if p.requires_grad)]
    up = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape).to(y)
    return [each.cpu() for each in (y.detach(), *torch.autograd.grad(y, wanted, up))]


def assert_near(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    """In relation to the largest value: a sum that rounds elsewhere can move a single code."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        error = float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12))
        assert error < bound


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("recipe", recipes.names())
def test_the_numbers_of_the_cpu(recipe: str, amp: bool) -> None:
    found = step(model(recipe), batch(), amp=amp)
    expected = step(model(recipe, device="cpu"), batch("cpu"), amp=amp)
    assert_near(found, expected, 3e-2 if amp else 1e-2 if "a8" in recipe or "bitnet" in recipe else 1e-4)


@pytest.mark.parametrize("recipe", recipes.names())
def test_the_same_codes_as_on_the_cpu(recipe: str) -> None:
    here, there = codes(model(recipe)), codes(model(recipe, device="cpu"))
    assert here.keys() == there.keys()
    for name, one in here.items():
        assert torch.equal(one.codes.cpu(), there[name].codes)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (17, 16, 8), (33, 129, 65), (0, 8, 8), (5, 0, 8), (300, 896, 9)]
)
def test_integer_products_are_exact(shape: tuple[int, int, int]) -> None:
    assert integers_are_exact(DEVICE)
    tokens, features, outputs = shape
    a, b = (torch.randint(-128, 128, (n, features), dtype=torch.int8) for n in (tokens, outputs))
    found = integer_product(a.to(DEVICE), b.to(DEVICE))
    assert found.dtype == torch.int32
    assert torch.equal(found.cpu().long(), a.long() @ b.long().t())


def test_integer_products_of_views() -> None:
    a, b = (torch.randint(-128, 128, (40, 64), dtype=torch.int8) for _ in range(2))
    found = integer_product(a.to(DEVICE).t(), b.to(DEVICE)[:, :40].contiguous().t()[:40, :64].t()[:, :40])
    assert torch.equal(found.cpu().long(), a.t().long() @ b[:, :40].contiguous().t()[:40, :64].t()[:, :40].long().t())


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "ternary_a8", "bitnet"])
def test_integers_compute_what_floats_do(recipe: str, amp: bool) -> None:
    found, expected = (step(model(recipe, arithmetic), batch(), amp=amp) for arithmetic in ("integer", "simulated"))
    assert_near(found, expected, 3e-2 if amp else 1e-2)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("recipe", recipes.names())
def test_a_step_does_not_wait_for_the_device(recipe: str, soft: bool, amp: bool) -> None:
    layers, x = model(recipe, "auto"), batch()
    if soft:
        for quantizer in quantizers(layers).values():
            if not quantizer.layout.is_input:
                quantizer.softness = torch.tensor(0.3, device=DEVICE)

    def both() -> None:
        for window in (False, True):
            layers.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
                if window:
                    with accumulation_window(layers):
                        for _ in range(2):
                            layers(x).float().square().mean().backward()
                else:
                    layers(x).float().square().mean().backward()

    both()
    with no_synchronization():
        both()


def test_a_teacher_is_softened_without_waiting() -> None:
    student, teacher = (9 * torch.randn(64, 10, device=DEVICE) for _ in range(2))
    loss = OutputLoss(kl_divergence, 1.0, 2.0, takes_mask=True)
    mask = torch.arange(64, device=DEVICE) % 2
    loss(student, teacher, mask, repeated=True)
    with no_synchronization():
        found, temperature = loss(student, teacher, mask, repeated=True)
    assert temperature is not None
    expected = kl_divergence(student.cpu(), teacher.cpu(), temperature=float(temperature), mask=mask.cpu())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("recipe", ["int4", "ternary", "bitnet"])
def test_a_step_compiles_as_a_whole(recipe: str) -> None:
    torch.compiler.reset()
    layers = model(recipe, "auto")
    expected = step(layers, batch())
    found = step(torch.compile(layers, fullgraph=True), batch())
    assert_near(found, expected, 1e-2 if "a8" in recipe or "bitnet" in recipe else 1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        QuantizerSpec(Int(4)),
        QuantizerSpec(Int(3, symmetric=False), PerGroup(16), AbsMax(), Clipped()),
        QuantizerSpec(Int(4), PerChannel(), AbsMax(), StraightThrough()),
    ],
    ids=["learned", "clipped", "straight"],
)
def test_compiled_kernels(spec: QuantizerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_quantize_module, "_LARGE", 1)
    monkeypatch.setattr(fake_quantize_module, "_WORTHWHILE", 1)
    torch.compiler.reset()
    kernels._COMPILED.clear()
    x = torch.randn(96, 64)
    quantizer = FakeQuantizer(spec, (96, 64))
    quantizer.find_scale(x)
    quantizer.to(DEVICE)

    def results() -> list[Tensor]:
        inputs = x.to(DEVICE).requires_grad_()
        y = quantizer(inputs)
        return [y, *torch.autograd.grad(y, [inputs, *quantizer.parameters()], torch.ones_like(y).cumsum(0))]

    expected = results()
    with compiled_kernels():
        found = results()
        assert kernels._STATE["backend"] == "inductor"  # it did not give up
    assert kernels._COMPILED
    assert all(torch.equal(one, two) for one, two in zip(found[:2], expected[:2], strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("recipe", ["int4", "ternary", "binary", "w8a8", "bitnet"])
def test_training(recipe: str, precision: str) -> None:
    net = Net()
    before = state(net)
    made = fit(net, QATCallback(recipes.named(recipe)), precision=precision, accelerator=ACCELERATOR, val=loader(8))
    assert math.isfinite(float(made.callback_metrics["train_loss"]))
    assert not torch.equal(before["first.weight"], next(v for k, v in state(net).items() if "first" in k).cpu())
    net.to(DEVICE).eval()
    x = batch(tokens=4)[:, : net.first.in_features].to(net.dtype)
    expected = net(x)
    torch.testing.assert_close(bake(net)(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("recipe", "extra"),
    [
        (recipes.ternary(), lambda: [GradualQuantization(), OrthogonalUpdates(), Distillation(max_odds=1.5)]),
        (LEARNED_INPUTS, lambda: [ProgressiveBitWidth({0: 8, 1: 4}), Distillation()]),
        (recipes.bitnet(), lambda: [GradualQuantization()]),
    ],
)
def test_killed_and_resumed(recipe: Any, extra: Any, tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> dict[str, Tensor]:
        net = Net(seed=0 if ckpt is None else 99)
        saves = ModelCheckpoint(tmp_path / str(ckpt is None), filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [QATCallback(recipe), Calibration(2), *extra(), saves]
        fit(
            net, *callbacks, train=StatefulLoader(list(loader(48))), ckpt=ckpt, max_epochs=2, accelerator=ACCELERATOR,
            precision="bf16-mixed",
        )  # fmt: skip
        return state(net)

    whole = run()
    for steps in (3, 7):
        assert_equal_states(whole, run(tmp_path / "True" / f"step={steps}.ckpt"))
