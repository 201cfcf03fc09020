"""Distillation: what is added to the loss, by which teacher, and what stays as if it were not there."""

import copy
import functools
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import lightning_qat
from lightning_qat import QATCallback, prepare, recipes
from lightning_qat.callbacks import Distillation, FeatureMatch, TargetMask
from lightning_qat.losses import (
    attention_relation_loss,
    hidden_state_mse,
    kl_divergence,
    mean_squared_error,
    next_token_mask,
    reverse_kl_divergence,
)
from lightning_qat.models import ConvNet, SequenceClassifier
from lightning_qat.schedules import LinearRamp
from tests.callbacks._models import (
    CLASSES,
    HIDDEN,
    WIDTH,
    Net,
    StatefulLoader,
    adamw,
    assert_equal_states,
    data,
    fit,
    loader,
    state,
    trainer,
)


def sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def frozen(seed: int = 7) -> Net:
    return Net(seed=seed).requires_grad_(False).eval()  # type: ignore[return-value]


def reference_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The published formula, per sample, in float64."""
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


class Dropout(Net):
    """Draws random numbers in training."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.dropout(self.first(x).relu(), 0.5, self.training))
        return out


class ByHand(Net):
    """The user's own loss plus the teacher's, written out: what Distillation must equal."""

    def __init__(self, teacher: nn.Module, weight: float, temperature: float, **options: Any) -> None:
        super().__init__(**options)
        self.teach = [teacher]
        self.weight, self.temperature = weight, temperature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        kl = kl_divergence(logits, self.teach[0](batch[0]), temperature=self.temperature)
        return F.cross_entropy(logits, batch[1]) + self.weight * kl


def assert_same_training(first: nn.Module, second: nn.Module) -> None:
    assert_equal_states(state(first), {key: value for key, value in state(second).items() if "teach" not in key})


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_equals_the_loss_written_by_hand(options: dict[str, Any], optimizer: Callable[..., Any]) -> None:
    teacher = frozen()
    model, by_hand = Net(optimizer=optimizer), ByHand(teacher, 0.7, 3.0, optimizer=optimizer)
    fit(model, QATCallback(recipes.int4()), Distillation(frozen(), weight=0.7, temperature=3.0), **options)
    fit(by_hand, QATCallback(recipes.int4()), **options)
    assert_same_training(model, by_hand)


def test_value_of_the_first_step() -> None:
    teacher, model, losses = frozen(), Net(), []

    class Seen(Net):
        def on_before_backward(self, loss: Tensor) -> None:
            losses.append(loss.detach())

    student = Seen()
    batch = next(iter(loader()))
    with torch.no_grad():
        logits = model(batch[0])
        task = F.cross_entropy(logits.double(), batch[1])
        expected = task + 0.5 * reference_kl(logits, teacher(batch[0]), 2.0)
    fit(student, Distillation(teacher, weight=0.5, temperature=2.0), limit_train_batches=1)
    torch.testing.assert_close(losses[0].double(), expected, rtol=1e-6, atol=1e-7)


class Manual(Net):
    """Manual optimization with two losses, each differentiated on its own."""

    def __init__(self, teacher: nn.Module | None = None) -> None:
        super().__init__(optimizer=sgd)
        self.automatic_optimization = False
        self.teach = [teacher]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            logits = self(batch[0][part])
            loss = F.cross_entropy(logits, batch[1][part])
            if self.teach[0] is not None:
                loss = loss + kl_divergence(logits, self.teach[0](batch[0][part]))
            self.manual_backward(loss)
        self.manual_backward(0.01 * self.first._parameters["weight"].square().sum())  # no forward: nothing is added
        optimizer.step()


def test_manual_optimization_with_several_losses_and_forwards() -> None:
    model, by_hand = Manual(), Manual(frozen())
    fit(model, Distillation(frozen(), weight=1.0, temperature=2.0))
    fit(by_hand)
    assert_same_training(model, by_hand)


def test_several_forwards_in_a_step_add_one_loss_each() -> None:
    class Twice(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            first, second = self(batch[0]), self(-batch[0])
            loss = F.cross_entropy(first, batch[1]) + second.square().mean()
            if self.teach is not None:
                for out, x in ((first, batch[0]), (second, -batch[0])):
                    loss = loss + kl_divergence(out, self.teach[0](x))
            return {"loss": loss, "other": first.detach()}

    model, by_hand = Twice(optimizer=sgd), Twice(optimizer=sgd)
    model.teach, by_hand.teach = None, [frozen()]  # type: ignore[assignment]
    fit(model, Distillation(frozen(), weight=1.0, temperature=2.0))
    fit(by_hand)
    torch.testing.assert_close(state(model), state(by_hand), rtol=1e-6, atol=1e-7)  # a sum in another order


def test_random_numbers_of_the_student_are_its_own() -> None:
    """A teacher with dropout and a factory that draws its weights shift nothing (weight 0: only the stream could)."""
    with_teacher, without = Dropout(optimizer=sgd), Dropout(optimizer=sgd)
    torch.manual_seed(3)
    fit(with_teacher, Distillation(lambda: Dropout(seed=torch.randint(9, ()).item()), weight=0.0))  # type: ignore[arg-type]
    drawn = torch.rand(3)
    torch.manual_seed(3)
    fit(without)
    assert_same_training(with_teacher, without)
    assert torch.equal(drawn, torch.rand(3))


def test_the_teacher_is_nowhere_in_the_module() -> None:
    model, callback, average = Net(), Distillation(), EMAWeightAveraging()
    plain = Net()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
        fit(model, QATCallback(recipes.int4()), callback, average)
    fit(plain, QATCallback(recipes.int4()))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.modules())) == len(list(plain.modules()))
    assert len(list(average._average_model.module.parameters())) == len(list(plain.parameters()))  # type: ignore[union-attr]
    teacher = callback.teacher.module
    assert teacher is not None
    assert not teacher.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_the_default_teacher_is_the_float_model_whatever_the_order() -> None:
    untouched = Net()
    for order in (slice(None), slice(None, None, -1)):
        callback = Distillation()
        fit(Net(), *[QATCallback(recipes.int2()), callback][order])
        teacher = callback.teacher.module
        assert teacher is not None
        assert_equal_states(state(teacher), state(untouched))


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """A Lightning checkpoint and a plain state_dict of the teacher."""
    made = trainer()
    made.strategy.connect(frozen())
    made.save_checkpoint(folder / "lightning.ckpt")
    torch.save(frozen().state_dict(), folder / "plain.pt")
    return {"lightning": folder / "lightning.ckpt", "plain": folder / "plain.pt"}


@pytest.mark.parametrize("kind", ["lightning", "plain"])
def test_checkpoints_are_teachers(kind: str, tmp_path: Path) -> None:
    from_file, given = Net(), Net()
    fit(from_file, Distillation(write_checkpoints(tmp_path)[kind]))
    fit(given, Distillation(frozen()))
    assert_same_training(from_file, given)


RESUME = """
import sys
from tests.callbacks.test_distillation import resume
resume(*sys.argv[1:])
"""


def teacher_of(kind: str, folder: Path) -> Any:
    return {
        "copy": None,
        "module": frozen(),
        "factory": frozen,
        "lightning": folder / "lightning.ckpt",
        "plain": folder / "plain.pt",
    }[kind]


def start(kind: str, folder: Path, teacher: Any = None, **options: Any) -> Net:
    model = Net(seed=0 if options.get("ckpt") is None else 5)
    checkpoint = ModelCheckpoint(folder / kind, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory")
        fit(
            model,
            QATCallback(recipes.int4()),
            Distillation(teacher_of(kind, folder) if teacher is None else teacher),
            checkpoint,
            max_epochs=2,
            **options,
        )
    return model


def resume(folder: str) -> None:
    """Runs in a new process."""
    for kind in ("copy", "module", "factory", "lightning", "plain"):
        model = start(kind, Path(folder), ckpt=Path(folder) / kind / "epoch=0.ckpt")
        torch.save(model.state_dict(), Path(folder) / f"{kind}.resumed.pt")


def test_every_kind_of_teacher_is_back_in_a_new_process(tmp_path: Path) -> None:
    write_checkpoints(tmp_path)
    whole = {kind: state(start(kind, tmp_path)) for kind in ("copy", "module", "factory", "lightning", "plain")}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "ignore", "-c", RESUME, str(tmp_path)], check=True, cwd=root, timeout=120)
    for kind, expected in whole.items():
        assert_equal_states(torch.load(tmp_path / f"{kind}.resumed.pt", weights_only=True), expected)


def test_another_teacher_on_resume_is_an_error(tmp_path: Path) -> None:
    write_checkpoints(tmp_path)
    start("plain", tmp_path)
    torch.save(frozen(8).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"the file .*plain.pt is not the teacher of the checkpoint"):
        start("plain", tmp_path, ckpt=tmp_path / "plain" / "epoch=0.ckpt")
    start("module", tmp_path)
    with pytest.raises(ValueError, match="the given teacher is not the teacher of the checkpoint"):
        start("module", tmp_path, frozen(8), ckpt=tmp_path / "module" / "epoch=0.ckpt")


def test_a_checkpoint_without_teacher_is_said(tmp_path: Path) -> None:
    fit(Net(), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="the checkpoint holds no teacher"):
        fit(Net(), Distillation(), max_epochs=2, ckpt=tmp_path / "plain.ckpt")


def test_the_teacher_of_the_first_fit_stays_for_the_same_module() -> None:
    model, callback = Net(), Distillation()
    fit(model, callback)
    first = callback.teacher.module
    fit(model, callback)
    assert callback.teacher.module is first
    fit(Net(seed=3), callback)
    assert callback.teacher.module is not first


def test_half_the_memory_in_bfloat16() -> None:
    model, callback = Net(), Distillation(dtype="bfloat16")
    fit(model, callback)
    teacher = callback.teacher.module
    assert teacher is not None
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    exact = Net()
    fit(exact, Distillation())
    torch.testing.assert_close(model.head.weight, exact.head.weight, rtol=0.05, atol=0.01)


class Output(Net):
    """Returns what a test wants."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__(optimizer=sgd)
        self.wrap, self.unwrap = wrap, unwrap

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x).relu()
        return self.wrap(self.head(hidden), hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.unwrap(self(batch[0])), batch[1])


@pytest.mark.parametrize(
    ("wrap", "unwrap", "options"),
    [
        (lambda y, h: (y, h), lambda out: out[0], {}),
        (lambda y, h: {"logits": y, "hidden": h}, lambda out: out["logits"], {}),
        (lambda y, h: {"scores": y, "ids": y.argmax(-1)}, lambda out: out["scores"], {}),
        (lambda y, h: SimpleNamespace(logits=y, loss=None), lambda out: out.logits, {}),
        (lambda y, h: {"a": y, "b": h}, lambda out: out["a"], {"select": lambda out: out["a"]}),
    ],
)
def test_outputs_are_found(wrap: Any, unwrap: Any, options: dict[str, Any]) -> None:
    model, plain = Output(wrap, unwrap), Net(optimizer=sgd)
    fit(model, Distillation(weight=2.0, **options))
    fit(plain, Distillation(weight=2.0))
    assert_equal_states(state(model), state(plain))


def test_it_says_what_it_cannot_tell() -> None:
    model = Output(lambda y, h: {"a": y, "b": h}, lambda out: out["a"])
    with pytest.raises(ValueError, match=r"output of 'Output' .* a dict with the keys \['a', 'b'\]; pass Distillation"):
        fit(model, Distillation())


class Children(Net):
    """Calls its children, not itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.first(batch[0]).relu()), batch[1])


def test_a_module_is_named_where_several_ran() -> None:
    message = r"several children ran: \['first', 'head'\]. Name one with Distillation\(module=...\)"
    with pytest.raises(ValueError, match=message):
        fit(Children(), Distillation())
    named, plain = Children(), Net()
    fit(named, Distillation(frozen(), module="head"))
    fit(plain)
    assert not torch.equal(named.head.weight, plain.head.weight)
    with pytest.raises(ValueError, match=r"module='haed' is no module of Children; candidates: \['head'"):
        fit(Children(), Distillation(module="haed"))


class OneChild(Net):
    """The common case of a LightningModule without forward around a network."""

    def __init__(self) -> None:
        super().__init__(optimizer=sgd)
        self.net = nn.Sequential(self.first, nn.ReLU(), self.head)
        del self.first, self.head

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("teacher", [None, lambda: OneChild().net])
def test_the_one_child_that_runs_is_found(teacher: Any) -> None:
    model, plain = OneChild(), Net(optimizer=sgd)
    fit(model, Distillation(teacher))
    fit(plain, Distillation())
    assert torch.equal(model.net[0].weight, plain.first.weight)  # type: ignore[arg-type]


def test_a_mask_from_the_batch_also_in_manual_optimization() -> None:
    class Tokens(Net):
        def __init__(self, manual: bool) -> None:
            super().__init__(optimizer=sgd)
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch["x"])
            loss = 0.0 * logits.sum()
            if self.automatic_optimization:
                return loss
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            return optimizer.step()

    x, labels = torch.randn(2, 5, WIDTH), torch.tensor([[1, 2, 3, -100, -100], [1, 1, 1, 1, 1]])
    batch = {"x": x, "labels": labels}
    student, teacher = Net(), frozen()
    logits = student(x)
    kept = next_token_mask(labels)
    reference_kl(logits[kept], teacher(x)[kept], 2.0).backward()
    expected = student.head.weight.detach() - 0.1 * student.head.weight.grad  # type: ignore[operator]
    for manual in (False, True):
        model = Tokens(manual)
        fit(
            model,
            Distillation(frozen(), weight=1.0, temperature=2.0, mask=lambda batch: next_token_mask(batch["labels"])),
            train=StatefulLoader([batch]),
        )
        torch.testing.assert_close(model.head.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_layers_inside_follow_the_teacher() -> None:
    """One step, against the sum written out."""
    x, y = data(8).tensors
    student, teacher = Net(), frozen()
    hidden = student.first(x)
    loss = F.cross_entropy(student(x), y) + reference_kl(student(x), teacher(x), 2.0)
    loss = loss + 0.3 * (hidden - teacher.first(x)).square().mean()
    loss.backward()
    model = Net(optimizer=sgd)
    feature = FeatureMatch("fir*", loss=hidden_state_mse, weight=0.3)
    fit(model, Distillation(frozen(), weight=1.0, temperature=2.0, features=(feature,)), train=StatefulLoader([[x, y]]))
    expected = student.first.weight.detach() - 0.1 * student.first.weight.grad  # type: ignore[operator]
    torch.testing.assert_close(model.first.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def blocks(*layers: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"embedding": nn.Embedding(9, 4), "layers": nn.ModuleList(layers), "head": nn.Linear(4, 9)})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (SequenceClassifier(num_layers=3), ["backbone.blocks.0", "backbone.blocks.1", "backbone.blocks.2"]),
        (ConvNet(), ["blocks.0", "blocks.1", "blocks.2"]),
        (nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(4, 5)), ["0", "3"]),
        (blocks(nn.TransformerEncoderLayer(4, 2)), ["layers.0"]),
        (blocks(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))), ["layers.0"]),  # the outermost
        (nn.ModuleDict({"body": nn.Sequential(blocks(nn.Linear(4, 4)), nn.Softmax(-1))}), ["body.0.layers.0"]),
        (nn.Transformer(4, 2, 1, 2, 8, batch_first=True), ["encoder.layers.0", "decoder.layers.0", "decoder.layers.1"]),
    ],
    ids=["transformer", "convolutions", "sequence", "one", "nested", "lone entry", "encoder and decoder"],
)
def test_blocks_are_found(model: nn.Module, expected: list[str]) -> None:
    assert list(FeatureMatch().find_layers(model)) == expected
    prepare(model, recipes.int4())
    assert list(FeatureMatch().find_layers(model)) == expected


def test_blocks_follow_the_teacher() -> None:
    """What is added is its weight times the mean over blocks of the logarithm of the relative error."""

    class Deep(Net):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            torch.manual_seed(3)
            self.layers = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)])

        def states(self, x: Tensor) -> list[Tensor]:
            states = [self.first(x)]
            for layer in self.layers:
                states.append(layer(states[-1].relu()))
            return states[1:]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.states(x)[-1].relu())
            return out

    x, y = data(8).tensors
    teacher = Deep(seed=7).requires_grad_(False).eval()
    by_hand = Deep()
    errors = [
        (s - t).square().sum() / t.square().sum() for s, t in zip(by_hand.states(x), teacher.states(x), strict=True)
    ]
    blocks_loss = (1 + 1000 * torch.stack(errors)).log().mean()
    loss = F.cross_entropy(by_hand(x), y) + reference_kl(by_hand(x), teacher(x), 1.0) + 0.7 * blocks_loss
    loss.backward()
    model = Deep(optimizer=sgd)
    matching = Distillation(teacher, weight=1.0, features=(FeatureMatch(weight=0.7),))
    fit(model, matching, train=StatefulLoader([[x, y]]))
    for (name, after), before in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - 0.1 * before.grad, rtol=1e-5, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match=r"FeatureMatch\(\) finds no blocks in Net.*there are \['first', 'head'\]"):
        fit(Net(), Distillation(features=(FeatureMatch(),)))


def test_the_weight_of_features_follows_the_run() -> None:
    """Every step adds 0.6 (1 - t)^2 times what a weight of 1 adds."""
    added: list[float] = []

    class Seen(Net):
        def on_before_backward(self, loss: Tensor) -> None:
            added.append(loss.item())

    def training(model: Net, feature: FeatureMatch | None) -> list[float]:
        added.clear()
        features = () if feature is None else (feature,)
        fit(model, Distillation(frozen(), weight=0.0, features=features), max_epochs=2, log_every_n_steps=1)
        return list(added)

    def still(module: Any) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.0)

    features = None, FeatureMatch("first", weight=1), FeatureMatch("first")
    without, with_one, ramp = (training(Seen(optimizer=still), feature) for feature in features)
    assert len(ramp) == 8
    errors = torch.tensor(with_one, dtype=torch.float64) - torch.tensor(without, dtype=torch.float64)
    found = (torch.tensor(ramp, dtype=torch.float64) - torch.tensor(without, dtype=torch.float64)) / errors
    share = torch.arange(len(ramp), dtype=torch.float64) / len(ramp)
    torch.testing.assert_close(found, 0.6 * (1 - share) ** 2, rtol=1e-3, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"FeatureMatch without weight=<number> follows the share.*give Trainer\(max_s"
    ):
        fit(Net(), Distillation(features=(FeatureMatch("first"),)), max_epochs=-1)


def test_relations_of_attention() -> None:
    class Attending(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.unsqueeze(0).expand(2, -1, -1)).mean(0)

    def relations(out: Tensor) -> list[Tensor]:
        return [out[..., :4], out[..., 4:]]

    relation = functools.partial(attention_relation_loss, num_relation_heads=2)
    model, without = Attending(optimizer=sgd), Attending(optimizer=sgd)
    fit(model, Distillation(features=(FeatureMatch("first", loss=relation, select=relations),)))
    fit(without, Distillation())
    assert not torch.equal(model.first.weight, without.first.weight)
    with pytest.raises(ValueError, match=r"FeatureMatch\(match='blocks\.\*'\) matches no module of Net; candidates"):
        fit(Net(), Distillation(features=(FeatureMatch("blocks.*"),)))
    with pytest.raises(ValueError, match="the teacher has no layer 'first'"):
        fit(Net(), Distillation(lambda: nn.Linear(WIDTH, CLASSES), features=(FeatureMatch("first"),)))


class Rows:
    """A logger that keeps what it gets."""

    def __new__(cls) -> Any:
        logger = CSVLogger("logs")
        logger.rows = []  # type: ignore[attr-defined]
        logger.log_metrics = lambda metrics, step: logger.rows.append((step, metrics))  # type: ignore[method-assign, attr-defined]
        return logger


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_to_every_logger(accumulate: int) -> None:
    loggers = [Rows(), Rows()]
    fit(Net(), Distillation(weight=0.5), logger=loggers, log_every_n_steps=2, accumulate_grad_batches=accumulate,
        train=loader(64))  # fmt: skip
    for logger in loggers:
        rows = [(step, row) for step, row in logger.rows if "distillation/loss" in row]
        assert [step for step, _ in rows] == list(range(1, 8 // accumulate, 2))
        for _, row in rows:
            expected = 0.5 * row["distillation/loss"] / row["distillation/task_loss"]
            assert row["distillation/ratio"] == pytest.approx(expected, rel=1e-5)
            assert 0 <= row["distillation/top1_agreement"] <= 1
    assert loggers[0].rows[0][1]["distillation/top1_agreement"] > 0.7  # hardly moved away from its copy


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the compiler, of outputs
@pytest.mark.parametrize("whole", [True, False], ids=["module", "layer"])
def test_layers_of_a_compiled_module(whole: bool) -> None:
    """Also where it was compiled before anything looked inside: torch does not see that hooks came later."""

    def trained(*, compiled: bool, features: tuple[FeatureMatch, ...]) -> nn.Module:
        model: Any = Net(optimizer=sgd)
        if compiled and not whole:
            model.first.compile(backend="eager")
        fit(
            torch.compile(model, backend="eager") if compiled and whole else model,
            Distillation(frozen(), features=features),
        )
        return model  # type: ignore[no-any-return]

    matched = (FeatureMatch("first"),)
    without = trained(compiled=True, features=())
    found, expected = trained(compiled=True, features=matched), trained(compiled=False, features=matched)
    assert_equal_states(state(found), state(expected))
    assert not torch.equal(found.first.weight, without.first.weight)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
def test_a_compiled_module() -> None:
    torch._dynamo.reset()
    model, plain = Net(optimizer=sgd), Net(optimizer=sgd)
    compiled = torch.compile(model, backend="eager")
    step = model.training_step
    fit(compiled, QATCallback(recipes.int4()), Distillation(weight=2.0))
    fit(plain, QATCallback(recipes.int4()), Distillation(weight=2.0))
    torch.testing.assert_close(state(model), state(plain), rtol=1e-5, atol=1e-6)
    assert model.training_step is not step  # as Lightning left it: compiled
    assert "training_step" in vars(model)


def test_losses_and_options() -> None:
    model = Net()
    fit(model, Distillation(loss=reverse_kl_divergence, temperature=4.0))
    fit(model, Distillation(loss=mean_squared_error))
    with pytest.raises(ValueError, match=r"temperature=4.0 has no effect: .*mean_squared_error takes no temperature"):
        Distillation(loss=mean_squared_error, temperature=4.0)
    with pytest.raises(ValueError, match="mask has no effect"):
        Distillation(loss=lambda student, teacher: (student - teacher).square().mean(), mask=lambda batch: batch)
    with pytest.raises(ValueError, match=r"temperature=0.0 is not allowed"):
        Distillation(temperature=0.0)
    with pytest.raises(ValueError, match=r"weight=-1 is not allowed"):
        Distillation(weight=-1)
    with pytest.raises(ValueError, match=r"dtype='float16' is not allowed; choose one of"):
        Distillation(dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"teacher='missing.ckpt' is not a file"):
        Distillation("missing.ckpt")
    with pytest.raises(TypeError, match="teacher=3 is no checkpoint path, module or factory"):
        Distillation(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight=-0.5 is not allowed"):
        FeatureMatch("*", weight=-0.5)
    with pytest.raises(ValueError, match=r"FeatureMatch: weight=LinearRamp\(end=-1.0"):
        FeatureMatch("*", weight=LinearRamp(-1.0))
    with pytest.raises(TypeError, match=r"FeatureMatch: match=\['a'\] is no glob"):
        FeatureMatch(["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"mask='targets' is no function of the batch; pass TargetMask\('targets'\)"):
        Distillation(mask="targets")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"is no tuple of FeatureMatch; pass \(FeatureMatch\(\.\.\.\),\)"):
        Distillation(features=FeatureMatch("*"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"reasoning=True is no ReasoningMatch"):
        Distillation(reasoning=True)  # type: ignore[arg-type]


def test_targets_that_nobody_masks_are_said_once() -> None:
    class Labelled(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch["x"]).square().mean()

    batch = {"x": torch.randn(2, 2, WIDTH), "labels": torch.tensor([[1, -100], [1, 1]])}
    with pytest.warns(UserWarning, match=r"25% of batch\['labels'\] are -100.*mask=TargetMask\('labels'\)") as said:
        fit(Labelled(), Distillation(), train=StatefulLoader([batch] * 3))
    assert sum("-100" in str(each.message) for each in said) == 1
    fit(Labelled(), Distillation(mask=TargetMask("labels")), train=StatefulLoader([batch]))


def test_a_teacher_needs_weights_of_its_own() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"the teacher's first.weight is the student's first.weight"):
        fit(model, Distillation(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_repr_and_copies() -> None:
    callback = Distillation(temperature=4.0, weight=0.5, loss=reverse_kl_divergence, module="head", dtype="bfloat16",
                            features=(FeatureMatch("*"),))  # fmt: skip
    names = {"Distillation": Distillation, "FeatureMatch": FeatureMatch, "lightning_qat": lightning_qat}
    assert repr(Distillation()) == "Distillation()"
    plain = Distillation(temperature=4.0, weight=0.5, loss=reverse_kl_divergence, module="head", dtype="bfloat16")
    assert repr(eval(repr(plain), names)) == repr(plain)
    assert "FeatureMatch(match='*'" in repr(callback)
    fitted = Distillation(frozen())
    fit(Net(), fitted)
    for made in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert made.teacher.module is not fitted.teacher.module
        assert_equal_states(state(made.teacher.module), state(fitted.teacher.module))  # type: ignore[arg-type]
