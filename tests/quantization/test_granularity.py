"""Which elements share a scale, for linear layers, convolutions, embeddings and inputs."""

import itertools

import pytest
import torch
from torch import Tensor

from lightning_qat.quantization import (
    AbsMax,
    FakeQuantizer,
    Granularity,
    Int,
    Layout,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
)

WEIGHT, TRANSPOSED, TOKENS, SAMPLES = Layout(0), Layout(1), Layout(None, 1), Layout(None, 3)
# (granularity, layout, shape, stored or found scale's shape in the grouped view)
CASES: tuple[tuple[Granularity, Layout, tuple[int, ...], tuple[int, ...]], ...] = (
    (PerTensor(), WEIGHT, (6, 8), (1, 1)),
    (PerTensor(), TRANSPOSED, (6, 8, 3, 3), (1, 1, 1, 1)),
    (PerTensor(), TOKENS, (2, 3, 8), (1, 1, 1)),
    (PerChannel(), WEIGHT, (6, 8), (6, 1)),
    (PerChannel(), WEIGHT, (6, 8, 3), (6, 1, 1)),
    (PerChannel(), WEIGHT, (6, 8, 3, 3), (6, 1, 1, 1)),
    (PerChannel(), TRANSPOSED, (6, 8, 3), (1, 8, 1)),
    (PerChannel(), TRANSPOSED, (6, 8, 3, 3), (1, 8, 1, 1)),
    (PerChannel(), TRANSPOSED, (6, 8, 3, 3, 2), (1, 8, 1, 1, 1)),
    (PerGroup(4), WEIGHT, (6, 8), (6, 2, 1)),
    (PerGroup(12), WEIGHT, (6, 8, 3), (6, 2, 1)),
    (PerGroup(9), WEIGHT, (6, 8, 3, 3), (6, 8, 1)),
    (PerGroup(9), TRANSPOSED, (6, 8, 3, 3), (8, 6, 1)),
    (PerGroup(54), TRANSPOSED, (6, 8, 3, 3), (8, 1, 1)),
    (PerGroup(4), TOKENS, (2, 3, 8), (2, 3, 2, 1)),
    (PerGroup(4), TOKENS, (8,), (2, 1)),
    (PerToken(), TOKENS, (2, 3, 8), (2, 3, 1)),
    (PerToken(), TOKENS, (8,), (1,)),
    (PerToken(), SAMPLES, (5, 4, 6, 6), (5, 1, 1, 1)),
    (PerToken(), SAMPLES, (4, 6, 6), (1, 1, 1)),
    (PerToken(), Layout(None, 2), (5, 4, 6), (5, 1, 1)),
)
each_case = pytest.mark.parametrize(("granularity", "layout", "shape", "scale_shape"), CASES, ids=str)


def owner(granularity: Granularity, layout: Layout, shape: tuple[int, ...], index: tuple[int, ...]) -> tuple[int, ...]:
    """Which scale an element belongs to, in words: the naive counterpart of the grouped view."""
    if granularity == PerTensor():
        return ()
    axis = layout.channel_axis
    if isinstance(granularity, PerToken):
        return index[: max(0, len(index) - layout.num_features)]
    if granularity == PerChannel():
        assert axis is not None
        return (index[axis],)
    assert isinstance(granularity, PerGroup)
    if axis is None:
        return (*index[:-1], index[-1] // granularity.size)
    position = 0
    for dim, (i, n) in enumerate(zip(index, shape, strict=True)):
        position = position if dim == axis else position * n + i
    return (index[axis], position // granularity.size)


@each_case
def test_elements_that_share_a_scale(
    granularity: Granularity, layout: Layout, shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    largest: dict[tuple[int, ...], float] = {}
    for index in itertools.product(*map(range, shape)):
        key = owner(granularity, layout, shape, index)
        largest[key] = max(largest.get(key, 0.0), abs(float(x[index])))
    quantizer = FakeQuantizer(QuantizerSpec(Int(4), granularity, AbsMax()), () if layout.is_input else shape, layout)
    quantized = quantizer.quantize(x)
    assert quantized.scale.shape == scale_shape
    assert quantized.scale.numel() == len(largest)
    out = quantizer(x)
    for index in itertools.product(*map(range, shape)):
        step = largest[owner(granularity, layout, shape, index)] / 8
        assert float(quantized.codes[index]) == min(7, max(-8, round(float(x[index]) / step)))
        assert float(out[index]) == pytest.approx(float(quantized.codes[index]) * step)
    assert torch.equal(quantized.dequantize(), out)


@each_case
def test_grouping_is_undone(
    granularity: Granularity, layout: Layout, shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    grouped = granularity.group(x, layout)
    assert torch.equal(granularity.ungroup(grouped, shape, layout), x)
    torch.broadcast_shapes(grouped.shape, scale_shape)
    if not layout.is_input:
        assert granularity.problem(shape, layout) is None
        stored = granularity.scale_shape(shape, layout)
        assert stored == ((1,) if granularity == PerTensor() else scale_shape)


def test_tensors_that_are_not_contiguous() -> None:
    x = torch.randn(8, 6).T
    spec = QuantizerSpec(Int(4), PerGroup(4), AbsMax())
    assert torch.equal(FakeQuantizer(spec, (6, 8))(x), FakeQuantizer(spec, (6, 8))(x.contiguous()))
    image = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    per_sample = FakeQuantizer(QuantizerSpec(Int(8), PerToken(), AbsMax()), (), SAMPLES)
    assert torch.equal(per_sample(image), per_sample(image.contiguous()))
    expanded = torch.randn(6, 1).expand(6, 8)
    assert torch.equal(FakeQuantizer(spec, (6, 8))(expanded), FakeQuantizer(spec, (6, 8))(expanded.contiguous()))


@pytest.mark.parametrize(
    ("granularity", "shape", "layout", "message"),
    [
        (PerGroup(3), (6, 8), WEIGHT, r"in_features=8 is not a multiple of group_size=3; choose one of \[1, 2, 4, 8\]"),
        (
            PerGroup(64),
            (10, 100),
            WEIGHT,
            r"in_features=100 is not a multiple of group_size=64; choose one of .*50.*100",
        ),
        (PerGroup(5), (6, 8, 3, 3), TRANSPOSED, r"in_features=54 is not a multiple of group_size=5"),
        (
            PerGroup(4),
            (),
            SAMPLES,
            r"groups of an input exist for linear layers only; choose PerTensor\(\) or PerToken",
        ),
        (PerToken(), (6, 8), WEIGHT, r"PerToken\(\) is for inputs; for weights choose PerTensor\(\), PerChannel\(\)"),
        (PerChannel(), (), TOKENS, r"PerChannel\(\) is for weights; for inputs choose PerTensor\(\), PerToken\(\)"),
        (PerChannel(), (8,), WEIGHT, r"a weight of shape \(8,\) would get a scale for each element; choose PerTensor"),
        (PerGroup(2), (8,), WEIGHT, r"in_features=1 is not a multiple of group_size=2"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_layers_name(
    granularity: Granularity, shape: tuple[int, ...], layout: Layout, message: str
) -> None:
    spec = QuantizerSpec(Int(4), granularity, AbsMax())
    with pytest.raises(ValueError, match=rf"blocks\.3\.fc1\.weight: {message}.*Rule\(\"blocks\.3\.fc1\", None\)"):
        FakeQuantizer(spec, shape, layout, name="blocks.3.fc1.weight")


def test_inputs_that_do_not_divide_are_refused_in_the_forward() -> None:
    quantizer = FakeQuantizer(QuantizerSpec(Int(8), PerGroup(4), AbsMax()))
    with pytest.raises(ValueError, match=r"PerGroup: in_features=6 is not a multiple of group_size=4"):
        quantizer(torch.randn(2, 6))


@each_case
def test_gradients_arrive_in_the_shape_of_the_tensor(
    granularity: Granularity, layout: Layout, shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)
    out = FakeQuantizer(QuantizerSpec(Int(4), granularity, AbsMax()), () if layout.is_input else shape, layout)(x)
    (found,) = torch.autograd.grad(out, x, grad)
    assert found.shape == shape
    kept: Tensor = found != 0
    assert torch.equal(found[kept], grad[kept])
