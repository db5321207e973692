"""Weights learnt elsewhere, from which the folds of a run start: ``--init``."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmsad_jax import export
from cmsad_jax.named_weights import flatten_weights, unflatten_weights
from cmsad_jax.training import TrainState
from cmsad_jax.types import ConfigError
from data_pipelines.config import DataConfig
from data_pipelines.files import expanded
from experiments.run_folder import RunFolder, fold_name, fold_words, training_cases
from experiments.settings.config import ALL, Config
from experiments.training.checkpoints import load_params

NAMED = 4
"""Arrays, or cases, that a message names."""


class Given(NamedTuple):
    """Weights to start from.

    Attributes:
        weights: arrays by their path in the network.
        whose: which they are, in words.
    """

    weights: dict[str, np.ndarray]
    whose: str


def given_weights(path: Path, config: Config, fold: int, validation: Collection[str] = ()) -> Given:
    """Those that ``fold`` starts from: of the fold of that number there, else of the first.

    Args:
        path: run folder, or artifact.
        config: of the run that starts.
        fold: its number.
        validation: cases that it validates.

    Raises:
        ConfigError: neither a run nor an artifact; or they were learnt from cases of the same data
            set that the fold validates.
    """
    if path.is_dir():
        folder = RunFolder(path)
        stored = folder.read_config()
        there = [n for n in (fold, *range(stored.num_folds), ALL) if folder.is_done(n)]
        number, *_ = there or folder.members(stored, None)
        whose = f"{fold_words(number)} of {path}"
        if seen := _seen(folder, number, validation):
            if _place(stored.data) == _place(config.data):
                raise ConfigError(
                    "a fold must not validate cases that its weights were learnt from; "
                    f"{fold_words(fold)} starts from {whose}, which was trained on "
                    f"{_named(seen)}. Take the folds of that run (--folds-file={folder.folds}), or "
                    "--init of other data."
                )
            whose += (
                f" (trained on {_named(seen)}, names that this fold validates: see that they are "
                "other patients)"
            )
        return Given(_arrays(flatten_weights(load_params(path, number))), whose)
    if path.is_file():
        model = export.load(path)
        names = model.description.members
        name = fold_name(fold) if fold_name(fold) in names else names[0]
        chosen = model.weights[names.index(name)]
        return Given(
            _arrays(chosen),
            f"{name.replace('_', ' ')} of {path}, model {model.sha256[:12]}",
        )
    raise ConfigError(
        f"weights to start from must be a run folder or an artifact; got nothing at {path}. "
        "Check --init."
    )


def _arrays(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in weights.items()}


def _seen(folder: RunFolder, number: int, validation: Collection[str]) -> list[str]:
    """Which validated cases have names of those that fold ``number`` there was trained on."""
    if not folder.folds.is_file():
        return []
    return sorted({*training_cases(folder.read_folds(), number)} & {*validation})


def _place(data: DataConfig) -> tuple[str, Path | None]:
    """Of which data set, however its path is written."""
    return data.name, None if data.path is None else expanded(data.path, "--data.path").resolve()


def start_from(state: TrainState, given: Given) -> tuple[TrainState, str]:
    """``state`` with every weight that is given in its name and shape; what fits, in words.

    Raises:
        ConfigError: nothing fits.
    """
    own = flatten_weights(state.params)
    fits = {
        name: jnp.asarray(given.weights[name], value.dtype)
        for name, value in own.items()
        if name in given.weights and given.weights[name].shape == value.shape
    }
    if not fits:
        raise ConfigError(
            "at least one array of the weights to start from must fit in name and shape; got "
            f"{_named(sorted(given.weights))} of {given.whose} for {_named(sorted(own))}. Use "
            "the network and the modalities of that run, or leave out --init."
        )
    words = f"starts from {given.whose}: {len(fits)} of {len(own)} arrays"
    if fresh := [_what(name, own[name], given) for name in own if name not in fits]:
        words += f"; drawn anew: {_named(fresh)}"
    if unused := sorted(given.weights.keys() - own.keys()):
        words += f"; not used of it: {_named(unused)}"
    params: Any = unflatten_weights({**own, **fits})
    copy = jax.tree.map(jnp.copy, params)  # the step gives up the memory of both
    return TrainState(state.step, params, copy, state.opt_state), words


def _what(name: str, own: Any, given: Given) -> str:
    """An array that does not fit, with both shapes where only these differ."""
    if name not in given.weights:
        return name
    return f"{name} ({_times(own.shape)}, given {_times(given.weights[name].shape)})"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
