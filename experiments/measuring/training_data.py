"""What a model was trained on, in figures that a prediction can be compared with.

The facts come from the data set of a run (``data_pipelines.case.CaseInfo``), stand in its folder
and in what is exported of it, and are compared with each case that is predicted. Of models that
were made before there were such facts nothing more is known than the name of their data set.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from data_pipelines.case import CaseInfo, ImageFacts
from data_pipelines.config import origin_of
from experiments.process import records
from experiments.process.records import RecordError

SCHEMA = 1
"""Version of these facts, in a run folder and in an artifact."""

FAR_SPACING = 1.5
"""A voxel side beyond the training data's by this factor is far from them."""

FAR_INTENSITY = 4.0
"""Likewise for the median of the intensities, which scanners scale as they like within limits."""

_AXES = ("slices", "rows", "columns")

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class ModalityData:
    """The images of one modality: how many, and between what their facts lie.

    Attributes:
        num_cases: that have this modality.
        spacing_mm: least and largest voxel side along slices, rows and columns.
        intensity: least and largest median of the voxels above 0 in the middle of an image.
    """

    num_cases: int
    spacing_mm: tuple[Range, Range, Range]
    intensity: Range


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The data of a run, all folds together.

    Attributes:
        name: of the data set.
        synthetic: whether its images are drawn rather than of patients; None if that is not known.
        num_cases, num_patients, num_positive: how many; None where it is not known.
        modalities: facts of the images of each; empty where they are not known.
    """

    name: str
    synthetic: bool | None
    num_cases: int | None = None
    num_patients: int | None = None
    num_positive: int | None = None
    modalities: Mapping[str, ModalityData] = dataclasses.field(default_factory=dict)


def gather(name: str, cases: Sequence[CaseInfo], modalities: Sequence[str]) -> TrainingData:
    """The facts of a data set from those of its cases."""
    known = any(case.images for case in cases)
    return TrainingData(
        name,
        origin_of(name).synthetic,
        len(cases),
        len({case.patient_id for case in cases}),
        sum(case.positive for case in cases),
        {modality: _of_modality(modality, cases) for modality in modalities} if known else {},
    )


def _of_modality(modality: str, cases: Sequence[CaseInfo]) -> ModalityData:
    found = [case.images[modality] for case in cases if modality in case.images]
    sides = zip(*(image.spacing_mm for image in found), strict=True) if found else ((0.0,),) * 3
    d, h, w = ((min(side), max(side)) for side in sides)
    medians = [image.intensity[1] for image in found] or [0.0]
    return ModalityData(len(found), (d, h, w), (min(medians), max(medians)))


def from_provenance(provenance: Mapping[str, object]) -> TrainingData | None:
    """What an artifact says of its training data; None if it says nothing, or in a later schema.

    Raises:
        RecordError: something else stands in that place.
    """
    content = provenance.get("training_data")
    if isinstance(content, Mapping) and content.get("schema") == SCHEMA:
        return records.decode(TrainingData, content, "training_data")
    if content is not None and not isinstance(content, Mapping):
        raise RecordError(f"training_data is {content!r:.40} where facts are expected")
    config = provenance.get("config")
    data = config.get("data") if isinstance(config, Mapping) else None
    name = data.get("name") if isinstance(data, Mapping) else None
    return TrainingData(name, origin_of(name).synthetic) if isinstance(name, str) else None


def to_provenance(data: TrainingData) -> dict[str, object]:
    """JSON values from which ``from_provenance`` reads it again."""
    return {"schema": SCHEMA, **records.encode(data)}


def in_words(data: TrainingData | None) -> str:
    """One phrase: how many cases of which data set, and whether there are patients in it."""
    if data is None:
        return "data that are not known"
    kind = {
        True: "synthetic images, no patients",
        False: "images of patients",
        None: "origin not known",
    }[data.synthetic]
    if data.num_cases is None:
        return f"the data set {data.name} ({kind}), how many cases is not known"
    return (
        f"{data.num_cases} cases of {data.num_patients} "
        f"{'drawn subjects' if data.synthetic else 'patients'}, {data.num_positive} of them "
        f"positive, of the data set {data.name} ({kind})"
    )


def absences(data: TrainingData) -> list[str]:
    """A sentence for each modality that some of the cases lack."""
    return [
        f"{name} is absent in {data.num_cases - facts.num_cases} of {data.num_cases} cases."
        for name, facts in data.modalities.items()
        if data.num_cases is not None and facts.num_cases < data.num_cases
    ]


def unlike(data: TrainingData | None, images: Mapping[str, ImageFacts]) -> Iterator[str]:
    """Sentences on the images of a case that are far from those that a model was trained on."""
    for name, image in images.items():
        known = None if data is None else data.modalities.get(name)
        if known is None or not known.num_cases:
            continue
        for axis, side, (low, high) in zip(_AXES, image.spacing_mm, known.spacing_mm, strict=True):
            if not low / FAR_SPACING <= side <= high * FAR_SPACING:
                yield (
                    f"'{name}' should have voxels like those that the model was trained on; got "
                    f"{side:.3g} mm between {axis}, and {low:.3g} to {high:.3g} mm in training. "
                    "Judge the result with care."
                )
        median, (low, high) = image.intensity[1], known.intensity
        if not low / FAR_INTENSITY <= median <= high * FAR_INTENSITY:
            yield (
                f"'{name}' should have intensities like those that the model was trained on; got "
                f"a median of {median:.4g} in the middle of the image, and {low:.4g} to {high:.4g} "
                "in training. Check that the file is this modality, and its unit."
            )
