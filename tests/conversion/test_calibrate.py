"""calibrate(): scales from data, and nothing else changed."""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import (
    AbsMax,
    Clipped,
    Entropy,
    Hadamard,
    Int,
    LayerSpec,
    Learned,
    MinimumError,
    MovingAverage,
    Percentile,
    PerTensor,
    QuantizerSpec,
    calibrate,
    float_weights,
    prepare,
    recipes,
)
from lightning_qat.conversion.calibrate import calibration_state, load_calibration_state, stored_inputs, uncalibrated
from tests.conversion.cases import TOKENS, WEIGHT, absmax_int4, network, recipe_for

BIN = 1 / 2048  # percentiles are exact to a bin of the histogram


def spec(scale: object = None, grid: Int | None = None) -> QuantizerSpec:
    return QuantizerSpec(grid or Int(8), PerTensor(), scale or Percentile(100.0), Clipped())


def prepared(input_spec: QuantizerSpec | None = None) -> nn.Sequential:
    model = network()
    prepare(model, recipe_for(LayerSpec(WEIGHT, input_spec or spec())))
    return model


class TestValues:
    def test_largest_value_of_all_batches(self) -> None:
        model = prepared()
        batches = [torch.randn(4, 6) for _ in range(3)]
        seen = calibrate(model, batches)
        assert seen == {"0.input_quantizer": 3, "2.input_quantizer": 3}
        amax = max(float(batch.abs().max()) for batch in batches)
        assert model[0].input_quantizer.scale.item() == pytest.approx(amax / 128, rel=BIN)

    def test_inner_layers_see_what_quantized_weights_and_float_inputs_give(self) -> None:
        model = prepared()
        x = torch.randn(16, 6)
        calibrate(model, [x])
        hidden = torch.relu(x @ absmax_int4(model.get_parameter("0.weight")).T + model[0].bias.detach())
        assert model[2].input_quantizer.scale.item() == pytest.approx(float(hidden.abs().max()) / 128, rel=BIN)

    def test_zero_point(self) -> None:
        model = prepared(spec(grid=Int(8, symmetric=False)))
        x = torch.rand(16, 6) + 1
        calibrate(model, [x])
        quantizer = model[0].input_quantizer
        assert quantizer.scale.item() == pytest.approx(float(x.max()) / 255, rel=BIN)
        assert quantizer.zero_point.item() == -128
        assert (quantizer(x) - x).abs().max() <= quantizer.scale.item()

    @pytest.mark.parametrize("scale", [MinimumError(), Entropy(), MovingAverage(), Learned(), Learned(Percentile(99))])
    def test_every_stored_scale(self, scale: object) -> None:
        model = prepared(spec(scale))
        assert len(uncalibrated(model)) == 2
        calibrate(model, [torch.randn(64, 6)])
        assert not uncalibrated(model)
        for quantizer in stored_inputs(model).values():
            assert 0 < quantizer.scale.item() < math.inf

    def test_again_forgets_the_first_time(self) -> None:
        model = prepared()
        calibrate(model, [100 * torch.randn(4, 6)])
        x = torch.randn(4, 6)
        calibrate(model, [x])
        assert model[0].input_quantizer.scale.item() == pytest.approx(float(x.abs().max()) / 128, rel=BIN)

    def test_rotation_comes_before(self) -> None:
        layer = nn.Linear(8, 4)
        prepare(layer, recipe_for(LayerSpec(WEIGHT, spec(), (Hadamard(0),))))
        spike = torch.zeros(1, 8)
        spike[0, 3] = 8.0
        calibrate(layer, [spike])
        assert layer.input_quantizer.scale.item() == pytest.approx(8 / math.sqrt(8) / 128, rel=BIN)

    def test_nothing_to_calibrate(self) -> None:
        model = network()
        prepare(model, recipes.w8a8())
        assert calibrate(model, iter(())) == {}

    def test_attention_and_convolution(self) -> None:
        model = nn.ModuleDict({"conv": nn.Conv1d(4, 8, 1), "attention": nn.MultiheadAttention(8, 2, batch_first=True)})
        prepare(model, recipe_for(LayerSpec(WEIGHT, spec())))

        def forward(model: nn.Module, x: Tensor) -> None:
            y = model["conv"](x).transpose(1, 2)
            model["attention"](y, y, y)

        assert calibrate(model, [torch.randn(2, 4, 5)], forward) == {
            "conv.input_quantizer": 1,
            "attention.input_quantizer": 1,
        }


class TestBatches:
    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 0), lambda x: [x, 0], lambda x: {"input": x}])
    def test_forms(self, wrap: Callable[[Tensor], Any]) -> None:
        model = prepared()
        x = torch.randn(4, 6)
        assert calibrate(model, [wrap(x)])["0.input_quantizer"] == 1
        assert model[0].input_quantizer.scale.item() == pytest.approx(float(x.abs().max()) / 128, rel=BIN)

    def test_forward(self) -> None:
        model = prepared()
        seen = calibrate(model, ["four", "two"], lambda model, word: model(torch.ones(len(word), 6)))
        assert set(seen.values()) == {2}


class TestErrors:
    def test_no_batches(self) -> None:
        with pytest.raises(ValueError, match=r"no finite data reached 0\.input_quantizer, 2\.input_quantizer in the"):
            calibrate(prepared(), [])

    def test_layer_that_sees_no_data_leaves_all_scales_alone(self) -> None:
        model = prepared()
        with pytest.raises(ValueError, match=r"reached 2\.input_quantizer in .* leave its input in float with a rule"):
            calibrate(model, [torch.randn(2, 6)], lambda model, x: model[0](x))
        assert len(uncalibrated(model)) == 2
        assert model[0].input_quantizer.observer is None

    def test_only_values_that_are_no_numbers(self) -> None:
        with pytest.raises(ValueError, match="no finite data"):
            calibrate(prepared(), [torch.full((2, 6), math.nan)])

    def test_error_of_the_model_leaves_no_observer(self) -> None:
        model = prepared()
        with pytest.raises(RuntimeError):
            calibrate(model, [torch.randn(2, 5)])
        assert all(q.observer is None for q in stored_inputs(model).values())
        assert model.training


class Noisy(nn.Module):
    """Uses every generator, and keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(()) + random.random() + np.random.random()
        result: Tensor = self.dropout(self.linear(self.norm(x))) * noise
        return result


class TestTraces:
    def test_none(self) -> None:
        model = nn.ModuleDict({"noisy": Noisy(), "frozen": Noisy().eval()})
        prepare(model, recipe_for(LayerSpec(QuantizerSpec(Int(4)), spec())))

        def forward(model: nn.Module, x: Tensor) -> Tensor:
            return model["noisy"](x).sum() + model["frozen"](x).sum()

        forward(model, torch.randn(4, 6)).backward()
        buffers = {k: v.clone() for k, v in model.state_dict().items() if "input_quantizer" not in k}
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        flags = [m.training for m in model.modules()]
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        calibrate(model, [torch.randn(4, 6, generator=torch.Generator()) for _ in range(3)], forward)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()
        assert random.getstate() == states[2]
        assert [m.training for m in model.modules()] == flags
        assert all(torch.equal(model.state_dict()[k], v) for k, v in buffers.items())
        found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == grads.keys()
        assert all(torch.equal(found[k], v) for k, v in grads.items())

    @pytest.mark.parametrize("own", [True, False])
    def test_order_of_the_data(self, own: bool) -> None:
        model = prepared()
        generator = torch.Generator().manual_seed(3) if own else None
        loader = DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=4, shuffle=True, generator=generator)
        state = copy.deepcopy(generator.get_state()) if generator else torch.get_rng_state()
        expected = [batch[0] for batch in loader]
        if generator:
            generator.set_state(state)
        else:
            torch.set_rng_state(state)
        calibrate(model, loader)
        for got, batch in zip([batch[0] for batch in loader], expected, strict=True):
            assert torch.equal(got, batch)

    def test_evaluation_moves_no_scale(self) -> None:
        model = prepared()
        calibrate(model, [torch.randn(4, 6)])
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.inference_mode():
            model.eval()(1000 * torch.randn(4, 6))
        model.train()(1000 * torch.randn(4, 6))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_compiled_model(self) -> None:
        model, plain = prepared(), prepared()
        plain.load_state_dict(model.state_dict())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 6)
        calibrate(plain, [x])
        calibrate(compiled, [x])
        assert torch.equal(model[2].input_quantizer.scale, plain[2].input_quantizer.scale)


class TestArtifact:
    def test_round_trip(self) -> None:
        model, other = prepared(spec(grid=Int(8, symmetric=False))), prepared(spec(grid=Int(8, symmetric=False)))
        other.load_state_dict(model.state_dict())
        calibrate(model, [torch.randn(4, 6)])
        load_calibration_state(other, calibration_state(model))
        assert not uncalibrated(other)
        x = torch.randn(4, 6)
        assert torch.equal(other(x), model(x))

    def test_error(self) -> None:
        state = calibration_state(prepared())
        with pytest.raises(ValueError, match=r"missing \[\], unexpected \['0\.input_quantizer\.scale', .* another m"):
            load_calibration_state(nn.Sequential(nn.Linear(2, 2)), state)

    def test_state_dict_keeps_what_was_found(self) -> None:
        model, other = prepared(), prepared()
        calibrate(model, [torch.randn(4, 6)])
        assert len(uncalibrated(other)) == 2
        other.load_state_dict(model.state_dict())
        assert not uncalibrated(other)


def test_inputs_recomputed_in_every_forward_need_nothing() -> None:
    model = network()
    prepare(model, recipe_for(LayerSpec(WEIGHT, TOKENS)))
    assert not stored_inputs(model)
    assert isinstance(model[0].input_quantizer.spec.scale, AbsMax)


def test_before_calibration_float_weights_still_works() -> None:
    model = prepared()
    with float_weights(model):
        assert model(torch.randn(2, 6)).isfinite().all()
