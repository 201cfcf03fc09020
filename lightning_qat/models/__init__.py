"""Models: the causal transformer and LightningModules that train it, all in float until `prepare` quantizes them."""

from lightning_qat.models.bitnet import BitLinear, BitNet
from lightning_qat.models.classifiers import ConvNet, SequenceClassifier
from lightning_qat.models.generation import answers_match, greedy_generate
from lightning_qat.models.language import ArithmeticModel, LanguageModel
from lightning_qat.models.quantized import (
    QATBlock,
    QuantizedTransformer,
    QuantLinear,
    output_size,
    recommended_defaults,
)
from lightning_qat.models.transformer import Transformer

__all__ = [
    "ArithmeticModel",
    "BitLinear",
    "BitNet",
    "ConvNet",
    "LanguageModel",
    "QATBlock",
    "QuantLinear",
    "QuantizedTransformer",
    "SequenceClassifier",
    "Transformer",
    "answers_match",
    "greedy_generate",
    "output_size",
    "recommended_defaults",
]
