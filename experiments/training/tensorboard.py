"""Training curves as TensorBoard files, beside ``history.csv``: ``tensorboard --logdir RUN``."""

import csv
import shutil
from pathlib import Path

from tensorboardX import SummaryWriter


def write_events(history: Path, folder: Path) -> None:
    """Write every curve of a ``history.csv`` as a scalar of its name; replaces ``folder``.

    Empty cells are left out, so a curve has a point only where something was measured.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with history.open(encoding="utf-8", newline="") as file, SummaryWriter(str(folder)) as writer:
        for row in csv.DictReader(file):
            step = int(float(row.pop("step")))
            for name, value in row.items():
                if value:
                    writer.add_scalar(name, float(value), step)
