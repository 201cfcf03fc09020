"""One of two ranks: `python -m tests.metrics.two_processes FOLDER RANK` updates all metrics and saves what they say.

Rank r sees every second batch, or all of them where updates are a history that all ranks share.
"""

import sys
from pathlib import Path

import torch
from torch import distributed

from lightning_qat import metrics
from tests.metrics.cases import CASES
from tests.processes import leave


def main(folder: Path, rank: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {}
    for case in CASES:
        metric = getattr(metrics, case.name)(**dict(case.arguments))
        for args, kwargs in case.updates if case.history else case.updates[rank::2]:
            metric.update(*args, **kwargs)
        results[case.name] = metric.compute()
        local = {name: getattr(metric, name) for name in metric.metric_state}
        results[f"{case.name} unsynced"] = [str(value) for value in local.values()]
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    leave()
