"""The dataloader of a data module as a value, for configurations that name one."""

from typing import Any

import lightning.pytorch as pl


def train_dataloader(data: "pl.LightningDataModule") -> Any:
    """Return the training dataloader of a data module that no trainer has set up.

    Args:
        data: any data module; its ``prepare_data`` and ``setup("fit")`` are run.

    Example:
        >>> from lightning_qat.data import DigitsData
        >>> samples, labels = next(iter(train_dataloader(DigitsData(batch_size=16))))
        >>> samples.shape, labels.shape
        (torch.Size([16, 8, 8]), torch.Size([16]))
    """
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()
