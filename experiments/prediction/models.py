"""The models of a prediction: one, or several whose probabilities are averaged."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cmsad_jax import export
from cmsad_jax.inference import EnsemblePrediction
from cmsad_jax.types import ConfigError
from data_pipelines.case import STORED_UNIT, Case, RawCase, Volume
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError
from data_pipelines.targets import target_of
from experiments.prediction.cascade import as_background, beyond_margin, box_around
from experiments.prediction.outputs import Extras, Facts, Settings, model_facts
from experiments.process.records import RecordError, decode, encode
from experiments.settings.stored import from_json


class Prepared(NamedTuple):
    """A case on the grid of a model, and on that of the first network of its cascade."""

    case: Case
    first: Case | None = None


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

    @functools.cached_property
    def first_data(self) -> tuple[DataConfig | None, ...]:
        """How cases are prepared for the first network of each model's cascade, if it is in one."""
        firsts = [model.first for model in self.each]
        return tuple(None if first is None else data_config(first.description) for first in firsts)

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
        """Identity: that of the only model, or one made of all in their order."""
        digests = [model.sha256 for model in self.each]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @property
    def programs(self) -> set[str]:
        """What can be computed of a case; several models give probabilities alone."""
        return {*self.each[0].programs} if len(self.each) == 1 else {"predict"}

    @property
    def read_as(self) -> DataConfig:
        """How files are read: with a mask of the gland if any of the models needs one."""
        every = [*self.data, *filter(None, self.first_data)]
        return next((data for data in every if data.preprocess.centre == "gland"), every[0])

    def facts(self, extras: Extras) -> Facts:
        """What is recorded of the models, their settings, and what is written beside masks."""
        description = self.description
        each = tuple(model_facts(model.description, model.sha256) for model in self.each)
        whole = model_facts(description, self.sha256)
        return Facts(
            dataclasses.replace(whole, models=each if len(each) > 1 else None),
            Settings(
                threshold=description.threshold,
                overlap=description.overlap,
                flip=description.flip,
                batch_size=description.batch_size,
            ),
            extras,
        )

    def compile(self, program: str) -> None:
        """Compile a program of each model now rather than at the first image."""
        for model in self.each:
            model.compile(program)
            if program == "predict" and model.first is not None:
                model.first.compile(program)

    def prepare(self, raw: RawCase) -> tuple[Prepared, ...]:
        """A case on the grid of each model.

        Raises:
            DataError: what is wrong with it.
        """
        from data_pipelines.preparing import preprocessing  # slow to load, not for --help

        made: dict[DataConfig | None, Case | None] = {None: None}

        def on_grid(data: DataConfig | None) -> Case | None:
            if data is not None and data not in made:
                made[data] = preprocessing.preprocess_case(raw, data, require_label=False)
            return made[data]

        found = []
        for data, first_data in zip(self.data, self.first_data, strict=True):
            case = on_grid(data)
            assert case is not None, "every model has a grid"
            found.append(Prepared(case, on_grid(first_data)))
        return tuple(found)

    def in_boxes(self, prepared: Sequence[Prepared]) -> tuple[tuple[Case, ...], tuple[str, ...]]:
        """A case as each model is to see it, and what makes that doubtful.

        A model that is in a cascade sees the box around what its first network finds.

        Raises:
            DataError: a probability of a first network is not finite.
        """
        cases, remarks = [], []
        for model, (case, first) in zip(self.each, prepared, strict=True):
            if model.first is not None and first is not None:
                probability = run_program(model.first, first).probability
                self._refuse_not_finite(probability, [first])
                found = box_around(probability, first, case, model.description.box)
                remarks += [found.remark] if found.remark else []
                case = found.cut(case)
            cases.append(case)
        return tuple(cases), tuple(dict.fromkeys(remarks))

    def predict(self, cases: Sequence[Case]) -> EnsemblePrediction:
        """Probabilities of a case on the grid that the first model sees, and their spread.

        Args:
            cases: as ``in_boxes`` gives them.

        Raises:
            DataError: a probability is not finite.
        """
        prediction = self._mean(cases)
        self._refuse_not_finite(prediction.probability, cases)
        return prediction

    def _refuse_not_finite(self, probability: np.ndarray, cases: Sequence[Case]) -> None:
        if np.isfinite(probability).all():
            return
        largest = max(np.abs(case.image.astype(np.float32)).max() * STORED_UNIT for case in cases)
        raise DataError(
            "probabilities must be finite; got NaN or infinity from model "
            f"{self.sha256[:12]} for intensities of up to {largest:.3g} standard deviations. "
            "No mask is written. Use another model, or leave out the fold that gives them "
            "(--folds)."
        )

    def _mean(self, cases: Sequence[Case]) -> EnsemblePrediction:
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
    """What a program of one model says of a case that was prepared for it.

    Of a model in a cascade, what lies beyond the margin around what was found is background, and
    that is sure.
    """
    image = case.image.astype(np.float32) * np.float32(STORED_UNIT)
    said = model.predict(image, case.present, program=program)
    margin_mm = model.description.margin_mm
    if margin_mm is None or program not in ("predict", "drawn"):
        return said
    beyond = beyond_margin(case, margin_mm)
    spread = np.where(beyond[..., None], 0, said.disagreement)
    if program == "drawn":
        return EnsemblePrediction(np.where(beyond[..., None], 0, said.probability), spread)
    return EnsemblePrediction(as_background(said.probability, beyond), spread)


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
