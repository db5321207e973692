"""The models of a prediction: one, or several whose probabilities are averaged."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from cmsad_jax import export
from cmsad_jax.inference import EnsemblePrediction
from cmsad_jax.types import ConfigError
from data_pipelines.case import STORED_UNIT, Case, RawCase, Volume
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError
from data_pipelines.targets import target_of
from experiments.prediction.outputs import Extras, Facts, Settings, model_facts
from experiments.process.records import RecordError, decode, encode
from experiments.settings.stored import from_json


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
        return next((data for data in self.data if data.preprocess.centre == "gland"), self.data[0])

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
