"""The task modules in a real trainer: they fit, log, save and load, and their metrics are right."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.data import ArithmeticData, DigitImages, DigitsData, TextData
from lightning_qat.data.arithmetic_problems import ANSWER_TOKEN, END_TOKEN, VOCABULARY, decode, parse_answer
from lightning_qat.models import ArithmeticModel, ConvNet, LanguageModel, SequenceClassifier
from lightning_qat.models.language import next_token_loss


def classifier() -> SequenceClassifier:
    return SequenceClassifier(hidden_size=16, num_heads=2, num_layers=1)


def language_model(**arguments: Any) -> LanguageModel:
    return LanguageModel(**{"hidden_size": 16, "num_heads": 2, "num_layers": 1, "window_size": 16, **arguments})


def arithmetic_model() -> ArithmeticModel:
    return ArithmeticModel(hidden_size=16, num_heads=2, num_layers=1)


def conv_net() -> ConvNet:
    return ConvNet(channels=(4, 8))


def digits() -> DigitsData:
    return DigitsData()


def digit_images() -> DigitImages:
    return DigitImages()


def text() -> TextData:
    return TextData(Path(__file__), sequence_length=16, batch_size=4)


def arithmetic() -> ArithmeticData:
    return ArithmeticData(batch_size=8, num_train=16, num_val=8, num_test=8)


TASKS = [(classifier, digits), (conv_net, digit_images), (language_model, text), (arithmetic_model, arithmetic)]
LOGGED = {
    "SequenceClassifier": {"loss", "accuracy"},
    "ConvNet": {"loss", "accuracy"},
    "LanguageModel": {"loss", "bits_per_byte", "perplexity", "accuracy"},
    "ArithmeticModel": {"loss", "exact_match"},
}


def trainer(**arguments: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_checkpointing": False, **arguments})


@pytest.mark.parametrize(("make", "make_data"), TASKS)
def test_fast_dev_run(make: Any, make_data: Any) -> None:
    model, data = make(), make_data()
    run = trainer(fast_dev_run=True)
    run.fit(model, data)
    names = LOGGED[type(model).__name__]
    assert set(run.callback_metrics) == {"train_loss", *(f"val_{name}" for name in names)}
    (tested,) = run.test(model, data, verbose=False)
    assert set(tested) == {f"test_{name}" for name in names}
    assert all(math.isfinite(value) for value in tested.values())
    predictions = run.predict(model, data)
    assert predictions is not None
    assert len(predictions) == 1


@pytest.mark.parametrize(("make", "make_data"), TASKS)
def test_a_checkpoint_loads_without_further_arguments(make: Any, make_data: Any, tmp_path: Path) -> None:
    model, data = make(), make_data()
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.hparams == model.hparams
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_accuracy_and_loss_are_those_of_the_whole_data() -> None:
    """The last batch is smaller: a plain mean over batches would be wrong."""
    model, data = classifier(), DigitsData(batch_size=100)
    (tested,) = trainer().test(model, data, verbose=False)
    samples, labels = data.test_set.tensors
    with torch.no_grad():
        logits = model.eval()(samples)
    assert tested["test_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert tested["test_loss"] == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-5)
    (probabilities, *_) = trainer().predict(model, data) or []
    torch.testing.assert_close(probabilities, logits[:100].softmax(1))


def test_language_metrics_are_those_of_the_whole_data() -> None:
    model, data = language_model(), text()
    (tested,) = trainer().test(model, data, verbose=False)
    tokens, targets = (torch.stack(part) for part in zip(*data.test_set, strict=True))
    assert len(tokens) % 4
    with torch.no_grad():
        log_probabilities = model.eval()(tokens).double().log_softmax(-1)
    loss = -float(log_probabilities.gather(-1, targets[..., None]).mean())
    assert tested["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert tested["test_bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)
    assert tested["test_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert tested["test_accuracy"] == pytest.approx(float((log_probabilities.argmax(-1) == targets).double().mean()))


def test_next_token_loss_leaves_ignored_targets_out() -> None:
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    picked = [(0, 0, 1), (0, 2, 2), (1, 2, 4)]
    expected = -sum(float(logits[row, step].double().log_softmax(0)[token]) for row, step, token in picked) / 3
    assert float(next_token_loss(logits, targets)) == pytest.approx(expected, rel=1e-6)


def test_language_model_is_causal_and_counts_its_parameters() -> None:
    model = language_model().eval()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9] != after[:, 9]).any()
    hidden = 16
    block = 12 * hidden**2 + 13 * hidden
    expected = 256 * hidden + 16 * hidden + block + 2 * hidden + 256 * hidden
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    tied = language_model(tie_embeddings=True)
    assert tied.head.weight is tied.embedding.weight
    assert sum(parameter.numel() for parameter in tied.parameters()) == expected - 256 * hidden


def test_arithmetic_tokens_are_those_of_the_data() -> None:
    model = arithmetic_model()
    assert (model.answer_token, model.end_token) == (ANSWER_TOKEN, END_TOKEN)
    assert model.embedding.num_embeddings == len(VOCABULARY)
    data = ArithmeticData()
    assert data.sequence_length <= model.backbone.window_size


def test_exact_match_counts_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the model writes the true solution of the problems whose answer is even."""
    data = arithmetic()
    data.setup("test")
    texts = [problem.prompt + problem.solution for problem in data.test_set.problems]
    even = [parse_answer(text) % 2 == 0 for text in texts]  # type: ignore[operator]
    assert 0 < sum(even) < len(even)
    written = [text if good else text.replace("#", "#9") for text, good in zip(texts, even, strict=True)]

    def forward(self: ArithmeticModel, tokens: Tensor) -> Tensor:
        choices = torch.zeros(tokens.shape, dtype=torch.long)
        for row, tail in enumerate(tokens.tolist()):
            typed = decode(tail)
            (whole,) = {text for text in written if text[: text.index("=") + 1] == typed[: typed.index("=") + 1]}
            for step in range(len(tail)):
                choices[row, step] = VOCABULARY.index(whole[step + 1]) if step + 1 < len(whole) else END_TOKEN
        return F.one_hot(choices, len(VOCABULARY)).float() * 50

    monkeypatch.setattr(ArithmeticModel, "forward", forward)
    (tested,) = trainer().test(arithmetic_model(), data, verbose=False)
    assert tested["test_exact_match"] == pytest.approx(sum(even) / len(even))


def test_a_model_learns_the_digits() -> None:
    """Three epochs of a very small model: 81 to 89 % on five seeds, where guessing gives 10 %."""
    L.seed_everything(0, verbose=False)
    model = SequenceClassifier(hidden_size=32, num_heads=2, num_layers=1, dropout=0.0, learning_rate=1e-2)
    data = digits()
    run = trainer(max_epochs=3, limit_val_batches=0)
    run.fit(model, data)
    assert run.test(model, data, verbose=False)[0]["test_accuracy"] > 0.7


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("learning_rate", 0.0, "learning_rate=0.0: expected a number above 0"),
        ("weight_decay", -1.0, "weight_decay=-1.0: expected 0 or more"),
        ("warmup_fraction", 1.5, r"warmup_fraction=1.5: expected a share of the steps in \[0, 1\]"),
        ("num_heads", 5, "hidden_size=16 is not a multiple of num_heads=5"),
    ],
)
@pytest.mark.parametrize("kind", [SequenceClassifier, LanguageModel, ArithmeticModel])
def test_errors_at_construction(kind: Any, argument: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"hidden_size": 16, argument: value})


def test_errors_of_the_convolution_net() -> None:
    with pytest.raises(ValueError, match="num_blocks=0: expected an integer of at least 1"):
        ConvNet(channels=())
    with pytest.raises(ValueError, match="num_classes=0"):
        ConvNet(0)


@pytest.mark.parametrize(
    ("model", "samples", "given"),
    [
        (language_model, torch.zeros(2, 8, 8), "torch.float32"),
        (language_model, torch.zeros(8, dtype=torch.long), "torch.int64"),
        (classifier, torch.zeros(2, 8, dtype=torch.long), "torch.int64"),
        (ConvNet, torch.zeros(2, 8, 8), "torch.float32"),
        (ConvNet, [1, 2], "list"),
    ],
)
def test_batches_of_other_data(model: Callable[[], nn.Module], samples: Any, given: str) -> None:
    with pytest.raises(TypeError, match=rf"got {given}.* are expected; does the data fit the model\?"):
        model()(samples)


def test_arithmetic_wants_named_batches() -> None:
    with pytest.raises(TypeError, match=r"a batch is a tuple, not a dict; does the data fit the model\?"):
        ArithmeticModel().tokens_and_targets((torch.zeros(2, 3), torch.zeros(2)))  # type: ignore[arg-type]
