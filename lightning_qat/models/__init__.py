"""Models: the causal transformer and LightningModules that train it, all in float until `prepare` quantizes them."""

from lightning_qat.models.classifiers import ConvNet, SequenceClassifier
from lightning_qat.models.generation import answers_match, greedy_generate
from lightning_qat.models.language import ArithmeticModel, LanguageModel
from lightning_qat.models.transformer import Transformer

__all__ = [
    "ArithmeticModel",
    "ConvNet",
    "LanguageModel",
    "SequenceClassifier",
    "Transformer",
    "answers_match",
    "greedy_generate",
]
