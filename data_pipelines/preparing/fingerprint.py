"""What a data set is like, case by case: grids, intensities, and where its target lies.

These are the facts from which a run can be planned (``experiments.planning``). They are measured on
the files as they are, before anything is resampled or cropped, so they do not depend on a plan.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.case import CaseInfo, RawCase, Volume
from data_pipelines.config import DataConfig
from data_pipelines.preparing.geometry import (
    canonical,
    foreground_box,
    index_transform,
    parts_of,
    resample,
    resample_label,
)
from data_pipelines.preparing.labels import label_classes
from data_pipelines.preparing.preprocessing import reference_grid, reference_image
from data_pipelines.targets import IGNORED, foreground

PERCENTILES = (0.5, 50.0, 99.5)
"""Of the intensities above 0 in the middle half of an image, along each axis."""

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class CaseFacts:
    """What is measured of one case. Axes are the canonical ones of the reference image, d h w.

    Attributes:
        case_id, patient_id: which case, and whose.
        spacing_mm, size: of the reference image.
        modalities: those that are there.
        content_mm: from the centre of the image to its farthest voxel that is not 0.
        on_one_grid: whether all of them have the reference's grid.
        intensity: modality to its ``PERCENTILES``.
        class_ml: volume of each class, in label order.
        parts_ml: volume of each connected part of the target.
        box_mm: sides of the box around the largest part; 0 without target.
        reach_mm: from the centre of the image to the target's farthest voxel, along each axis.
        metadata: of the raw case: centre, group.
    """

    case_id: str
    patient_id: str
    spacing_mm: Triple
    size: tuple[int, int, int]
    modalities: tuple[str, ...]
    content_mm: Triple = (0.0, 0.0, 0.0)
    on_one_grid: bool = True
    intensity: Mapping[str, Triple] = dataclasses.field(default_factory=dict)
    class_ml: tuple[float, ...] = ()
    parts_ml: tuple[float, ...] = ()
    box_mm: Triple = (0.0, 0.0, 0.0)
    reach_mm: Triple = (0.0, 0.0, 0.0)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def positive(self) -> bool:
        """Whether there is any target."""
        return bool(self.parts_ml)

    @property
    def extent_mm(self) -> Triple:
        """Field of view of the reference image."""
        d, h, w = (n * mm for n, mm in zip(self.size, self.spacing_mm, strict=True))
        return d, h, w


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The facts of all cases of a data set.

    Attributes:
        cases: by case id.
        unreadable: cases of which nothing could be measured, and why.
    """

    cases: tuple[CaseFacts, ...]
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of all facts: equal data have equal fingerprints."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def infos(self) -> tuple[CaseInfo, ...]:
        """What folds must know of the cases."""
        return tuple(
            CaseInfo(case.case_id, case.patient_id, case.positive, case.metadata)
            for case in self.cases
        )

    def of(self, case_ids: Iterable[str]) -> tuple[CaseFacts, ...]:
        """The facts of some cases."""
        wanted = {*case_ids}
        return tuple(case for case in self.cases if case.case_id in wanted)


def measure(raw: RawCase, config: DataConfig) -> CaseFacts:
    """The facts of one case.

    Raises:
        DataError: label values that the target does not have.
    """
    reference = canonical(reference_image(raw, config))
    images = {name: raw.images[name] for name in config.modalities if name in raw.images}
    grids = [canonical(image) for image in images.values()]
    return CaseFacts(
        raw.case_id,
        raw.patient_id,
        _rounded(reference.spacing_mm),
        reference.shape,
        tuple(images),
        _content(reference),
        all(
            grid.shape == reference.shape and np.allclose(grid.affine, reference.affine, atol=0.1)
            for grid in grids
        ),
        {name: intensity_of(image.array) for name, image in images.items()},
        **_target(raw.label, reference, config),
        metadata=dict(raw.metadata),
    )


def _target(label: Volume | None, reference: Volume, config: DataConfig) -> dict[str, Any]:
    """What is measured of the label; nothing of one without foreground."""
    if label is None:
        return {}
    target = config.definition
    classes = label_classes(label.array, target)
    voxel_ml = float(abs(np.linalg.det(label.affine[:3, :3]))) / 1000
    counts = [int(target.mask_of(classes, i).sum()) for i in range(len(target.classes))]
    class_ml = tuple(round(n * voxel_ml, 4) for n in counts)
    if not any(counts):
        return {"class_ml": class_ml}
    parts, sizes = parts_of(foreground(classes))
    spacing = np.array(reference.spacing_mm)
    matrix, offset = index_transform(reference.affine, label.affine)
    away = abs(np.argwhere(parts > 0) @ matrix.T + offset - (np.array(reference.shape) - 1) / 2)
    largest = np.argwhere(parts == 1 + int(np.argmax(sizes))) @ matrix.T + offset
    return {
        "class_ml": class_ml,
        "parts_ml": tuple(round(float(n) * voxel_ml, 4) for n in sizes),
        "box_mm": _rounded((np.ptp(largest, 0) + 1) * spacing),
        "reach_mm": _rounded((away.max(0) + 0.5) * spacing),
    }


def _content(reference: Volume) -> Triple:
    """Half the field of view, but for margins of 0, as of an image without its skull."""
    filled = reference.array != 0
    half = []
    for axis, (size, mm) in enumerate(zip(reference.shape, reference.spacing_mm, strict=True)):
        others = tuple(other for other in range(3) if other != axis)
        used = np.nonzero(filled.any(axis=others))[0]
        middle = (size - 1) / 2
        away = max(abs(used[0] - middle), abs(used[-1] - middle)) if used.size else middle
        half.append((away + 0.5) * mm)
    return _rounded(half)


def intensity_of(array: np.ndarray) -> Triple:
    """``PERCENTILES`` of an image; zeros where nothing in its middle is above 0."""
    middle = array[tuple(slice(n // 4, max(n - n // 4, n // 4 + 1)) for n in array.shape)]
    positive = middle[np.isfinite(middle) & (middle > 0)]
    if not positive.size:
        return 0.0, 0.0, 0.0
    low, median, high = (float(f"{v:.6g}") for v in np.percentile(positive, PERCENTILES))
    return low, median, high


def _rounded(values: Iterable[float]) -> Triple:
    d, h, w = (round(float(value), 4) for value in values)
    return d, h, w


def round_trip_dice(raw: RawCase, config: DataConfig) -> float | None:
    """Dice of the label with itself after the way to the reference grid and back.

    No network that is right on the grid can do better; a mean over the classes that the case holds.
    What lies outside the grid is lost as well. None without target.
    """
    if raw.label is None:
        return None
    reference = reference_image(raw, config)
    label = Volume(label_classes(raw.label.array, config.definition), raw.label.affine)
    sampling = config.preprocess.label_sampling
    truth = resample_label(label, reference.shape, reference.affine, sampling=sampling)
    if not truth.any():
        return None
    shape, affine = reference_grid(reference, config.preprocess, raw.gland)
    stored = resample_label(canonical(label), shape, affine, sampling=sampling)
    part, start = foreground_box(truth)
    # Nothing of what comes back lies farther off than a voxel of the grid.
    steps = np.abs(index_transform(reference.affine, affine)[0]).sum(1)
    margin = np.ceil(steps).astype(int) + 1
    low = np.maximum(np.subtract(start, margin), 0)
    high = np.minimum(np.add(start, part.shape) + margin, truth.shape)
    moved = np.array(reference.affine, np.float64)
    moved[:3, 3] += moved[:3, :3] @ low[::-1]
    truth = truth[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    back = _most_probable(stored, affine, truth.shape, moved)
    target, overlaps = config.definition, []
    for index in range(len(target.classes)):
        there, came = target.mask_of(truth, index), target.mask_of(back, index)
        came = came & (truth != IGNORED)
        if there.any():
            overlaps.append(2 * (there & came).sum() / (there.sum() + came.sum()))
    return float(np.mean(overlaps)) if overlaps else None


def _most_probable(
    stored: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], to: np.ndarray
) -> np.ndarray:
    """Classes on another grid, as a prediction that is certain of itself would come back."""
    d, h, w = shape
    highest, chosen = np.full((d, h, w), 0.5, np.float32), np.zeros((d, h, w), np.uint8)
    for value in (value for value in np.unique(stored) if value):
        indicator = Volume((stored == value).astype(np.float32), affine)
        weight, _ = resample(indicator, (d, h, w), to, order=1)
        wins = weight > highest
        chosen[wins], highest[wins] = value, weight[wins]
    return chosen


def describe(fingerprint: Fingerprint, classes: Sequence[str]) -> list[str]:
    """The data set in a few lines."""
    cases = fingerprint.cases
    patients = {case.patient_id for case in cases}
    positives = [case for case in cases if case.positive]
    lines = [
        f"{len(cases)} cases of {len(patients)} patients, {len(positives)} with "
        f"{' or '.join(classes)}",
        f"voxels {spread([c.size for c in cases], 'd')}, mm "
        f"{spread([c.spacing_mm for c in cases], '.2f')}",
        f"field of view in mm {spread([c.extent_mm for c in cases], '.0f')}",
    ]
    names = dict.fromkeys(name for case in cases for name in case.modalities)
    for name in names:
        having = [case for case in cases if name in case.modalities]
        medians = [case.intensity[name][1] for case in having if name in case.intensity]
        said = f"{name}: in {len(having)} of {len(cases)} cases"
        if medians:
            said += f", median intensity {np.median(medians):.4g}"
        lines.append(said)
    groups = {case.metadata[k] for case in cases for k in ("group", "center") if k in case.metadata}
    if groups:
        lines.append(f"groups: {', '.join(sorted(groups))}")
    for index, name in enumerate(classes):
        ml = [c.class_ml[index] for c in positives if len(c.class_ml) > index and c.class_ml[index]]
        if ml:
            p5, p50, p95 = np.percentile(ml, (5, 50, 95))
            lines.append(f"{name}: {p50:.3g} ml median (5 to 95 %: {p5:.3g} to {p95:.3g})")
    return lines


def spread(values: Sequence[Sequence[Any]], spec: str) -> str:
    """Median of each axis, and its range where it varies."""
    axes = []
    for column in zip(*values, strict=True):
        low, high = min(column), max(column)
        middle = sorted(column)[len(column) // 2]
        text = f"{middle:{spec}}"
        axes.append(text if low == high else f"{text} ({low:{spec}}-{high:{spec}})")
    return " x ".join(axes)
