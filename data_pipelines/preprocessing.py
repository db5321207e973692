"""From raw volumes to a stored case and back: physical resampling, crop, intensity scaling.

Everything is deterministic and uses nothing but the case itself, so that a case is preprocessed
alike for training and for prediction, and no statistic crosses from validation to training.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy import ndimage

from data_pipelines.case import (
    STORED_UNIT,
    Case,
    DataConfig,
    DataError,
    MissingDataError,
    PreprocessConfig,
    RawCase,
    Volume,
    raise_all,
    spacing_of,
)

REFERENCE = "t2w"
"""The modality that sets the reference grid and into whose frame predictions go."""

_MAX_STORED = 32767
_TIE = 1e-4  # voxels; ties of nearest-neighbour sampling all go one way, whatever the rounding


def canonical(volume: Volume) -> Volume:
    """The same voxels with axes reordered and flipped to be nearest to S, A, R (``d h w``).

    ``d`` then grows towards superior, ``h`` anterior and ``w`` right; obliqueness stays. No value
    is interpolated, so the same image stored in another orientation gives the same result.
    """
    shape = volume.array.shape[::-1]
    transform = ornt_transform(io_orientation(volume.affine), axcodes2ornt("RAS"))
    array = volume.array.T
    for axis, flip in enumerate(transform[:, 1]):
        if flip < 0:
            array = np.flip(array, axis)
    array = array.transpose(np.argsort(transform[:, 0]))
    return Volume(array.T, volume.affine @ inv_ornt_aff(transform, shape))


def reference_grid(
    t2w: Volume, config: PreprocessConfig, gland: Volume | None = None
) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape (``d h w``) and affine of the grid on which a case is stored.

    Its axes are the canonical ones of ``t2w``, its spacing and size those of ``config``. Its
    centre is that of the ``t2w`` image or, with ``config.centre == "gland"``, that of the box
    around the mask ``gland``. Along an axis whose spacing is that of ``t2w`` (within 1 %) it is
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
    start = np.where(abs(ratio - 1) < 0.01, np.floor(start + 0.5 + _TIE), start)
    index = np.eye(4)
    index[:3, :3] = np.diag(ratio[::-1])
    index[:3, 3] = start[::-1]
    return config.size, source.affine @ index


def _mask_centre(mask: Volume | None, affine: np.ndarray) -> np.ndarray:
    """Centre of the box around a mask, as an index ``d h w`` of the grid of ``affine``."""
    if mask is None:
        raise MissingDataError(
            "a crop around the gland needs a mask of the gland, for training and for prediction; "
            "got none. Add the mask to the case, or use --data.preprocess.centre=image."
        )
    voxels = np.argwhere(mask.array)
    if len(voxels) == 0:
        raise DataError(
            "a crop around the gland needs a mask of the gland; got an empty one. Repair the mask "
            "or use --data.preprocess.centre=image."
        )
    matrix, offset = _index_transform(affine, mask.affine)
    positions = voxels @ matrix.T + offset
    return (positions.min(0) + positions.max(0)) / 2


def coverage(shape: tuple[int, int, int], affine: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """Which of the points (``n 3``, millimetres) lie in the field of view of a grid: bool ``n``."""
    homogeneous = np.c_[points_mm, np.ones(len(points_mm))]
    ijk = np.linalg.solve(np.asarray(affine, np.float64), homogeneous.T)[:3]
    size = np.array(shape[::-1])[:, None]
    return ((ijk >= -0.5 - _TIE) & (ijk <= size - 0.5 + _TIE)).all(0)


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


def resample(
    volume: Volume, shape: tuple[int, int, int], affine: np.ndarray, *, order: int, fill: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sample ``volume`` at the voxel centres of another grid, by physical position.

    Args:
        volume: what is sampled.
        shape: size of the result, ``d h w``.
        affine: of the result.
        order: 1 linear (coordinates in float64, values in float32), 0 nearest (dtype kept).
        fill: value outside the field of view, which reaches half a voxel beyond the outermost
            voxel centres; between these and its border the value of the border voxel holds.

    Returns:
        The sampled array, and a mask of the voxels inside the field of view, both of ``shape``.
        The same as SimpleITK's ``Resample``, except that a nearest-neighbour tie goes to the
        larger index.
    """
    matrix, offset = _index_transform(volume.affine, affine)
    array = volume.array if order == 0 else volume.array.astype(np.float32)
    if volume.shape == shape and np.allclose(np.c_[matrix, offset], np.eye(3, 4), atol=_TIE):
        return array.copy(), np.ones(shape, bool)
    sampled = ndimage.affine_transform(
        array,
        matrix,
        (offset + (_TIE if order == 0 else 0.0)).tolist(),
        output_shape=shape,
        order=order,
        mode="nearest",
    )
    inside = _inside(volume.shape, matrix, offset, np.ogrid[tuple(slice(n) for n in shape)])
    return np.where(inside, sampled, np.asarray(fill, sampled.dtype)), inside


def resample_label(
    label: Volume,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    *,
    sampling: Literal["linear", "nearest"] = "linear",
) -> np.ndarray:
    """Bring a label (uint8) onto another grid; outside its own grid is background.

    ``linear`` interpolates the indicator of each class and takes the largest; for one class that
    is a threshold of one half. At a tie the voxel of the larger index decides, as in ``resample``,
    so that a shape neither grows nor shrinks.
    """
    result = np.zeros(shape, np.uint8)
    part, window, part_affine = _foreground_windows(label, shape, affine)
    size = result[window].shape
    if 0 in (*part.shape, *size):
        return result
    if sampling == "nearest":
        result[window] = resample(part, size, part_affine, order=0)[0]
        return result
    classes = np.unique(part.array[part.array > 0])
    shift = np.eye(4)
    shift[:3, 3] = -_TIE
    chosen = np.zeros(size, np.uint8)
    highest = np.full(size, 0.5 if len(classes) == 1 else 0.0, np.float32)
    background = np.ones(size, np.float32)
    for value in classes:
        indicator = Volume((part.array == value).astype(np.float32), part.affine @ shift)
        weight, _ = resample(indicator, size, part_affine, order=1)
        wins = weight > highest
        chosen[wins], highest[wins] = value, weight[wins]
        background -= weight
    if len(classes) > 1:
        chosen[background > highest] = 0
    result[window] = chosen
    return result


def _foreground_windows(
    label: Volume, shape: tuple[int, int, int], affine: np.ndarray
) -> tuple[Volume, tuple[slice, ...], np.ndarray]:
    """The part of a label around its foreground, and where it can reach in another grid.

    Nothing but background is left out: the foreground has a margin of one voxel. The third result
    is the affine of the window, of which the second gives the slices.
    """
    box, start = _foreground_box(label.array)
    if box.size == 0:
        return Volume(box, label.affine), (slice(0, 0),) * 3, affine
    low = np.maximum(np.subtract(start, 1), 0)
    high = np.minimum(np.add(start, box.shape) + 1, label.shape)
    part = label.array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    corners = np.array(list(itertools.product(*zip(low - 1, high, strict=True))))
    matrix, offset = _index_transform(affine, label.affine)
    reach = corners @ matrix.T + offset
    first = np.clip(np.floor(reach.min(0)).astype(int), 0, shape)
    last = np.clip(np.ceil(reach.max(0)).astype(int) + 1, first, shape)
    window = tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    return Volume(part, _moved(label.affine, low)), window, _moved(affine, first)


def _moved(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The affine of the part of a grid that begins at an index ``d h w``."""
    moved = np.array(affine, np.float64)
    moved[:3, 3] += moved[:3, :3] @ np.asarray(index)[::-1]
    return moved


def overlaps(
    shape: tuple[int, int, int],
    affine: np.ndarray,
    other_shape: tuple[int, int, int],
    other_affine: np.ndarray,
) -> bool:
    """Whether any voxel of one grid, of up to 33 spread along each axis, lies in the other."""
    grids = ((shape, affine), (other_shape, other_affine))
    for (source_shape, source_affine), (target_shape, target_affine) in (grids, grids[::-1]):
        lattice = np.ix_(*(np.linspace(0, n - 1, min(n, 33)) for n in target_shape))
        matrix, offset = _index_transform(source_affine, target_affine)
        if _inside(source_shape, matrix, offset, lattice).any():
            return True
    return False


def reference_image(raw: RawCase, data: DataConfig) -> Volume:
    """T2W, also where it is not among ``data.modalities``, else the first modality present."""
    return next(raw.images[name] for name in (REFERENCE, *data.modalities) if name in raw.images)


def preprocess_case(raw: RawCase, data: DataConfig, *, require_label: bool = True) -> Case:
    """Put all modalities and the label on the reference grid and scale the intensities.

    The grid is that of T2W, also where T2W is not among ``data.modalities``, else that of the
    first modality present. A modality coarser than it is interpolated linearly; a finer one is
    smoothed first as scikit-image does for ``resize`` (sd of (ratio - 1) / 2 voxels), lest its
    noise be aliased. Each is then clipped to its percentiles within the crop, shifted and
    divided to mean 0 and sd 1, and set to 0 outside its field of view. Labels are sampled as
    ``data.preprocess.label_sampling`` says; outside their own grid is background. For targets of
    one class every positive label value (such as an ISUP grade) is 1.

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
    shape, affine = reference_grid(reference, data.preprocess, raw.gland)
    image = np.zeros((*shape, len(data.modalities)), np.int16)
    faults: list[DataError] = []
    for channel, name in enumerate(data.modalities):
        if name in raw.images:
            with _collected(faults, name):
                _check_overlap(name, raw.images[name], reference)
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
    truth, truth_offset = _foreground_box(truth)
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


def _scaled(
    name: str,
    volume: Volume,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    config: PreprocessConfig,
) -> np.ndarray:
    """The int16 channel of one modality."""
    values, inside = resample(_smoothed(canonical(volume), affine), shape, affine, order=1)
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
    mean, sd = values[inside].mean(), values[inside].std()
    if not sd > 1e-6 * max(abs(mean), 1e-6):
        raise DataError(
            f"'{name}' must vary within the crop; got the constant {mean:g}. Check the file or "
            "leave out the case."
        )
    units = np.clip(np.rint((values - mean) / sd / STORED_UNIT), -_MAX_STORED, _MAX_STORED)
    return np.where(inside, units, 0).astype(np.int16)


def _smoothed(volume: Volume, affine: np.ndarray) -> Volume:
    """``volume`` low-passed for sampling at the coarser spacing of ``affine``, axis by axis."""
    ratio = np.divide(spacing_of(affine), volume.spacing_mm)
    sd = np.where(ratio > 1.01, (ratio - 1) / 2, 0)
    if not sd.any():
        return volume
    array = ndimage.gaussian_filter(volume.array.astype(np.float32), sd, mode="nearest")
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
    source = Volume(_classes(label.array, data), label.affine)
    sampling = data.preprocess.label_sampling
    truth = resample_label(source, reference.shape, reference.affine, sampling=sampling)
    if source.array.any() and not truth.any():
        raise DataError(
            f"the label's foreground must lie within the reference image; got {data.target} only "
            "outside it. Check the header of the label file."
        )
    on_grid = resample_label(canonical(source), shape, affine, sampling=sampling)
    if truth.any() and not _reaches_into(truth, reference.affine, shape, affine):
        raise DataError(
            f"the label's foreground must reach into the crop of {data.preprocess.size} voxels at "
            f"{data.preprocess.spacing_mm} mm around the image centre; got all of the "
            f"{data.target} outside. Enlarge --data.preprocess.size."
        )
    return on_grid, truth


def _classes(values: np.ndarray, data: DataConfig) -> np.ndarray:
    """uint8 classes of label values; the dtype of the file does not matter."""
    found = np.unique(values)
    num_classes = len(data.classes)
    highest = 255 if num_classes == 1 else num_classes
    bad = found[~np.isfinite(found) | (found != np.rint(found)) | (found < 0) | (found > highest)]
    if bad.size:
        raise DataError(
            f"label values must be whole numbers from 0 to {highest} for the target "
            f"'{data.target}'; got {', '.join(f'{v:g}' for v in bad[:3])}"
            f"{' and others' if bad.size > 3 else ''}. Correct the label file or choose another "
            "--data.target."
        )
    return (values > 0).astype(np.uint8) if num_classes == 1 else values.astype(np.uint8)


def _reaches_into(
    mask: np.ndarray, mask_affine: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray
) -> bool:
    """Whether the centre of any foreground voxel of ``mask`` lies within the grid."""
    matrix, offset = _index_transform(affine, mask_affine)
    return bool(_inside(shape, matrix, offset, np.nonzero(mask)).any())


def _foreground_box(mask: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """``mask`` cut to its foreground, and the index of the first voxel kept."""
    boxes = ndimage.find_objects((mask > 0).astype(np.uint8))
    if not boxes:
        return np.zeros((0, 0, 0), np.uint8), (0, 0, 0)
    d, h, w = boxes[0]
    return np.ascontiguousarray(mask[d, h, w]), (d.start, h.start, w.start)


def _index_transform(
    source_affine: np.ndarray, target_affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset that map an index ``d h w`` of the target grid to one of the source."""
    ijk = np.linalg.solve(np.asarray(source_affine, np.float64), target_affine)
    return ijk[2::-1, 2::-1], ijk[2::-1, 3]


def _inside(
    source_shape: tuple[int, int, int],
    matrix: np.ndarray,
    offset: np.ndarray,
    index: Sequence[np.ndarray],
) -> np.ndarray:
    """Which target indices (three arrays that broadcast) lie in the source's field of view."""
    d, h, w = index
    inside = np.ones(np.broadcast_shapes(d.shape, h.shape, w.shape), bool)
    for row, start, size in zip(matrix, offset, source_shape, strict=True):
        coordinate = (row[0] * d + start) + row[1] * h + row[2] * w
        inside &= (coordinate >= -0.5 - _TIE) & (coordinate <= size - 0.5 + _TIE)
    return inside


def _point(affine: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(x), 1) for x in affine[:3, 3])
