"""LightningDataModules on data that ships with a dependency or with Python: nothing is downloaded."""

from lightning_qat.data.arithmetic import ArithmeticData
from lightning_qat.data.digits import DigitImages, DigitsData
from lightning_qat.data.loaders import train_dataloader
from lightning_qat.data.sampling import ResumableDataLoader
from lightning_qat.data.text import TextData

__all__ = ["ArithmeticData", "DigitImages", "DigitsData", "ResumableDataLoader", "TextData", "train_dataloader"]
