"""What a prediction leaves: images in the frame of the T2W file, and a record of what was found.

No other file knows the names in that folder.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cmsad_jax import __version__, export
from cmsad_jax.inference import EnsemblePrediction, entropy
from cmsad_jax.types import ConfigError
from data_pipelines.case import Case
from data_pipelines.faults import DataError
from data_pipelines.files import naming_path
from data_pipelines.preparing import preprocessing
from data_pipelines.targets import TARGET_CLASSES, Target, target_of
from experiments.measuring import lesions
from experiments.measuring.lesions import Candidate
from experiments.measuring.metrics import to_mask
from experiments.measuring.operating_point import OperatingPoint
from experiments.measuring.training_data import TrainingData, from_provenance
from experiments.process.records import INLINE, RecordError, decode, read_record, write_record
from experiments.process.storage import file_sha256, locked, remove_temporary_files

RECORD = "predictions.json"
SEGMENTATIONS, DICOM_SEG = "segmentations", "dicom_seg"
KINDS = (
    *("masks", "probabilities", "entropy", "disagreement", "drawn", "attention"),
    *(SEGMENTATIONS, DICOM_SEG),
)
"""Folders of images beside the record."""

SCHEMA = 2
"""Version of the record of predictions.

1: written without a number, candidates are connected components of the masks, of every class; 2:
candidates are those of ``experiments.measuring.lesions``, and each class has its volume.
"""

DISCLAIMER = "Research software, not a medical device: not for diagnosis or treatment."


def target_of_model(description: export.Description) -> Target:
    """Classes of a model, and the parts that make them.

    Raises:
        ConfigError: its outputs are not those of its target.
    """
    labels = description.labels
    if not labels and description.target not in TARGET_CLASSES:
        labels = tuple(f"{name}={i}" for i, name in enumerate(description.classes, start=1))
    try:
        target = target_of(description.target, labels, description.lesions)
    except DataError as error:
        raise ConfigError(f"the target of the model cannot be: {error}") from None
    if len(target.part_names) != len(description.classes):
        raise ConfigError(
            f"a model must give what its target has; got {', '.join(description.classes)} and "
            f"{', '.join(target.part_names)}. Export the run again."
        )
    return target


@dataclasses.dataclass(frozen=True)
class PredictedCase:
    """What is said of a case.

    Attributes:
        case_id: of the case.
        error: why it could not be predicted; then nothing else is said.
        modalities, missing_modalities: those that it has, and those that it lacks.
        volume_ml: of the mask, class by class.
        highest_probability: of each class.
        candidates: of lesions, the most confident first; None for other targets.
        lesion_probability: that the case holds a lesion; None where the model has no operating
            point.
        called: whether a candidate of it is called, by that point.
        modality_weights: how much each counts, of a model that weighs them; their sum is 1.
        warnings: what is worth a look, if there is something.
        files: sha256 of each image, by its path in the folder; None in records of before.
    """

    case_id: str
    error: str | None = None
    modalities: tuple[str, ...] | None = None
    missing_modalities: tuple[str, ...] | None = None
    volume_ml: Mapping[str, float] | None = None
    highest_probability: Mapping[str, float] | None = None
    candidates: tuple[Candidate, ...] | None = None
    lesion_probability: float | None = None
    called: bool | None = None
    modality_weights: Mapping[str, float] | None = None
    warnings: tuple[str, ...] | None = None
    files: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """Whose predictions they are.

    Attributes:
        sha256: of the model.
        members: sets of weights that are averaged.
        git_commit: of the code that it was trained with.
        data_fingerprint: of the data set that it was trained on.
        license: of the weights.
        training_data: what that data set is.
        models: each of them, where the mean of several is taken.
    """

    sha256: str
    members: tuple[str, ...]
    git_commit: str | None
    data_fingerprint: str | None
    license: str
    training_data: TrainingData | None = None
    models: "tuple[ModelFacts, ...] | None" = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is applied; the command line may change each."""

    threshold: float
    overlap: float
    flip: bool
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Extras:
    """What is written beside masks and probabilities."""

    attention: bool = False
    uncertainty: bool = False


@dataclasses.dataclass(frozen=True)
class Facts:
    """The model, its settings, and what is written beside masks."""

    model: ModelFacts
    settings: Settings
    extras: Extras = Extras()

    @property
    def trained_on(self) -> list[TrainingData | None]:
        """What the model, or each of several, was trained on; equal ones once."""
        found: list[TrainingData | None] = []
        for model in self.model.models or (self.model,):
            if model.training_data not in found:
                found.append(model.training_data)
        return found


@dataclasses.dataclass(frozen=True)
class Predictions:
    """``predictions.json``.

    Attributes:
        facts: whose predictions they are.
        cases: by their ids.
        inputs: sha256 of the images of each case of which there is, or was, a result.
        complete: whether the command that wrote it came to its end.
        wall_s: time that it took.
        compute_s: time in which the model ran.
        processor_s: processor time of all threads.
        processor_beside_s: that of reading and writing, in their own threads.
        disclaimer, cmsad_jax, coordinates: for whoever reads the file.
    """

    facts: Facts = dataclasses.field(metadata=INLINE)
    cases: tuple[PredictedCase, ...]
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    complete: bool = True
    wall_s: float = 0.0
    compute_s: float = 0.0
    processor_s: float = 0.0
    processor_beside_s: float = 0.0
    disclaimer: str = DISCLAIMER
    cmsad_jax: str = __version__
    coordinates: str = "centre_mm is x y z in RAS+ millimetres (NIfTI's world)"


def _without_candidates(content: dict[str, object]) -> dict[str, object]:
    """Schema 1 to 2: its candidates were something else, so that all cases are to do again."""
    cases = content["cases"]
    assert isinstance(cases, list), "a record lists its cases"
    kept = [{key: v for key, v in case.items() if key != "candidates"} for case in cases]
    return {**content, "cases": kept, "complete": True}


def operating_point(description: export.Description) -> OperatingPoint | None:
    """That of a model; None where it has none.

    Raises:
        ConfigError: what the model has is none.
    """
    if not description.operating_point:
        return None
    try:
        return decode(OperatingPoint, description.operating_point, "operating_point")
    except RecordError as error:
        raise ConfigError(
            f"the operating point of a model must be as it was exported; {error}. "
            "Export the run again."
        ) from error


def training_data_of(description: export.Description) -> TrainingData | None:
    """What a model was trained on; None where it does not say.

    Raises:
        ConfigError: it says it in a way that this version does not know.
    """
    try:
        return from_provenance(description.provenance)
    except RecordError as error:
        raise ConfigError(
            f"a model must say what it was trained on as this version does; got: {error}. "
            "Export the run again."
        ) from error


def judged(
    case: PredictedCase, candidates: Sequence[Candidate], point: OperatingPoint | None
) -> PredictedCase:
    """A case with its lesion candidates, and what an operating point says of them."""
    if point is None:
        return dataclasses.replace(case, candidates=tuple(candidates))
    found = tuple(point.judge(candidate) for candidate in candidates)
    strongest = max((candidate.confidence for candidate in found), default=0.0)
    return dataclasses.replace(
        case,
        candidates=found,
        lesion_probability=round(point.cases(strongest), 6),
        called=any(candidate.called for candidate in found),
    )


def model_facts(description: export.Description, sha256: str) -> ModelFacts:
    """What is said of one model."""
    return ModelFacts(
        sha256=sha256,
        members=tuple(description.members),
        git_commit=description.provenance.get("environment", {}).get("git_commit"),
        data_fingerprint=description.provenance.get("data_fingerprint"),
        license=description.license,
        training_data=training_data_of(description),
    )


@dataclasses.dataclass(frozen=True)
class Computed:
    """What the model says of a case, on the reference grid."""

    case: Case
    prediction: EnsemblePrediction
    attention: np.ndarray | None
    modality_weights: np.ndarray | None = None
    """Of each modality, of a model that weighs them."""
    drawn: np.ndarray | None = None
    """Standard deviation over draws of attention across slices, of a model that has them drawn."""
    remarks: tuple[str, ...] = ()
    """What makes it doubtful, in words."""


@dataclasses.dataclass(frozen=True)
class PredictionFolder:
    """The folder that predictions are written to."""

    path: Path

    @property
    def record(self) -> Path:
        """Whose predictions they are, and what was found."""
        return self.path / RECORD

    def image(self, kind: str, case_id: str, suffix: str = "") -> Path:
        """A volume of a case: its mask, a probability and the like."""
        return self.path / kind / f"{case_id}{suffix}.nii.gz"

    def mask(self, case_id: str) -> Path:
        """The mask of a case."""
        return self.image("masks", case_id)

    def probability(self, case_id: str, classes: Sequence[str]) -> list[Path]:
        """Probabilities of a case, of each class."""
        suffixes = [""] if len(classes) == 1 else [f"_{name}" for name in classes]
        return [self.image("probabilities", case_id, suffix) for suffix in suffixes]

    def segmentation(self, case_id: str) -> Path:
        """The mask of a case for 3D Slicer."""
        return self.path / SEGMENTATIONS / f"{case_id}.seg.nrrd"

    def dicom_seg(self, case_id: str) -> Path:
        """The mask of a case as DICOM."""
        return self.path / DICOM_SEG / f"{case_id}.dcm"

    @property
    def labels(self) -> Path:
        """Names and colours of the classes for ITK-SNAP."""
        return self.path / "labels.txt"

    @property
    def cases_table(self) -> Path:
        """One line for each case, CSV."""
        return self.path / "cases.csv"

    @property
    def candidates_table(self) -> Path:
        """One line for each lesion candidate, CSV."""
        return self.path / "candidates.csv"

    @property
    def page(self) -> Path:
        """The cases as a page."""
        return self.path / "predictions.html"

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, hold it for this process, and remove what a killed one left unfinished.

        Raises:
            ConfigError: another process holds it.
        """
        with naming_path(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            remove_temporary_files(self.path, deep=False)
            for kind in KINDS:
                remove_temporary_files(self.path / kind)
            yield

    def is_intact(self, case: PredictedCase) -> bool:
        """Whether the images of a case are there, and are those that were written.

        A record of before, which does not list them, is not known to be of these images.
        """
        if case.error is not None or not case.files:
            return False
        try:
            return all(file_sha256(self.path / name) == sum_ for name, sum_ in case.files.items())
        except OSError:
            return False

    def holds(self, case: PredictedCase) -> bool:
        """Whether the images of a case may be believed to be there; records of before list none."""
        return self.is_intact(case) if case.files else self.mask(case.case_id).is_file()

    def write(self, predictions: Predictions) -> None:
        """Write the record, whole or not at all."""
        write_record(self.record, predictions, schema=SCHEMA)

    def read(self) -> Predictions:
        """The record; one of schema 1 without its candidates.

        Raises:
            DataError: it is not as this version writes it.
        """
        migrations = {1: _without_candidates}
        return read_record(Predictions, self.record, schema=SCHEMA, migrations=migrations)

    def earlier(self, facts: Facts) -> Predictions:
        """What the folder says of its predictions, if it holds any.

        Raises:
            ConfigError: they are of another model or other settings.
        """
        if not self.record.is_file():
            return Predictions(facts, ())
        old = self.read()
        before, now = old.facts.model.sha256[:12], facts.model.sha256[:12]
        if before != now or old.facts.settings != facts.settings:
            raise ConfigError(
                "a folder holds the results of one model and its settings; "
                f"{self.path} holds those of {before} with {old.facts.settings}, and this is "
                f"{now} with {facts.settings}. Name another folder with --output."
            )
        return old

    def write_case(
        self, computed: Computed, description: export.Description, *, uncertainty: bool
    ) -> PredictedCase:
        """Write the images of a case into the frame of its T2W file; returns what is said of it.

        One volume at a time is brought there, so that memory stays near one probability map.
        """
        from data_pipelines.reading import volume_io  # slow to load, and not needed for --help

        case, affine, classes = computed.case, computed.case.original_affine, description.classes

        def original(values: np.ndarray) -> np.ndarray:
            return preprocessing.to_original(values, case)

        files: dict[str, str] = {}

        def write(kind: str, values: np.ndarray, suffix: str = "") -> None:
            path = self.image(kind, case.case_id, suffix)
            with naming_path(path):
                volume_io.write_nifti(path, values, affine)
                files[str(path.relative_to(self.path))] = file_sha256(path)

        if computed.attention is not None:
            for index, name in enumerate(description.modalities):
                if case.present[index]:
                    write("attention", original(computed.attention[..., index]), f"_{name}")
        if uncertainty:
            write("disagreement", original(computed.prediction.disagreement.max(-1)))
            if computed.drawn is not None:
                write("drawn", original(computed.drawn))
        probability = original(computed.prediction.probability)
        if uncertainty:
            write("entropy", entropy(probability))
        target = target_of_model(description)
        mask = to_mask(probability, description.threshold)
        foreground = probability if len(classes) == 1 else probability[..., 1:]
        for index, name in enumerate(classes):
            write("probabilities", foreground[..., index], f"_{name}" if len(classes) > 1 else "")
        write("masks", target.to_file(mask))  # last: a mask is there only if all else is
        has = dict(zip(description.modalities, case.present, strict=True))
        voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
        found = PredictedCase(case.case_id)
        if target.lesion is not None:
            of_lesions = target.probability_of(probability, target.classes.index(target.lesion))
            candidates = lesions.candidates(of_lesions, affine)
            found = judged(found, candidates, operating_point(description))
        return dataclasses.replace(
            found,
            modalities=tuple(name for name, there in has.items() if there),
            missing_modalities=tuple(name for name, there in has.items() if not there),
            volume_ml={
                name: round(float(target.mask_of(mask, index).sum() * voxel_ml), 4)
                for index, name in enumerate(target.classes)
            },
            highest_probability={
                name: round(float(target.probability_of(probability, index).max()), 6)
                for index, name in enumerate(target.classes)
            },
            modality_weights=_weights_by_name(computed, description.modalities),
            files=files,
        )


def _weights_by_name(computed: Computed, modalities: Sequence[str]) -> Mapping[str, float] | None:
    """Of a model that weighs modalities, the weight of each."""
    if computed.modality_weights is None:
        return None
    pairs = zip(modalities, computed.modality_weights, strict=True)
    return {name: round(float(weight), 6) for name, weight in pairs}
