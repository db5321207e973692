"""Models of run folders and of exported files, as a command line asks for them."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from cmsad_jax import export
from cmsad_jax.types import ConfigError
from experiments.exporting.artifact import write_artifact
from experiments.prediction.models import Models, data_config
from experiments.prediction.outputs import operating_point
from experiments.run_folder import fold_name
from experiments.settings.config import FoldsAsked, folds_asked

_MEANING = ("target", "classes", "labels", "lesions", "modalities")
"""Fields of a description in which models that are averaged must agree."""


Setting: TypeAlias = bool | float | str


def open_models(
    paths: Path | Sequence[Path], folds: FoldsAsked, settings: Mapping[str, Setting | None]
) -> Models:
    """Models of run folders or artifacts.

    Args:
        paths: of each; or the path of the only one.
        folds: those that are averaged; None is all that a model has.
        settings: each field of ``Settings``; None where the models' own holds.

    Raises:
        ConfigError: neither a run nor an artifact, settings that cannot work, or models that cannot
            be averaged.
    """
    paths = [paths] if isinstance(paths, Path) else [*paths]
    if not paths:
        raise ConfigError(
            "a model must be given; got none. Name a run or an artifact: --model RUN."
        )
    opened = tuple(_open(path, folds) for path in paths)
    _refuse_unlike(paths, opened)
    each = tuple(
        _with_settings(path, model, settings) for path, model in zip(paths, opened, strict=True)
    )
    for name in settings:
        values = {getattr(model.description, name) for model in each}
        if len(values) > 1:
            listed = ", ".join(map(str, sorted(values)))
            option = name.replace("_", "-")
            raise ConfigError(
                f"models that are averaged are applied with one {name}; got {listed}. "
                f"Give --{option}, for example --{option}={min(values)}."
            )
    return Models(each, tuple(data_config(model.description) for model in each))


def _open(path: Path, folds: FoldsAsked) -> export.Model:
    """The model of a run folder, which is exported in memory, or of an artifact."""
    if path.is_dir():
        archive = io.BytesIO()
        write_artifact(path, archive, folds=folds)
        archive.seek(0)
        return export.load(archive)
    if not path.is_file():
        raise ConfigError(
            f"the model must be a run folder or an artifact; got nothing at {path}. Check --model."
        )
    model = export.load(path)
    if folds is None:
        return model
    return model.select([fold_name(fold) for fold in folds_asked(folds, 0)])


def _refuse_unlike(paths: Sequence[Path], models: Sequence[export.Model]) -> None:
    """Raise ``ConfigError`` for models that cannot be averaged."""
    first = models[0].description
    for number, (path, model) in enumerate(zip(paths, models, strict=True)):
        if any(model.sha256 == other.sha256 for other in models[:number]):
            raise ConfigError(
                f"each model is averaged once; got that of {path} a second time. Name it once."
            )
        for name in _MEANING:
            mine, others = getattr(model.description, name), getattr(first, name)
            if mine != others:
                raise ConfigError(
                    f"models that are averaged must have the same {name}; got {_listed(others)} of "
                    f"{paths[0]} and {_listed(mine)} of {path}. Predict with each by itself."
                )


def _listed(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else ", ".join(value) or "none"


def _with_settings(
    path: Path, model: export.Model, settings: Mapping[str, Setting | None]
) -> export.Model:
    """A model as it is to be applied."""
    given = {name: value for name, value in settings.items() if value is not None}
    point = operating_point(model.description)
    if given.get("threshold") == "learnt":
        if point is None:
            raise ConfigError(
                "a threshold is learnt from two folds or more of a run that detects lesions; "
                f"{path} has none. Leave --threshold out, or give a number."
            )
        given["threshold"] = point.threshold
    if "threshold" in given and len(model.description.classes) > 1:
        raise ConfigError(
            f"a threshold goes with one class; got {settings['threshold']} for "
            f"{', '.join(model.description.classes)}, of which the most probable is taken. "
            "Leave --threshold out."
        )
    description = dataclasses.replace(model.description, **given)
    if not 0 < description.threshold < 1 or not 0 <= description.overlap < 1:
        raise ConfigError(
            "threshold must lie between 0 and 1, and overlap be 0 or more and below 1; got "
            f"{description.threshold} and {description.overlap}. Use --threshold=0.5 --overlap=0.5."
        )
    if description.batch_size < 1:
        raise ConfigError(
            f"batch size must be 1 or more; got {description.batch_size}. Use --batch-size=1."
        )
    return dataclasses.replace(model, description=description)
