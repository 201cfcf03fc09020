"""The archives that torch.export writes: whole, and with nothing in them that reading would unpickle."""

import importlib
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lightning_qat.export.errors import DamagedFileError

_RECORD: Final = re.compile(
    r"(\.data/)?\w+|data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/model_\w+_config\.json"
    r"|models/model\.json|data/sample_inputs/model\.pt|data/aotinductor/model/[^/]+"
)


def has_plain_archives() -> bool:
    """Return whether this torch writes tensors of programs as they are; before 2.8 it pickled them."""
    try:
        importlib.import_module("torch.export.pt2_archive")
    except ImportError:
        return False
    return True


def check_archive(path: Path) -> None:
    """Check the sums of all entries, and that none of them would be unpickled.

    Args:
        path: a package.

    Raises:
        DamagedFileError: a broken entry, or one that could run code when the program is read.
        zipfile.BadZipFile: no archive.
    """
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
        if broken is not None:
            raise DamagedFileError(f"{path}: the checksum of {broken} is wrong")
        foreign = next(_foreign(archive), None)
    if foreign is not None:
        raise DamagedFileError(f"{path}: {foreign} is no plain tensor; packages that unpickle anything are not read")


def _foreign(archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield entries that are neither text, raw tensors nor compiled files, and tensors that are said to be pickled."""
    for entry in archive.infolist():
        record = entry.filename.partition("/")[2]  # the first folder is named as the file was, once
        if not _RECORD.fullmatch(record) or (record.endswith(".pt") and entry.file_size > 0):
            yield record
        elif record.startswith(("data/weights/", "data/constants/")) and record.endswith("_config.json"):
            config = json.loads(archive.read(entry))["config"]
            yield from (f"{record}: {name}" for name, tensor in config.items() if tensor["use_pickle"])
