"""The public API: what `import lightning_qat` offers, and what recipes, examples and documents may rely on."""

import lightning_qat

EXPECTED = {
    "AbsMax", "AbsMean", "ActivationCheckpointing", "Binary", "BitAllocation", "Calibration", "Center",
    "Clipped", "ConversionReport", "Distillation", "ElementwiseScaling", "Entropy", "ExportCallback",
    "FakeQuantizer", "FeatureMatch", "FisherError", "GPTQ", "GradualQuantization", "Hadamard", "HalfInt", "Int",
    "LayerSpec", "Learned", "LearnedSoft", "LoRA", "LossChange", "MinimumError", "MovingAverage", "Normalize",
    "OrthogonalUpdates", "OscillationFreezing", "OutputDivergence", "OutputError", "ParameterGroup", "Penalty",
    "PerChannel", "PerGroup", "PerTensor", "PerToken", "Percentile", "Pi", "PlateauBitWidth",
    "ProgressiveBitWidth", "QATCallback", "QuantizationStatistics", "QuantizedTensor", "QuantizerSpec",
    "ReasoningMatch", "Recipe", "Regularization", "Rule", "Soft", "StraightThrough", "Ternary",
    "TwoStageSchedule", "accumulation_window", "add_lora", "adopt_peft", "allocate_bits", "bake", "calibrate",
    "codes", "faster_others", "float_weights", "gptq", "load_checkpoint", "merge_lora", "prepare", "recipes",
    "recommended_callbacks", "unprepare",
}  # fmt: skip


def test_public_names_are_a_decision() -> None:
    """A name that comes or goes is a change of the API: it goes into this list and into the changelog."""
    assert set(lightning_qat.__all__) == EXPECTED


def test_every_public_name_exists() -> None:
    for name in lightning_qat.__all__:
        assert hasattr(lightning_qat, name), name
