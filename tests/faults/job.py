"""One tiny cross-validation in a process of its own, into which a fault may strike.

``python -m tests.faults.job OUTPUT CACHE [PHASE CALL FAULT]``: just before call number CALL of the
phase's function FAULT happens: ``fill:PATH`` fills the file system of PATH, ``remove:PATH`` takes a
data file away. Signals come from outside, at moments that the marks on stdout let the sender
choose: a line ``mark enter PHASE SECONDS`` and, unless an exception ends it, ``mark leave PHASE
SECONDS`` for each call, and ``mark unit - SECONDS`` at the end of each step or case, all by the
monotonic clock.
"""

import errno
import functools
import os
import shutil
import sys
import time
from pathlib import Path

from cmsad_jax.modules import EncoderConfig, FusionConfig, NetworkConfig
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.serving import loading
from experiments.process.console import run_main
from experiments.settings.command_line import complete
from experiments.settings.config import Config, PredictConfig, TrainConfig
from experiments.studies import cross_validation
from experiments.training import checkpoints, fold, loop

PHASES = {
    "building": (loading, "open_source"),
    "training": (cross_validation, "train_folds"),
    "validating": (loop, "reference_dice"),
    "saving": (checkpoints.Checkpoints, "_write"),
    "predicting": (cross_validation, "predict_and_measure"),
    "reporting": (cross_validation, "finish"),
}
"""The function whose calls are each phase, in the order in which a run reaches them.

Saving happens in a thread while training goes on; all phases but the first and the last come once
in each fold or more often.
"""


def tiny(output: Path, cache: Path, **changes) -> Config:
    """Two folds of a few steps of a network of a few channels."""
    encoder = EncoderConfig(
        channels=(2, 3),
        kernels=((1, 3, 3), (1, 3, 3)),
        strides=((1, 1, 1), (1, 2, 2)),
        blocks=(1, 1),
    )
    return complete(
        Config(
            accelerator="cpu",
            compilation_cache=False,  # the harness keeps its own
            output=output,
            num_folds=2,
            data=DataConfig(
                phantom=PhantomOptions(num_cases=8),
                target="gland",
                cache=cache,
                preprocess=PreprocessConfig(spacing_mm=(6, 4, 4), size=(6, 24, 24)),
            ),
            network=NetworkConfig(encoder=encoder, fusion=FusionConfig(hidden=2)),
            train=TrainConfig(
                **{"steps": 12, "crop": (4, 16, 16), "checkpoint_every": 3, **changes}
            ),
            predict=PredictConfig(figures=1, threshold=0.05),
        )
    )


def mark(what: str, phase: str) -> None:
    """A line on stdout, in one piece whichever thread writes it."""
    os.write(1, f"mark {what} {phase} {time.monotonic():.6f}\n".encode())


def mark_phases(struck: str, call: int, fault: str) -> None:
    """Mark every call of every phase; ``fault`` comes at one of them."""

    def wrap(phase: str) -> None:
        owner, name = PHASES[phase]
        original = getattr(owner, name)
        calls = 0

        @functools.wraps(original)
        def marked(*args, **kwargs):
            nonlocal calls
            calls += 1
            mark("enter", phase)
            if (phase, calls) == (struck, call):
                happen(fault)
            result = original(*args, **kwargs)
            mark("leave", phase)
            return result

        setattr(owner, name, marked)

    for phase in PHASES:
        wrap(phase)


def mark_units() -> None:
    """Mark the end of each unit of work that a SIGTERM lets finish: a step or a case."""
    for owner, name in (
        (fold.Progress, "time"),
        (loop, "predict_case"),
        (cross_validation, "predict_case"),
    ):
        original = getattr(owner, name)

        @functools.wraps(original)
        def marked(*args, original=original, **kwargs):
            result = original(*args, **kwargs)
            mark("unit", "-")
            return result

        setattr(owner, name, marked)


def happen(fault: str) -> None:
    """Do it, now."""
    kind, path = fault.split(":", 1)
    {"fill": fill, "remove": remove}[kind](Path(path))


def remove(path: Path) -> None:
    """Take the content of a file away under its readers, as a file system does that is lost."""
    shutil.copyfile(path, path.with_name(f"{path.name}.away"))
    os.truncate(path, 0)


def fill(path: Path) -> None:
    """Write to ``path`` until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def main() -> None:
    """Command line."""
    output, cache, *fault = sys.argv[1:]
    phase, call, what = fault or ("", "0", "")
    mark_phases(phase, int(call), what)
    mark_units()
    cross_validation.run(tiny(Path(output), Path(cache)))


if __name__ == "__main__":
    run_main(main)
