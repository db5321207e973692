"""The models of a prediction: one, or several whose probabilities are averaged."""

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from cmsad_jax import export
from cmsad_jax.inference import EnsemblePrediction
from cmsad_jax.types import ConfigError
from data_pipelines.case import STORED_UNIT, Case, RawCase, Volume
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError
from data_pipelines.targets import target_of
from experiments.exporting.artifact import write_artifact
from experiments.prediction.outputs import Extras, Facts, facts_of, model_facts, operating_point
from experiments.process.records import RecordError, decode, encode
from experiments.run_folder import fold_name
from experiments.settings.config import FoldsAsked, folds_asked
from experiments.settings.stored import from_json

_MEANING = ("target", "classes", "labels", "lesions", "modalities")
"""Fields of a description in which models that are averaged must agree."""


@dataclasses.dataclass(frozen=True)
class Models:
    """One model or several that predict as one.

    Each sees a case as it was trained to, on a grid of its own. Probabilities are brought to the
    grid of the first, linearly, and averaged there: each model counts once, however many members
    it has.

    Attributes:
        each: the models, with the settings that they are applied with.
        data: how cases are prepared for each.
    """

    each: tuple[export.Model, ...]
    data: tuple[DataConfig, ...]

    @property
    def description(self) -> export.Description:
        """That of the only model, or what holds for several together."""
        first = self.each[0].description
        if len(self.each) == 1:
            return first
        return dataclasses.replace(
            first,
            members=tuple(
                f"model_{number}.{member}"
                for number, model in enumerate(self.each, 1)
                for member in model.description.members
            ),
            allow_missing=all(model.description.allow_missing for model in self.each),
            provenance={},
            metrics={},
            license="; ".join(sorted({model.description.license for model in self.each})),
            operating_point={},  # learnt for each by itself: its probabilities are not the mean's
        )

    @property
    def sha256(self) -> str:
        """Identity: that of the only model, or one made of all, in any order."""
        digests = sorted(model.sha256 for model in self.each)
        return (
            digests[0]
            if len(digests) == 1
            else hashlib.sha256(" ".join(digests).encode()).hexdigest()
        )

    @property
    def programs(self) -> set[str]:
        """What can be computed of a case; several models give probabilities alone."""
        return {*self.each[0].programs} if len(self.each) == 1 else {"predict"}

    @property
    def read_as(self) -> DataConfig:
        """How files are read: with a mask of the gland if any of the models needs one."""
        return next((data for data in self.data if data.preprocess.centre == "gland"), self.data[0])

    def facts(self, extras: Extras) -> Facts:
        """What is recorded of the models, their settings, and what is written beside masks."""
        each = [model_facts(model.description, model.sha256) for model in self.each]
        return facts_of(self.description, self.sha256, extras, each if len(each) > 1 else ())

    def compile(self, program: str) -> None:
        """Compile a program of each model now rather than at the first image."""
        for model in self.each:
            model.compile(program)

    def prepare(self, raw: RawCase) -> tuple[Case, ...]:
        """A case as each model is to see it.

        Raises:
            DataError: what is wrong with it.
        """
        from data_pipelines.preparing import preprocessing  # slow to load, not for --help

        made: dict[DataConfig, Case] = {}
        for data in self.data:
            if data not in made:
                made[data] = preprocessing.preprocess_case(raw, data, require_label=False)
        return tuple(made[data] for data in self.data)

    def predict(self, cases: Sequence[Case]) -> EnsemblePrediction:
        """Probabilities of a case on the grid that the first model sees, and their spread.

        Args:
            cases: as ``prepare`` gives them.
        """
        first = cases[0]
        if len(self.each) == 1:
            return run_program(self.each[0], first)
        weight, mean, squares = (np.zeros((), np.float32) for _ in range(3))
        for model, case in zip(self.each, cases, strict=True):
            found = run_program(model, case)
            inside, probability = _on_grid_of(first, case, found.probability)
            _, spread = _on_grid_of(first, case, found.disagreement)
            # Of all members, a model's together weighing 1: the variance within models and between.
            weight = weight + inside
            deviation = (probability - mean) * inside
            mean = mean + deviation / weight
            squares = squares + inside * spread**2 + deviation * (probability - mean)
        return EnsemblePrediction(
            np.asarray(mean, np.float32), np.sqrt(squares / weight).astype(np.float32)
        )


def run_program(model: export.Model, case: Case, program: str = "predict") -> EnsemblePrediction:
    """What a program of one model says of a case that was prepared for it."""
    image = case.image.astype(np.float32) * np.float32(STORED_UNIT)
    return model.predict(image, case.present, program=program)


def _on_grid_of(first: Case, case: Case, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a model sees the grid of ``first`` (``d h w 1``), and its values ``d h w k`` there."""
    from data_pipelines.preparing import geometry  # slow to load, and not needed for --help

    depth, height, width = first.image.shape[:3]
    sampled = [
        geometry.resample(
            Volume(values[..., k], case.affine), (depth, height, width), first.affine, order=1
        )
        for k in range(values.shape[-1])
    ]
    inside = sampled[0][1].astype(np.float32)[..., None]
    return inside, np.stack([channel for channel, _ in sampled], -1)


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
                    f"models that are averaged must have the same {name}; got {_few(others)} of "
                    f"{paths[0]} and {_few(mine)} of {path}. Predict with each by itself."
                )


def _few(value: str | tuple[str, ...]) -> str:
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


def data_config(description: export.Description) -> DataConfig:
    """How cases are to be preprocessed for a model.

    Raises:
        ConfigError: in a way that there is not, or for a target that this version does not know.
    """
    from data_pipelines.preparing.preprocessing import check_preprocess  # slow, not for --help

    try:
        grid = decode(PreprocessConfig, encode(description.preprocess), "preprocess")
        from_json(PreprocessConfig, dict(description.preprocess))  # knows every field
        data = DataConfig(
            target=description.target,
            labels=description.labels,
            lesions=description.lesions,
            modalities=description.modalities,
            allow_missing=description.allow_missing,
            preprocess=grid,
        )
        check_preprocess(data)
        target_of(data.target, data.labels, data.lesions)  # refuses a target that cannot be
        if data.modalities != tuple(description.modalities):
            raise DataError(
                f"modalities are called {', '.join(data.modalities)} here; got "
                f"{', '.join(description.modalities)}."
            )
    except (RecordError, DataError) as error:
        raise ConfigError(
            f"a model must say how its images are prepared; got: {error} Export the run again."
        ) from error
    return data
