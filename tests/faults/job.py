"""One tiny cross-validation in a process of its own, into which a fault may strike.

``python -m tests.faults.job OUTPUT CACHE [PHASE FAULT CALL DELAY]``: DELAY seconds after call
number CALL of the phase's function the fault happens: ``SIGKILL``, ``SIGTERM``, or ``fill:PATH``,
which fills the file system of PATH and lets the run go on.
"""

import errno
import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax

from cmsad_jax.modules import EncoderConfig, FusionConfig, NetworkConfig
from data_pipelines import loading
from data_pipelines.case import DataConfig, PreprocessConfig
from experiments import checkpoints, cv, train
from experiments.config import Config, PredictConfig, TrainConfig, complete
from experiments.runtime import run_main

PHASES = {
    "starting": (loading, "build"),
    "training": (loading, "train_batches"),
    "validating": (train, "reference_dice"),
    "saving": (checkpoints.Checkpoints, "_write"),
    "predicting": (cv, "predict_and_measure"),
    "reporting": (cv, "finish"),
}
"""The function whose call begins each phase."""


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
            compilation_cache=None,  # the harness keeps its own
            output=output,
            num_folds=2,
            data=DataConfig(
                num_cases=8,
                target="gland",
                cache=cache,
                preprocess=PreprocessConfig(spacing_mm=(6, 4, 4), size=(6, 24, 24)),
            ),
            network=NetworkConfig(encoder=encoder, fusion=FusionConfig(hidden=2)),
            train=TrainConfig(
                **{"steps": 12, "crop": (4, 16, 16), "checkpoint_every": 3, **changes}
            ),
            predict=PredictConfig(figures=1, threshold=0.3),
        )
    )


def keep_compiled(cache: Path) -> None:
    """Let every start of the harness take what an earlier one compiled."""
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def strike(phase: str, fault: str, call: int, delay_s: float) -> None:
    """Arrange for ``fault`` at a call of the phase's function."""
    owner, name = PHASES[phase]
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            if delay_s and not fault.startswith("fill:"):
                threading.Timer(delay_s, happen, [fault]).start()
            else:
                happen(fault)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def happen(fault: str) -> None:
    """Do it, now."""
    if fault.startswith("fill:"):
        fill(Path(fault.removeprefix("fill:")))
    else:
        print(f"struck {time.monotonic()}", flush=True)
        os.kill(os.getpid(), signal.Signals[fault])


def note_units() -> None:
    """Print when each unit of work ends that a SIGTERM lets finish: a step or a case."""
    for owner, name in (
        (train.Progress, "time"),
        (train, "predict_case"),
        (cv, "predict_case"),
    ):
        original = getattr(owner, name)

        @functools.wraps(original)
        def noted(*args, original=original, **kwargs):
            result = original(*args, **kwargs)
            print(f"unit {time.monotonic()}", flush=True)
            return result

        setattr(owner, name, noted)


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
    keep_compiled(Path(cache) / "xla")
    if fault:
        phase, kind, call, delay_s = fault
        strike(phase, kind, int(call), float(delay_s))
        note_units()
    cv.run(tiny(Path(output), Path(cache)))


if __name__ == "__main__":
    run_main(main)
