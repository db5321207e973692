"""From raw volumes to a stored case and back: physical resampling, crop, intensity scaling.

Everything is deterministic and uses nothing but the case itself, so that a case is preprocessed
alike for training and for prediction, and no statistic crosses from validation to training.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
import scipy

from data_pipelines.case import (
    STORED_UNIT,
    Case,
    RawCase,
    Volume,
    corners_apart,
    spacing_of,
)
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError, MissingDataError, raise_all
from data_pipelines.modalities import plain
from data_pipelines.preparing.geometry import (
    TIE,
    canonical,
    foreground_box,
    foreground_outside,
    in_view,
    index_transform,
    overlaps,
    parts_of,
    resample,
    resample_label,
)
from data_pipelines.preparing.labels import label_classes
from data_pipelines.targets import foreground

REFERENCE = "t2w"
"""The modality that sets the reference grid and into whose frame predictions go."""


MOST_OUTSIDE = 0.5
"""Largest share of a label's or mask's foreground that may lie outside the reference image."""

_MAX_STORED = 32767
_SCALE = re.compile(r"([^=]+)=(-?\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)")


def reference_grid(
    t2w: Volume, config: PreprocessConfig, gland: Volume | None = None
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape (``d h w``) and affine of the grid on which a case is stored.

    Its axes are the canonical ones of ``t2w``, its spacing and size those of ``config``. Its
    centre is that of the ``t2w`` image or, with ``config.centre == "gland"``, that of the box
    around the largest connected part of the mask ``gland``. Along an axis whose spacing is that of
    ``t2w`` (within 1 %) it is
    moved by up to half a voxel, so that voxel falls on voxel: between slices 3 mm apart nothing
    then needs to be interpolated, neither for the image nor for a small lesion's label.

    Raises:
        MissingDataError: the mask is asked for and not given.
        DataError: the mask is empty.
    """
    source = canonical(t2w)
    ratio = np.divide(config.spacing_mm, source.spacing_mm)
    centre = np.subtract(source.shape, 1) / 2
    if config.centre == "gland":
        centre = _mask_centre(gland, source.affine)
    start = centre - ratio * np.subtract(config.size, 1) / 2
    start = np.where(abs(ratio - 1) < 0.01, np.floor(start + 0.5 + TIE), start)
    index = np.eye(4)
    index[:3, :3] = np.diag(ratio[::-1])
    index[:3, 3] = start[::-1]
    return config.size, source.affine @ index


def _mask_centre(mask: Volume | None, affine: np.ndarray) -> np.ndarray:
    """Centre of the box around a mask's largest part, as an index ``d h w`` of another grid."""
    if mask is None:
        raise MissingDataError(
            "a crop around the gland needs a mask of the gland, for training and for prediction; "
            "got none. Add the mask to the case, or use --data.preprocess.centre=image."
        )
    parts, sizes = parts_of(mask.array)
    if len(sizes) == 0:
        raise DataError(
            "a crop around the gland needs a mask of the gland; got an empty one. Repair the mask "
            "or use --data.preprocess.centre=image."
        )
    voxels = np.argwhere(parts == 1 + int(np.argmax(sizes)))
    matrix, offset = index_transform(affine, mask.affine)
    positions = voxels @ matrix.T + offset
    return (positions.min(0) + positions.max(0)) / 2


def check_preprocess(data: DataConfig) -> None:
    """Raise ``DataError`` for settings that cannot be meant."""
    config = data.preprocess
    if config.centre == "gland" and data.target != "lesion":
        raise DataError(
            "the crop must not be placed by what is to be found; got a crop around the gland and "
            f"the target '{data.target}'. Use --data.preprocess.centre=image."
        )
    if min(config.size) < 1 or not all(0 < mm < np.inf for mm in config.spacing_mm):
        raise DataError(
            "the reference grid must have at least one voxel along each axis and a positive "
            f"spacing; got {config.size} voxels at {config.spacing_mm} mm. Use "
            "--data.preprocess.size 20 48 48 --data.preprocess.spacing-mm 3 2 2."
        )
    low, high = config.clip_percentiles
    if not 0 <= low < high <= 100:
        raise DataError(
            f"percentiles must rise within 0 to 100; got {low} and {high}. Use "
            "--data.preprocess.clip-percentiles 0.5 99.5."
        )
    absent = sorted(scales_of(config).keys() - {*data.modalities})
    if absent:
        raise DataError(
            "a scale must be one of a modality that is used; got one for "
            f"{', '.join(absent)} and the modalities {', '.join(data.modalities)}. Correct "
            "--data.preprocess.scales."
        )


def scales_of(config: PreprocessConfig) -> dict[str, tuple[float, float]]:
    """Centre and width of each modality that keeps its unit.

    Raises:
        DataError: an entry is not of the form name=centre/width, or a name is there twice.
    """
    found: dict[str, tuple[float, float]] = {}
    for entry in config.scales:
        match = _SCALE.fullmatch(entry)
        width = float(match[3]) if match else 0.0
        if not match or not width or plain(match[1]) in found:
            raise DataError(
                "the scale of a modality with a unit must be written name=centre/width, with a "
                f"width above 0, once for each modality; got {entry!r}. Use "
                "--data.preprocess.scales adc=1200/500."
            )
        found[plain(match[1])] = float(match[2]), width
    return found


def reference_image(raw: RawCase, data: DataConfig) -> Volume:
    """T2W, also where it is not among ``data.modalities``, else the first modality present."""
    return next(raw.images[name] for name in (REFERENCE, *data.modalities) if name in raw.images)


def preprocess_case(raw: RawCase, data: DataConfig, *, require_label: bool = True) -> Case:
    """Put all modalities and the label on the reference grid and scale the intensities.

    The grid is that of T2W, also where T2W is not among ``data.modalities``, else that of the
    first modality present. A modality coarser than it is interpolated linearly; a finer one is
    smoothed first as scikit-image does for ``resize`` (sd of (ratio - 1) / 2 voxels), lest its
    noise be aliased. Each is then clipped to its percentiles within the crop, shifted and
    divided to mean 0 and sd 1, or by the centre and width of its ``scales``, and set to 0 outside
    its field of view. Labels are sampled as ``data.preprocess.label_sampling`` says; outside their
    own grid is background. For targets of one class every positive label value (such as an ISUP
    grade) is 1.

    Args:
        raw: what the reader found.
        data: modalities, target and preprocessing.
        require_label: refuse a case without a label. Without one, all is background.

    Raises:
        MissingDataError: a modality, the label or the mask for the crop is missing.
        DataError: settings that cannot be meant, grids that do not overlap, NaN or constant
            images, unexpected label values, or a label whose foreground lies outside the reference
            image or outside the crop.
    """
    check_preprocess(data)
    _check_modalities(raw, data)
    reference = reference_image(raw, data)
    faults: list[DataError] = []
    with _collected(faults, "gland"):
        if raw.gland is not None:
            _check_place("gland", raw.gland, reference)
    shape, affine = reference_grid(reference, data.preprocess, raw.gland)
    image = np.zeros((*shape, len(data.modalities)), np.int16)
    for channel, name in enumerate(data.modalities):
        if name in raw.images:
            with _collected(faults, name):
                _check_overlap(name, raw.images[name], reference)
                _check_place(name, raw.images[name], reference)
                image[..., channel] = _scaled(
                    name, raw.images[name], shape, affine, data.preprocess
                )
    label, truth = np.zeros(shape, np.uint8), np.zeros(reference.shape, np.uint8)
    with _collected(faults, "label"):
        if raw.label is not None:
            label, truth = _resampled_labels(raw.label, data, reference, shape, affine)
        elif require_label:
            raise MissingDataError(
                "a case must have a label; got none. Add the label file (empty if there is no "
                f"{data.target}) or remove the case."
            )
    raise_all(faults)
    truth, truth_offset = foreground_box(truth)
    return Case(
        case_id=raw.case_id,
        patient_id=raw.patient_id,
        image=image,
        label=label,
        present=np.array([name in raw.images for name in data.modalities]),
        affine=affine,
        original_shape=reference.shape,
        original_affine=np.asarray(reference.affine, np.float64),
        truth=truth,
        truth_offset=truth_offset,
    )


@contextlib.contextmanager
def _collected(faults: list[DataError], part: str) -> Iterator[None]:
    """Keep a fault of one part of the case, so that those of the others are found too."""
    try:
        yield
    except DataError as error:
        error.part = part
        faults.append(error)


def to_original(probability: np.ndarray, case: Case) -> np.ndarray:
    """Bring a result on the reference grid into the frame of the original T2W file.

    Args:
        probability: ``d h w`` or ``d h w k`` on the reference grid of ``case``.
        case: says where that grid and the original one lie.

    Returns:
        float32 on the original grid, linearly interpolated, 0 outside the reference grid.
    """
    channels = probability[..., None] if probability.ndim == 3 else probability
    restored = [
        resample(
            Volume(channels[..., k], case.affine),
            case.original_shape,
            case.original_affine,
            order=1,
        )[0]
        for k in range(channels.shape[-1])
    ]
    return restored[0] if probability.ndim == 3 else np.stack(restored, axis=-1)


def _check_modalities(raw: RawCase, data: DataConfig) -> None:
    missing = [name for name in data.modalities if name not in raw.images]
    if len(missing) == len(data.modalities):
        raise MissingDataError(
            f"a case must have at least one of the modalities {', '.join(data.modalities)}; got "
            f"{', '.join(raw.images) or 'none'}. Remove the case or change --data.modalities."
        )
    if missing and not data.allow_missing:
        raise MissingDataError(
            f"a case must have every modality; got none for {', '.join(missing)}. Remove the "
            "case, leave the modality out of --data.modalities or pass --data.allow-missing True."
        )


def _check_overlap(name: str, volume: Volume, reference: Volume) -> None:
    if not overlaps(volume.shape, volume.affine, reference.shape, reference.affine):
        raise DataError(overlap_fault(name, volume.affine, reference.affine))


def overlap_fault(name: str, affine: np.ndarray, reference_affine: np.ndarray) -> str:
    """What to say of a volume whose grid does not meet that of the reference image."""
    return (
        f"'{name}' must overlap the reference image; got origins {_point(affine)} and "
        f"{_point(reference_affine)} mm and no common voxel. Check that both files are of one "
        "study and that their headers are right."
    )


def _check_place(name: str, volume: Volume, reference: Volume) -> None:
    """Refuse a header that no scanner made: an array that was stored without its geometry."""
    placed = np.asarray(volume.affine)
    unplaced = np.array_equal(placed, np.diag(np.diag(placed)))
    if unplaced and volume.shape == reference.shape:
        apart = corners_apart(placed, reference.affine, volume.shape)
        if apart > min(reference.spacing_mm):
            raise DataError(
                f"'{name}' must say where its voxels lie; got them from the origin on along the "
                "scanner's axes, as of an array that was stored without the header of its image, "
                f"and a reference image of equal size that lies up to {apart:.0f} mm from there. "
                "Store it with the header of the image on which it was drawn."
            )
    if name == "gland":
        outside = foreground_outside(volume.array, volume.affine, reference.shape, reference.affine)
        if outside > MOST_OUTSIDE:
            raise DataError(
                "the mask of the gland must lie within the reference image, half of it at least; "
                f"got {outside:.0%} of it outside. Check the header of the mask."
            )


def _scaled(
    name: str,
    volume: Volume,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    config: PreprocessConfig,
) -> np.ndarray:
    """The int16 channel of one modality."""
    volume = canonical(volume)
    values, inside = resample(_smoothed(volume, affine), shape, affine, order=1)
    if not inside.any() and overlaps(volume.shape, volume.affine, shape, affine):
        extent = np.multiply(volume.shape, volume.spacing_mm)  # of the canonical axes
        finer = np.minimum(config.spacing_mm, np.floor(extent * 100 + 1e-6) / 100)
        raise DataError(
            f"'{name}' must hold at least one plane of the reference grid; got a volume of "
            f"{_numbers(extent)} mm (d h w) between planes {_numbers(config.spacing_mm)} mm apart. "
            f"Use --data.preprocess.spacing-mm {_numbers(finer)}."
        )
    if not inside.any():
        raise DataError(
            f"'{name}' must reach into the crop of {config.size} voxels at {config.spacing_mm} mm "
            "around the centre of the reference image; got none of it. Enlarge "
            "--data.preprocess.size or check the headers."
        )
    if not np.isfinite(values[inside]).all():
        raise DataError(
            f"'{name}' must hold finite values; got NaN or infinite voxels. Repair the file or "
            "leave out the case."
        )
    low, high = np.percentile(values[inside], config.clip_percentiles)
    values = np.clip(values.astype(np.float64), low, high)
    mean, sd = float(values[inside].mean()), float(values[inside].std())
    if not sd > 1e-6 * max(abs(mean), 1e-6):
        raise DataError(
            f"'{name}' must vary within the crop; got the constant {mean:g}. Check the file or "
            "leave out the case."
        )
    mean, sd = scales_of(config).get(name, (mean, sd))
    units = np.clip(np.rint((values - mean) / sd / STORED_UNIT), -_MAX_STORED, _MAX_STORED)
    return np.where(inside, units, 0).astype(np.int16)


def _smoothed(volume: Volume, affine: np.ndarray) -> Volume:
    """``volume`` low-passed for sampling at the coarser spacing of ``affine``, axis by axis."""
    ratio = np.divide(spacing_of(affine), volume.spacing_mm)
    sd = np.where(ratio > 1.01, (ratio - 1) / 2, 0)
    if not sd.any():
        return volume
    array = scipy.ndimage.gaussian_filter(volume.array.astype(np.float32), sd, mode="nearest")
    return Volume(array, volume.affine)


def _resampled_labels(
    label: Volume,
    data: DataConfig,
    reference: Volume,
    shape: tuple[int, int, int],
    affine: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The target on the reference grid, and on the original grid of the reference image."""
    _check_overlap("label", label, reference)
    _check_place("label", label, reference)
    source = Volume(label_classes(label.array, data.definition), label.affine)
    sampling = data.preprocess.label_sampling
    outside = foreground_outside(
        foreground(source.array), source.affine, reference.shape, reference.affine
    )
    if outside > MOST_OUTSIDE:
        raise DataError(
            f"the label's foreground must lie within the reference image, half of it at least; got "
            f"{outside:.0%} of the {data.target} outside. Check the header of the label file."
        )
    truth = resample_label(source, reference.shape, reference.affine, sampling=sampling)
    on_grid = resample_label(canonical(source), shape, affine, sampling=sampling)
    target = foreground(truth)
    if target.any() and not _reaches_into(target, reference.affine, shape, affine):
        raise DataError(
            f"the label's foreground must reach into the crop of {data.preprocess.size} voxels at "
            f"{data.preprocess.spacing_mm} mm around the image centre; got all of the "
            f"{data.target} outside. Enlarge --data.preprocess.size."
        )
    return on_grid, truth


def _reaches_into(
    mask: np.ndarray, mask_affine: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray
) -> bool:
    """Whether the centre of any foreground voxel of ``mask`` lies within the grid."""
    matrix, offset = index_transform(affine, mask_affine)
    return bool(in_view(shape, matrix, offset, np.nonzero(mask)).any())


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _point(affine: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(x), 1) for x in affine[:3, 3])
