"""The digits: values, shapes, a split that is fixed and holds the classes in equal shares."""

import gzip
from importlib import resources

import pytest
import torch

from lightning_qat.data import DigitImages, DigitsData
from lightning_qat.data.digits import load_digits, stratified_split


def test_values_are_the_pixels_of_the_file_over_sixteen() -> None:
    packed = resources.files("sklearn.datasets.data").joinpath("digits.csv.gz").read_bytes()
    rows = [[float(cell) for cell in line.split(b",")] for line in gzip.decompress(packed).splitlines()]
    table = torch.tensor(rows)
    images, labels = load_digits()
    assert torch.equal(images.flatten(1) * 16, table[:, :64])
    assert torch.equal(labels, table[:, 64].long())
    assert images.min() == 0
    assert images.max() == 1


def test_split_is_disjoint_complete_and_stratified() -> None:
    _, labels = load_digits()
    split = stratified_split(labels, val_fraction=0.1, test_fraction=0.2, seed=0)
    everything = torch.cat([split.train, split.val, split.test])
    assert sorted(everything.tolist()) == list(range(1797))
    for part, share in ((split.train, 0.7), (split.val, 0.1), (split.test, 0.2)):
        assert ((labels[part].bincount() - share * labels.bincount()).abs() <= 1).all()


def test_split_depends_on_its_seed_alone() -> None:
    _, labels = load_digits()
    first, again, other = (
        stratified_split(labels, val_fraction=0.1, test_fraction=0.2, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.test, other.test)


@pytest.mark.parametrize(("kind", "shape"), [(DigitsData, (8, 8)), (DigitImages, (1, 8, 8))])
def test_batches(kind: type[DigitsData], shape: tuple[int, ...]) -> None:
    data = kind(batch_size=50)
    data.setup("fit")
    samples, labels = next(iter(data.train_dataloader()))
    assert samples.shape == (50, *shape)
    assert samples.dtype == torch.float32
    assert labels.shape == (50,)
    assert labels.dtype == torch.int64
    sizes = [sum(len(y) for _, y in loader) for loader in (data.train_dataloader(), data.val_dataloader())]
    assert sizes == [len(data.train_set), len(data.val_set)] == [1259, 179]
    assert sum(len(y) for _, y in data.test_dataloader()) == 359
    assert torch.equal(next(iter(data.predict_dataloader()))[0], next(iter(data.test_dataloader()))[0])


def test_runs_of_other_seeds_share_the_split_but_not_the_order() -> None:
    first, second = DigitsData(seed=0), DigitsData(seed=1)
    for data in (first, second):
        data.setup("fit")
    assert torch.equal(first.test_set.tensors[0], second.test_set.tensors[0])
    labels = [next(iter(data.train_dataloader()))[1] for data in (first, second)]
    assert not torch.equal(*labels)


def test_images_hold_what_sequences_hold() -> None:
    sequences, images = DigitsData(), DigitImages()
    for data in (sequences, images):
        data.setup("fit")
    assert torch.equal(sequences.test_set.tensors[0], images.test_set.tensors[0].squeeze(1))


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("val_fraction", 0.0, ValueError, "val_fraction=0.0: expected a share of the whole data in 0.01 .. 0.5"),
        ("test_fraction", 0.7, ValueError, "test_fraction=0.7"),
        ("batch_size", 0, ValueError, "batch_size=0: expected an integer of at least 1"),
        ("batch_size", 2.5, TypeError, "batch_size=2.5: expected an integer"),
        ("num_workers", -1, ValueError, "num_workers=-1: expected an integer of at least 0"),
        ("seed", True, TypeError, "seed=True"),
    ],
)
def test_errors_name_the_argument(argument: str, value: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DigitsData(**{argument: value})  # type: ignore[arg-type]
