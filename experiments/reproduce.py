"""Repeat the step at which training stopped because nothing was finite any more.

``python -m experiments.reproduce RUN/fold_0/not_finite_00000120.npz`` makes that one step again,
from the batch, keys and state in the file, and says which terms and which weights are not finite.
Its status is 0 if the step fails again, else 1.
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from cmsad_jax.training import TrainState
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.short_help import program
from experiments.process.console import run_main
from experiments.process.records import from_content
from experiments.run_folder import SCHEMA
from experiments.settings.config import Config
from experiments.settings.stored import from_json
from experiments.training.fold import state_arrays
from experiments.training.programs import compile_programs


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a file says of its step beside the arrays; ``config`` is JSON, the rest as below."""

    config: Mapping[str, object]
    fold: int
    step: int
    case_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Recording:
    """One step, as ``experiments.training.fold`` kept it.

    Attributes:
        config: of its run.
        fold: from 0.
        step: from 1.
        case_ids: of its batch.
        batch: what the step was given, with the keys of its random draws.
        arrays: the state before it, by the paths of its leaves.
    """

    config: Config
    fold: int
    step: int
    case_ids: tuple[str, ...]
    batch: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]

    def state(self, like: TrainState) -> TrainState:
        """The state before the step, with the structure of ``like``."""
        expected = state_arrays(like)
        shapes = {name: value.shape for name, value in self.arrays.items()}
        if shapes != {name: value.shape for name, value in expected.items()}:
            raise DataError(
                "the weights of a recorded step must be those of its network; "
                f"got {len(shapes)} arrays and {len(expected)}, or other shapes. "
                "Use the version of cmsad-jax that wrote the file."
            )
        leaves = [self.arrays[name] for name in expected]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read(path: Path) -> Recording:
    """Read a recorded step; nothing in the file is executed.

    Raises:
        MissingDataError: there is no such file.
        DataError: it is not a whole one of this project, or of a later version.
    """
    if not path.is_file():
        raise MissingDataError(f"no file at {path}. Name one that a stopped run printed.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        content = json.loads(str(arrays.pop("facts")))
        facts = from_content(Facts, content, path, schema=SCHEMA)
        config = from_json(Config, facts.config)
    except DataError:
        raise
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"a recorded step is a whole file of a stopped run; {path}: {error}. Use another one."
        ) from error
    return Recording(
        config=config,
        fold=facts.fold,
        step=facts.step,
        case_ids=facts.case_ids,
        batch=_under("batch/", arrays),
        arrays=_under("state/", arrays),
    )


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def repeat(recording: Recording) -> dict[str, float]:
    """Make the step again on one device; returns its metrics."""
    programs = compile_programs(recording.config, jax.devices()[:1])
    state = recording.state(programs.init(jax.random.key(0)))
    place = programs.step
    _, metrics = place.step(place.place_state(state), place.place_batch(recording.batch))
    return {name: float(value) for name, value in metrics.items()}


def describe(recording: Recording, metrics: dict[str, float]) -> str:
    """What is finite in the step and what is not, as text."""
    inputs = {
        "images": [recording.batch["image"]],
        "weights": [v for name, v in recording.arrays.items() if name.startswith(".params")],
        "optimiser": [v for name, v in recording.arrays.items() if name.startswith(".opt_state")],
    }
    lines = [f"fold {recording.fold}, step {recording.step}: {', '.join(recording.case_ids)}"]
    for name, values in inputs.items():
        num_bad = sum(int(np.size(value) - np.isfinite(value).sum()) for value in values)
        largest = max((float(np.abs(value).max()) for value in values if value.size), default=0.0)
        lines.append(f"{name:<32}{num_bad} values not finite, largest {largest:.4g}")
    lines += [f"{name:<32}{value:.6g}" for name, value in metrics.items() if name != "skipped"]
    lines.append("reproduced" if metrics["skipped"] else "finite this time: not reproduced")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ReproduceConfig:
    """Repeat a step whose loss or gradient was not finite."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file that a stopped run names."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    config = tyro.cli(ReproduceConfig, prog=program("experiments.reproduce"), args=argv)
    recording = read(config.file)
    metrics = repeat(recording)
    print(describe(recording, metrics))
    if not metrics["skipped"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
