"""Ways to damage a checkpoint, and whether its reader notices."""

import contextlib
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cmsad_jax.training import TrainState
from experiments.training.checkpoints import CorruptCheckpointError


def truncate(path: Path, rng: random.Random) -> None:
    """Cut a file short."""
    file = _file(path, rng)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit of one file."""
    file = _file(path, rng)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def delete(path: Path, rng: random.Random) -> None:
    """Remove one file."""
    _file(path, rng).unlink()


def empty(path: Path, rng: random.Random) -> None:
    """Leave nothing but the folder."""
    shutil.rmtree(path)
    path.mkdir()


def add(path: Path, rng: random.Random) -> None:
    """Put a copy of one file beside it."""
    file = _file(path, rng)
    shutil.copyfile(file, file.with_name(file.name + "_copy"))


DAMAGES = (truncate, flip, delete, empty, add)


def _file(path: Path, rng: random.Random) -> Path:
    """Any file that is not empty, by chance."""
    return rng.choice([p for p in sorted(path.rglob("*")) if p.is_file() and p.stat().st_size])


def filled(like: TrainState, value: float) -> TrainState:
    """A state of one value."""
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), like)


def survives(
    folder: Path,
    save: Callable[[Path], Callable[[], tuple[TrainState, dict] | None]],
    states: list[TrainState],
    seed: int,
) -> str:
    """Damage the newest checkpoint, in every fourth try all; empty if the reader is right.

    Args:
        folder: to work in.
        save: saves ``states`` as steps 1 and 2 into a folder and returns a reader.
        states: two.
        seed: which damage.
    """
    rng = random.Random(seed)
    resume = save(folder)
    damage, everything = DAMAGES[seed % len(DAMAGES)], seed % 4 == 3
    for step in (1, 2) if everything else (2,):
        damage(folder / "last" / f"{step:08d}", rng)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            resumed = resume()
    except CorruptCheckpointError as error:
        right = everything and str(folder) in str(error)
        return "" if right else f"{damage.__name__}: {error}"
    if everything or resumed is None or resumed[1]["step"] != 1:
        return f"{damage.__name__}: resumed from {resumed and resumed[1]['step']}"
    if f"{2:08d}" not in said.getvalue():
        return f"{damage.__name__}: passed over in silence"
    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), resumed[0], states[0])
    return "" if all(jax.tree.leaves(same)) else f"{damage.__name__}: other weights"
