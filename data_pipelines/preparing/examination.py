"""One case read, checked and preprocessed: the function that building and validating share.

Errors keep a case from being built. Warnings are for what can be meant but seldom is: grids that
lie apart, a label beyond an image, intensities in another unit, one image under two names.
"""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from data_pipelines.case import Case, ImageFacts, RawCase, Volume
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, DataErrors, Problem
from data_pipelines.preparing.fingerprint import intensity_of, spread
from data_pipelines.preparing.geometry import canonical, coverage, overlaps, parts_of
from data_pipelines.preparing.preprocessing import preprocess_case, reference_grid, reference_image
from data_pipelines.targets import foreground

_FAR_MM = 1.0
_FAR_DEGREES = 1.0
_MAX_POINTS = 20_000
_USUAL_ML = {"lesion": (0.01, 60), "gland": (8, 350), "zones": (8, 350)}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the fingerprint of a data set is made of.

    Attributes:
        patient_id: who was imaged.
        spacing_mm: modality to voxel size, ``d h w``.
        size: modality to number of voxels, ``d h w``.
        image_sha256: modality to a hash of its voxels.
        lesion_ml: volume of each connected part of the target.
        label_source: where the label came from, if there are several places.
        images: modality to what its image is like.
    """

    patient_id: str
    spacing_mm: dict[str, tuple[float, ...]]
    size: dict[str, tuple[int, ...]]
    image_sha256: dict[str, str]
    lesion_ml: tuple[float, ...]
    label_source: str = ""
    images: dict[str, ImageFacts] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Examination:
    """Everything that is found out about one case.

    Attributes:
        case_id: which case.
        problems: errors and warnings.
        case: what is to be stored; None if there are errors.
        facts: None where nothing could be read.
        metadata: of the raw case.
    """

    case_id: str
    problems: tuple[Problem, ...]
    case: Case | None = None
    facts: Facts | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def faulty(self) -> bool:
        """Whether the case cannot be built."""
        return any(problem.level == "error" for problem in self.problems)


def examine(
    case_id: str,
    raw: RawCase | None,
    faults: Sequence[DataError],
    files: Mapping[str, Path],
    config: DataConfig,
    problems: Sequence[Problem] = (),
) -> Examination:
    """Preprocess a case and gather its problems.

    Args:
        case_id: which case.
        raw: what could be read of it.
        faults: what could not.
        files: the files of the parts of the case.
        config: how it is preprocessed.
        problems: that are known already.
    """
    errors = list(faults)
    case = None
    known = list(problems)
    incomplete = bool(faults) or any(problem.level == "error" for problem in known)
    if raw is not None and any(name in raw.images for name in config.modalities):
        # What could be read is checked even so, lest its faults show only after the others' repair.
        lenient = dataclasses.replace(config, allow_missing=True) if incomplete else config
        try:
            case = preprocess_case(raw, lenient, require_label=not incomplete)
        except DataErrors as error:
            errors += error.errors
        except DataError as error:
            errors.append(error)
    problems = [*known, *(_problem(case_id, error, files) for error in errors)]
    if raw is None or not any(name in raw.images for name in config.modalities):
        return Examination(case_id, tuple(problems))
    if case is not None and case.positive and not foreground(case.label).any():
        text = (
            f"the {config.target} should leave voxels on the reference grid; got none of it at "
            f"{config.preprocess.spacing_mm} mm, so that nothing of it is learned although the "
            "case counts as positive. Choose a finer --data.preprocess.spacing-mm, or remove "
            "the case."
        )
        problems.append(Problem(case_id, files.get("label"), text, "warning"))
    problems += [
        Problem(case_id, files.get(part), text, "warning")
        for part, text in _suspicions(raw, config)
    ]
    return Examination(
        case_id,
        tuple(problems),
        None if errors or incomplete else case,
        _facts(raw, config),
        dict(raw.metadata),
    )


def duplicates(facts: Mapping[str, Facts]) -> Iterator[Problem]:
    """Images that occur more than once: under two patients, or as two modalities."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for case_id, case in facts.items():
        for name, digest in case.image_sha256.items():
            found[digest].append((case_id, name))
    for places in found.values():
        patients = {facts[case_id].patient_id for case_id, _ in places}
        if len(places) > 1 and (len(patients) > 1 or len({name for _, name in places}) > 1):
            where = ", ".join(f"{name} of {case_id}" for case_id, name in places)
            yield Problem(
                places[-1][0],
                None,
                f"an image must belong to one patient and modality; got the same voxels as {where}"
                ". Check which is right, or give both cases the same patient.",
                "warning",
            )


def _problem(case_id: str, error: DataError, files: Mapping[str, Path]) -> Problem:
    return Problem(case_id, error.file or files.get(error.part or ""), str(error))


def _facts(raw: RawCase, config: DataConfig) -> Facts:
    images = {name: raw.images[name] for name in config.modalities if name in raw.images}
    volumes: tuple[float, ...] = ()
    if raw.label is not None and np.isfinite(raw.label.array).all():
        _, sizes = parts_of(_of_target(raw.label.array, config))
        voxel_ml = float(abs(np.linalg.det(raw.label.affine[:3, :3]))) / 1000
        volumes = tuple(round(float(n * voxel_ml), 4) for n in sizes)
    return Facts(
        raw.patient_id,
        {name: tuple(round(mm, 4) for mm in v.spacing_mm) for name, v in images.items()},
        {name: v.shape for name, v in images.items()},
        {name: _voxel_hash(v) for name, v in images.items()},
        volumes,
        raw.metadata.get("label_source", ""),
        {name: image_facts(v) for name, v in images.items()},
    )


def _of_target(array: np.ndarray, config: DataConfig) -> np.ndarray:
    """Where a label file holds target: of classes of one's own not what is ignored."""
    ignore = config.definition.ignore
    return (array > 0) if ignore is None else (array > 0) & (array != ignore)


def image_facts(volume: Volume) -> ImageFacts:
    """What an image is like: its grid, and the spread of its intensities."""
    d, h, w = (round(mm, 4) for mm in canonical(volume).spacing_mm)
    return ImageFacts((d, h, w), intensity_of(volume.array))


def _voxel_hash(volume: Volume) -> str:
    array = np.ascontiguousarray(canonical(volume).array)
    return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()


def _suspicions(raw: RawCase, config: DataConfig) -> Iterator[tuple[str, str]]:
    """Part of the case and text of each warning."""
    reference = reference_image(raw, config)
    grid_points = _grid_points(raw, reference, config)
    for name in config.modalities:
        if name not in raw.images:
            continue
        volume = raw.images[name]
        share = coverage(volume.shape, volume.affine, grid_points).mean() if len(grid_points) else 0
        if 0 < share < 0.5:
            yield (
                name,
                f"'{name}' should cover the crop of the reference image; got {share:.0%} of it "
                "within its field of view. Check that both are of one study, and their headers.",
            )
        for text in _intensity_suspicions(name, volume):
            yield name, text
    if config.preprocess.centre == "gland" and raw.gland is not None:
        for text in gland_suspicions(raw.gland):
            yield "gland", text
    if raw.label is not None:
        for text in _label_suspicions(raw, raw.label, reference, config):
            yield "label", text


def gland_suspicions(gland: Volume) -> Iterator[str]:
    """Parts of a mask around which the crop is not placed."""
    _, sizes = parts_of(gland.array)
    if len(sizes) > 1:
        voxel_ml = float(abs(np.linalg.det(gland.affine[:3, :3]))) / 1000
        yield (
            f"the mask of the gland should be one connected part; got {len(sizes)}, the largest of "
            f"{sizes.max() * voxel_ml:.3g} ml and {(sizes.sum() - sizes.max()) * voxel_ml:.3g} ml "
            "in the others. The crop is placed around the largest; remove the others if they are "
            "not of the gland, or join them."
        )


def _grid_points(raw: RawCase, reference: Volume, config: DataConfig) -> np.ndarray:
    """Positions in millimetres, spread over the part of the reference image that is stored."""
    try:
        shape, affine = reference_grid(reference, config.preprocess, raw.gland)
    except DataError:
        return np.zeros((0, 3))
    d, h, w = (np.linspace(0, n - 1, min(n, 25)) for n in shape)
    index = np.stack(np.meshgrid(w, h, d, indexing="ij"), -1).reshape(-1, 3)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    return points[coverage(reference.shape, reference.affine, points)]


def _intensity_suspicions(name: str, volume: Volume) -> Iterator[str]:
    array = volume.array
    middle = array[tuple(slice(n // 4, n - n // 4) for n in array.shape)]
    if middle.size == 0 or not np.isfinite(middle).all():
        return
    positive = middle[middle > 0]
    if positive.size == 0:
        return
    median, high = float(np.median(positive)), float(np.percentile(positive, 99))
    if name == "adc" and not 100 <= median <= 10_000:
        yield (
            "'adc' should be in 1e-6 mm2/s, about 500 to 3000 in tissue; got a median of "
            f"{median:g} in the middle of the image. Multiply by 1000 or 1e6 if it is in 1e-3 "
            "mm2/s or mm2/s, or check that the file is an ADC map."
        )
    if array.max() > 100 * high:
        yield (
            f"'{name}' should have no extreme intensities; got a maximum of {array.max():g}, "
            f"{array.max() / high:.0f} times the 99th percentile in the middle. Look at the image; "
            "values beyond --data.preprocess.clip-percentiles are clipped."
        )
    negative = float((middle < 0).mean())
    if negative > 0.01:
        yield (
            f"'{name}' should not be negative; got {negative:.0%} negative voxels in the middle. "
            "Check the rescaling of the file."
        )


def _label_suspicions(
    raw: RawCase, label: Volume, reference: Volume, config: DataConfig
) -> Iterator[str]:
    yield from _frame_suspicions(label, reference)
    voxels = np.argwhere(_of_target(label.array, config))
    if len(voxels) == 0:
        return
    volume_ml = len(voxels) * abs(np.linalg.det(label.affine[:3, :3])) / 1000
    low, high = _USUAL_ML.get(config.target, (0, np.inf))
    if not low <= volume_ml <= high:
        yield (
            f"the {config.target} should have between {low:g} and {high:g} ml; got "
            f"{volume_ml:.3g} ml. Look at the outline on the contact sheet."
        )
    found = {value for value in (1, 2) if (label.array == value).any()}
    if config.target == "zones" and len(found) == 1:
        yield (
            "both zones should be there; got only value "
            f"{found.pop()} ({' and '.join(config.classes)} are 1 and 2). Check the outline on the "
            "contact sheet: of some published cases one zone alone is stored, under the other's "
            "number. Remove such a case, or correct its label."
        )
    elif config.target == "zones" and len(found) == 2:
        behind = _mean_anterior_mm(label, 2) - _mean_anterior_mm(label, 1)
        if behind < 0:
            yield (
                "the peripheral zone (1) should lie behind the transition zone (2); got it "
                f"{-behind:.1f} mm before it. Check the numbers of the zones and the header."
            )
    voxels = voxels[:: max(len(voxels) // _MAX_POINTS, 1)]
    points = voxels[:, ::-1] @ label.affine[:3, :3].T + label.affine[:3, 3]
    for name in config.modalities:
        if name in raw.images:
            image = raw.images[name]
            outside = 1 - coverage(image.shape, image.affine, points).mean()
            apart = not overlaps(image.shape, image.affine, reference.shape, reference.affine)
            if outside > 0.01 and not apart:  # else an error elsewhere
                yield (
                    f"the {config.target} should lie within the field of view of '{name}'; got "
                    f"{outside:.0%} of it outside. Check the headers; '{name}' says nothing there."
                )
    try:
        shape, affine = reference_grid(reference, config.preprocess, raw.gland)
    except DataError:
        return
    outside = 1 - coverage(shape, affine, points).mean()
    if outside > 0.01:
        yield (
            f"the {config.target} should lie within the crop of {config.preprocess.size} voxels at "
            f"{config.preprocess.spacing_mm} mm; got {outside:.0%} of it outside. Enlarge "
            "--data.preprocess.size."
        )


def _mean_anterior_mm(label: Volume, value: int) -> float:
    """How far forward the voxels of a class lie, in the mean."""
    index = np.argwhere(label.array == value).mean(0)[::-1]
    return float((label.affine[:3, :3] @ index + label.affine[:3, 3])[1])


def _frame_suspicions(label: Volume, reference: Volume) -> Iterator[str]:
    """Label and image of equal size of which one header seems wrong."""
    if label.shape != reference.shape:
        return
    axes, image_axes = ("".join(nib.aff2axcodes(v.affine)) for v in (label, reference))
    apart_mm, degrees = frames_apart(label, reference)
    if {axis for axis in axes if axis in "LR"} != {axis for axis in image_axes if axis in "LR"}:
        yield (
            "label and image of equal size should be stored in one left-right order; got axes "
            f"{axes} for the label and {image_axes} for the image, {apart_mm:.1f} mm apart. Check "
            "the outline on the contact sheet; one of the headers may be wrong."
        )
    elif apart_mm > _FAR_MM or degrees > _FAR_DEGREES:
        yield (
            "label and image of equal size should lie on one grid; got grids that are "
            f"{apart_mm:.1f} mm and {degrees:.1f} degrees apart. Check the outline on the contact "
            "sheet; one of the headers may be wrong."
        )


def frames_apart(a: Volume, b: Volume) -> tuple[float, float]:
    """Distance of the centres in millimetres, and largest angle between like axes in degrees."""
    centres, axes = [], []
    for volume in map(canonical, (a, b)):
        middle = (np.array(volume.shape[::-1]) - 1) / 2
        centres.append(volume.affine[:3, :3] @ middle + volume.affine[:3, 3])
        axes.append(volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0))
    cosines = np.clip((axes[0] * axes[1]).sum(0), -1, 1)
    angle = float(np.degrees(np.arccos(cosines)).max())
    return float(np.linalg.norm(centres[0] - centres[1])), angle


def fingerprint(facts: Mapping[str, Facts], config: DataConfig) -> str:
    """A few lines on the whole data set: cases, grids, positives, volumes."""
    if not facts:
        return "no case could be read"
    positives = [case for case in facts.values() if case.lesion_ml]
    patients = {case.patient_id for case in facts.values()}
    lines = [
        f"cases      {len(facts)} of {len(patients)} patients, {len(positives)} with "
        f"{config.target} ({len(positives) / len(facts):.0%})"
    ]
    for name in config.modalities:
        cases = [case for case in facts.values() if name in case.size]
        if cases:
            lines.append(
                f"{name:<10} {len(cases)} cases; voxels d h w "
                f"{spread([case.size[name] for case in cases], 'd')}; mm "
                f"{spread([case.spacing_mm[name] for case in cases], '.2f')}"
            )
    if positives:
        volumes = [sum(case.lesion_ml) for case in positives]
        parts = [len(case.lesion_ml) for case in positives]
        p5, p50, p95 = np.percentile(volumes, (5, 50, 95))
        lines.append(
            f"{config.target:<10} {p50:.2f} ml median (5 to 95 %: {p5:.2f} to {p95:.2f}), "
            f"{np.mean(parts):.2f} parts a positive case"
        )
    sources: dict[str, int] = defaultdict(int)
    for case in facts.values():
        if case.label_source:
            sources[case.label_source] += 1
    lines += [f"labels     {count} from {source}" for source, count in sorted(sources.items())]
    return "\n".join(lines)
