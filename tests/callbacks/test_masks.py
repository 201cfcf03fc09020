"""Masks: functions of a batch as values."""

import re
from typing import Any

import pytest
import torch

from lightning_qat.callbacks import BatchMask, DelimiterMask, KindWeights, TargetMask
from lightning_qat.callbacks.masks import entry, ignored_targets
from lightning_qat.losses import StepKind

TOKENS = torch.tensor([[4, 9, 5, 9], [8, 4, 4, 4]])
BATCH = {"tokens": TOKENS, "targets": torch.tensor([[-100, 5, 9, 0], [-100, -100, 1, 2]]),
         "solution": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]), "ids": ["a", "b"]}  # fmt: skip


def test_values() -> None:
    assert torch.equal(BatchMask("solution")(BATCH), BATCH["solution"] == 1)  # type: ignore[arg-type]
    assert BatchMask("solution")(BATCH).dtype == torch.bool
    assert torch.equal(DelimiterMask(9)(BATCH), TOKENS == 9)
    assert torch.equal(DelimiterMask((9, 8))(BATCH), (TOKENS == 9) | (TOKENS == 8))
    assert DelimiterMask(9, within="solution")(BATCH).nonzero().tolist() == [[0, 3]]
    assert TargetMask()(BATCH).tolist() == [[False, True, True, True], [False, False, True, True]]
    assert TargetMask(ignore_index=0)(BATCH).sum() == 7
    weights = KindWeights({9: StepKind.CALCULATION, 8: StepKind.ANSWER})(BATCH)
    assert weights.tolist() == [[1.0, 1.5, 1.0, 1.5], [2.0, 1.0, 1.0, 1.0]]
    assert KindWeights({9: 1}, weights=(0.0, 3.0))(BATCH)[0].tolist() == [0.0, 3.0, 0.0, 3.0]  # type: ignore[dict-item]


def test_entries_of_tuples_by_number() -> None:
    batch = (TOKENS, BATCH["targets"])
    assert torch.equal(TargetMask(1)(batch), TargetMask()(BATCH))
    assert torch.equal(DelimiterMask(9, key=0)(list(batch)), TOKENS == 9)


@pytest.mark.parametrize("batch", [BATCH, (TOKENS,), "text", None])
def test_a_missing_entry_is_named(batch: object) -> None:
    with pytest.raises(
        ValueError, match=r"BatchMask\(key='step_mask'\): the batch, a \w+, has no tensor under 'step_m"
    ):
        BatchMask("step_mask")(batch)


def test_the_message_lists_what_is_there() -> None:
    with pytest.raises(ValueError, match=re.escape("it has ['tokens', 'targets', 'solution']. Name one of these")):
        entry(BATCH, "ids", BatchMask("ids"))  # an entry, but no tensor


def test_probabilities_are_no_mask() -> None:
    with pytest.raises(TypeError, match=r"boundaries has dtype torch\.float32"):
        BatchMask("p")({"p": torch.rand(2, 3)})


@pytest.mark.parametrize("delimiter", [";", [], [9, ";"], True, None])
def test_delimiters_are_ids(delimiter: Any) -> None:
    with pytest.raises(TypeError, match="is not the id of a token, an integer, or several"):
        DelimiterMask(delimiter)


def test_every_kind_needs_a_weight() -> None:
    with pytest.raises(ValueError, match=r"kinds=\{9: 7\} have no weight; there are 5, for the kinds 0 to 4"):
        KindWeights({9: 7})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"weights=\(1, -1\); expected one weight >= 0"):
        KindWeights({9: StepKind.SETUP}, weights=(1, -1))


def test_they_are_values() -> None:
    for mask in (BatchMask("a"), DelimiterMask(9, within="b"), TargetMask(), KindWeights({9: StepKind.ANSWER})):
        names = {each.__name__: each for each in (BatchMask, DelimiterMask, TargetMask, KindWeights)}
        shown = re.sub(r"<StepKind\.\w+: (\d)>", r"\1", repr(mask))
        assert eval(shown, names) == mask


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (BATCH, ("targets", 0.375)),
        ((TOKENS, BATCH["targets"]), (1, 0.375)),
        ([TOKENS], None),
        ({"x": torch.tensor([-100.0])}, None),
        (TOKENS, None),
        ("text", None),
    ],
)
def test_targets_that_do_not_count_are_found(batch: object, found: object) -> None:
    assert ignored_targets(batch) == found
