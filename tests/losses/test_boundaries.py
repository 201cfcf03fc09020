"""Where steps end, against plain loops over the tokens."""

import pytest
import torch

from lightning_qat import losses
from lightning_qat.losses import StepKind

TOKENS = torch.randint(6, (5, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("delimiter", [3, (3,), (0, 5), [1, 2, 3], 99])
def test_delimiters(delimiter: int | list[int] | tuple[int, ...]) -> None:
    ids = [delimiter] if isinstance(delimiter, int) else list(delimiter)
    expected = [[token in ids for token in row] for row in TOKENS.tolist()]
    assert losses.boundaries_from_delimiter(TOKENS, delimiter).tolist() == expected
    mask = torch.arange(17).expand(5, 17) >= 9
    masked = losses.boundaries_from_delimiter(TOKENS, delimiter, mask=mask.long())
    assert masked.tolist() == [[found and position >= 9 for position, found in enumerate(row)] for row in expected]


def test_masks_and_functions() -> None:
    mask = TOKENS > 3
    assert torch.equal(losses.boundaries_from_mask(mask, (5, 17)), mask)
    assert torch.equal(losses.boundaries_from_mask(mask.to(torch.uint8), (5, 17)), mask)
    assert torch.equal(losses.boundaries_from_function(TOKENS, lambda tokens: tokens > 3), mask)


@pytest.mark.parametrize("max_steps", [None, 1, 2, 5, 100])
def test_indices(max_steps: int | None) -> None:
    boundaries = TOKENS == 2
    boundaries[0] = False
    boundaries[1] = True
    positions, used = losses.boundary_indices(boundaries, max_steps=max_steps)
    columns = 17 if max_steps is None else min(max_steps, 17)
    assert positions.shape == used.shape == (5, columns)
    for row, found, valid in zip(boundaries.tolist(), positions.tolist(), used.tolist(), strict=True):
        expected = [position for position, value in enumerate(row) if value][-columns:]
        padding = columns - len(expected)
        assert found == [0] * padding + expected
        assert valid == [False] * padding + [True] * len(expected)


def test_kinds_and_weights() -> None:
    kinds = losses.kinds_from_delimiters(TOKENS, {1: StepKind.CALCULATION, 4: StepKind.ANSWER})
    names = {1: 1, 4: 4}
    assert kinds.tolist() == [[names.get(token, 0) for token in row] for row in TOKENS.tolist()]
    values = {1: 1.5, 4: 2.0}
    weights = losses.step_weights(kinds)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[values.get(token, 1.0) for token in row] for row in TOKENS.tolist()]
    assert losses.step_weights(torch.tensor([[1, 0]]), (0.25, 4.0)).tolist() == [[4.0, 0.25]]


def test_errors() -> None:
    with pytest.raises(ValueError, match="delimiter is empty"):
        losses.boundaries_from_delimiter(TOKENS, ())
    with pytest.raises(ValueError, match=r"boundaries has shape \[3\]; expected \[5, 17\]"):
        losses.boundaries_from_delimiter(TOKENS, 1, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"boundaries has dtype torch.float32"):
        losses.boundaries_from_mask(torch.ones(5, 17), (5, 17))
    with pytest.raises(ValueError, match=r"boundaries has shape \[5\]"):
        losses.boundaries_from_function(TOKENS, lambda tokens: tokens[:, 0])
    with pytest.raises(ValueError, match="max_steps=0"):
        losses.boundary_indices(TOKENS == 1, max_steps=0)
    for weights in ((), (1.0, -1.0)):
        with pytest.raises(ValueError, match="one weight >= 0 per kind"):
            losses.step_weights(TOKENS, weights)
