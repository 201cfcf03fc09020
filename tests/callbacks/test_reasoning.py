"""The reasoning term of Distillation: its value, that each model runs once, and that nothing else changes."""

import copy
import itertools
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_qat.callbacks
import lightning_qat.losses
from lightning_qat import Distillation, QATCallback, ReasoningMatch, recipes
from lightning_qat.callbacks import BatchMask, DelimiterMask, FeatureMatch, KindWeights, TargetMask
from lightning_qat.losses import ReasoningWeights, StepKind, hidden_state_mse
from tests.callbacks._models import StatefulLoader, assert_equal_states, fit, state
from tests.callbacks.test_distillation import Rows

VOCABULARY, LENGTH, END = 7, 10, 3
MATCH = ReasoningMatch("norm", boundaries=DelimiterMask(END), answer=BatchMask("answer"))


def batches(number: int = 4, size: int = 4) -> list[dict[str, Tensor]]:
    """Sequences of random tokens; 3 ends a step, the last two positions are the answer; one row has no step."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(number):
        tokens = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=generator)
        tokens[0] = tokens[0].where(tokens[0] != END, END + 1)
        answer = torch.zeros(size, LENGTH, dtype=torch.bool)
        answer[:, -2:] = True
        made.append({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "answer": answer})
    return made


class Writer(pl.LightningModule):
    """Predicts the next token from the ones before; counts its forwards."""

    def __init__(self, seed: int = 0, automatic: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCABULARY)
        self.automatic_optimization = automatic
        self.num_forwards = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.num_forwards += 1
        return self.head(self.hidden(tokens))  # type: ignore[no-any-return]

    def hidden(self, tokens: Tensor) -> Tensor:
        seen = self.embedding(tokens).cumsum(1)
        return self.norm(self.mix(seen).relu() + seen)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        return optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def teacher() -> Writer:
    return Writer(seed=5).requires_grad_(False).eval()  # type: ignore[return-value]


def reference(student: Writer, other: Writer, batch: dict[str, Tensor], weights: ReasoningWeights) -> dict[str, Tensor]:
    """The terms written out position by position, in float64."""
    s, t = student.hidden(batch["tokens"]).double(), other.hidden(batch["tokens"]).double()
    steps, changes, answers = [], [], []
    for row, tokens in enumerate(batch["tokens"]):
        ends = [i for i, token in enumerate(tokens.tolist()) if token == END]
        steps += [1 - F.cosine_similarity(s[row, i], t[row, i], dim=0) for i in ends]
        changes += [
            1 - F.cosine_similarity(s[row, j] - s[row, i], t[row, j] - t[row, i], dim=0)
            for i, j in itertools.pairwise(ends)
        ]
    q, p = (model.head(model.hidden(batch["tokens"])).double().softmax(-1) for model in (student, other))
    answers = (p * (p.log() - q.log())).sum(-1)[batch["answer"]]
    step, change, answer = torch.stack(steps).mean(), torch.stack(changes).mean(), answers.mean()
    total = weights.step * step + weights.trajectory * change + weights.answer * answer
    return {"": total, "_step": step, "_trajectory": change, "_answer": answer}


def kl(student: Writer, other: Writer, batch: dict[str, Tensor]) -> Tensor:
    q, p = (model.head(model.hidden(batch["tokens"])).double().div(2).softmax(-1) for model in (student, other))
    return 4 * (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("weights", [ReasoningWeights(), ReasoningWeights.mathematics()])
def test_the_sum_of_task_distillation_and_reasoning(automatic: bool, weights: ReasoningWeights) -> None:
    """Two steps, against the total written out."""
    model, by_hand = Writer(automatic=automatic), Writer()
    match = replace(MATCH, weights=weights, weight=0.7)
    callback = Distillation(teacher(), weight=0.5, temperature=2.0, reasoning=match)
    fit(model, callback, train=StatefulLoader(batches(2)))
    for batch in batches(2):
        task = F.cross_entropy(by_hand(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        theirs = reference(by_hand, teacher(), batch, weights)[""]
        by_hand.zero_grad()
        (task + 0.5 * kl(by_hand, teacher(), batch) + 0.7 * theirs).backward()
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    for name, value in by_hand.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-4, atol=1e-5)


def test_student_and_teacher_run_once_per_step() -> None:
    model, other = Writer(), teacher()
    feature = FeatureMatch("mix", loss=hidden_state_mse)
    fit(model, Distillation(other, reasoning=MATCH, features=(feature,)), train=StatefulLoader(batches(4)))
    assert (model.num_forwards, other.num_forwards) == (4, 4)


def test_terms_are_logged() -> None:
    logger = Rows()
    fit(Writer(), Distillation(teacher(), weight=1.0, reasoning=MATCH), train=StatefulLoader(batches(1)), logger=logger,
        log_every_n_steps=1)  # fmt: skip
    ((_, row),) = [(step, row) for step, row in logger.rows if "distillation/reasoning" in row]
    for name, value in reference(Writer(), teacher(), batches(1)[0], ReasoningWeights()).items():
        assert row[f"distillation/reasoning{name}"] == pytest.approx(value.item(), rel=1e-4)
    total = row["distillation/loss"] + row["distillation/reasoning"]
    assert row["distillation/ratio"] == pytest.approx(total / row["distillation/task_loss"], rel=1e-5)


def test_steps_weigh_by_their_kind() -> None:
    """With the second of two kinds at weight 0 only steps of the first are left."""
    kinds = {END: StepKind.CALCULATION, 5: StepKind.ANSWER}
    only = KindWeights(kinds, weights=(0.0, 1.0, 0.0, 0.0, 0.0))
    both = replace(MATCH, boundaries=DelimiterMask((END, 5)), step_weights=only)
    alone = ReasoningWeights(step=1.0, trajectory=0.0, answer=0.0)
    trained = []
    for match in (both, MATCH):
        model = Writer()
        fit(model, Distillation(teacher(), reasoning=replace(match, weights=alone)), train=StatefulLoader(batches()))
        trained.append(state(model))
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


def with_mask(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "ends": (batch["tokens"] == END).long()}


def test_boundaries_from_a_token_a_mask_or_a_function() -> None:
    ways: list[Any] = [DelimiterMask(END), BatchMask("ends"), lambda batch: batch["tokens"] == END]
    trained = []
    for boundaries in ways:
        model = Writer()
        callback = Distillation(teacher(), reasoning=replace(MATCH, boundaries=boundaries))
        fit(model, callback, train=StatefulLoader([with_mask(batch) for batch in batches()]))
        trained.append(state(model))
    assert_equal_states(trained[0], trained[1])
    assert_equal_states(trained[0], trained[2])


def test_accumulation_is_the_mean_over_micro_batches() -> None:
    """Sequences are repeated, so that four batches hold the same mean as one."""
    repeated, once = Writer(), Writer()
    fit(repeated, Distillation(teacher(), reasoning=MATCH), train=StatefulLoader(batches(1) * 4),
        accumulate_grad_batches=4)  # fmt: skip
    fit(once, Distillation(teacher(), reasoning=MATCH), train=StatefulLoader(batches(1)))
    torch.testing.assert_close(state(repeated), state(once), rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_float32() -> None:
    trained = []
    for precision in ("bf16-mixed", "32-true"):
        model = Writer()
        fit(model, QATCallback(recipes.int4()), Distillation(teacher(), reasoning=MATCH), precision=precision,
            train=StatefulLoader(batches()))  # fmt: skip
        trained.append(state(model))
        assert all(value.dtype == torch.float32 for value in trained[-1].values() if value.is_floating_point())
    torch.testing.assert_close(*trained, rtol=0.1, atol=0.02)


def train(folder: Path, ckpt: Path | None = None, **options: Any) -> dict[str, Tensor]:
    model = Writer(seed=0 if ckpt is None else 9)
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [QATCallback(recipes.int3()), Distillation(reasoning=MATCH, mask=TargetMask()), saves]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory")
        fit(model, *callbacks, train=StatefulLoader(batches()), ckpt=ckpt, max_epochs=2, **options)
    return state(model)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = train(tmp_path, **options)
    assert_equal_states(train(tmp_path / "resumed", tmp_path / "step=2.ckpt", **options), whole)


def test_one_layer_has_to_match() -> None:
    for match, message in (
        (
            "blocks.*.norm",
            r"ReasoningMatch\(match='blocks.\*.norm'\) matches no module of Writer; candidates: \['norm'",
        ),
        ("*", r"ReasoningMatch\(match='\*'\) matches 4 modules of Writer, expected one; choose one of \['embedding', "),
    ):
        with pytest.raises(ValueError, match=message):
            fit(Writer(), Distillation(reasoning=replace(MATCH, match=match)), train=StatefulLoader(batches()))
    with pytest.raises(ValueError, match="the teacher has no layer 'norm'"):
        fit(Writer(), Distillation(lambda: nn.Embedding(VOCABULARY, VOCABULARY), reasoning=MATCH),
            train=StatefulLoader(batches()))  # fmt: skip


class Unused(Writer):
    """Has a layer that its forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.LayerNorm(8)


def test_what_a_batch_lacks_is_said_in_the_first_step() -> None:
    cases: list[tuple[ReasoningMatch, str]] = [
        (replace(MATCH, boundaries=BatchMask("ends")), r"BatchMask\(key='ends'\): the batch, a dict, has no tensor .* "
         r"it has \['tokens', 'targets', 'answer'\]"),
        (replace(MATCH, boundaries=lambda batch: batch["tokens"][:, 1:] == END), r"boundaries has shape \[4, 9\]"),
        (replace(MATCH, match="spare"), r"ReasoningMatch\(match='spare'\): spare did not run inside the student's"),
        (replace(MATCH, select=lambda hidden: hidden[:, -1]), r"gives a tensor of shape \[4, 8\], expected hidden st"),
        (replace(MATCH, select=lambda hidden: None), "the layer gives a Tensor, expected hidden states"),
    ]  # fmt: skip
    for match, message in cases:
        with pytest.raises(ValueError, match=message):
            fit(Unused(), Distillation(reasoning=match), train=StatefulLoader(batches()))


def test_values_out_of_range() -> None:
    for changes, message in (
        ({"weight": -1.0}, r"weight=-1.0 is not allowed"),
        ({"max_steps": 0}, "max_steps=0; choose at least 1"),
        ({"answer": None}, r"weights.answer=0.2 without answer=...; pass a function"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(MATCH, **changes)
    with pytest.raises(ValueError, match=r"'physics' is no preset; choose one of \['default', 'mathematics', 'code'\]"):
        ReasoningWeights.named("physics")
    for changes, message in (
        (
            {"boundaries": "step_mask"},
            r"boundaries='step_mask' is not a function of the batch; .* BatchMask\('step_mask'\)",
        ),
        ({"boundaries": 15}, r"boundaries=15 is not a function of the batch; .* DelimiterMask\(15\)"),
        ({"boundaries": None}, "boundaries=None is not a function of the batch"),
        ({"select": 0}, "select=0 is not a function; give one"),
        ({"weights": (0.3, 0.5, 0.2)}, r"is not a ReasoningWeights; .* ReasoningWeights.named\('mathematics'\)"),
    ):
        with pytest.raises(TypeError, match=message):
            replace(MATCH, **changes)
    assert ReasoningWeights.named("mathematics") == ReasoningWeights.mathematics()
    assert ReasoningWeights.named("default") == ReasoningWeights()


def test_without_answer() -> None:
    unmarked, marked = Writer(), Writer()
    weights = ReasoningWeights(answer=0.0)
    for model, answer in ((unmarked, None), (marked, MATCH.answer)):
        fit(model, Distillation(teacher(), reasoning=replace(MATCH, answer=answer, weights=weights, max_steps=LENGTH)),
            train=StatefulLoader(batches()))  # fmt: skip
    assert_equal_states(state(unmarked), state(marked))


def test_repr_and_copies() -> None:
    callback = Distillation(reasoning=replace(MATCH, weight=0.5, max_steps=3), mask=TargetMask())
    names = vars(lightning_qat.callbacks) | vars(lightning_qat.losses)
    assert repr(eval(repr(callback), names)) == repr(callback)
    fit(Writer(), callback, train=StatefulLoader(batches()))
    for made in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert made.reasoning == callback.reasoning
