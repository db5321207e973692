"""Volumes between grids, by physical position: canonical axes, fields of view, resampling."""

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy

from data_pipelines.case import Volume

TIE = 1e-4  # voxels; ties of nearest-neighbour sampling all go one way, whatever the rounding


def canonical(volume: Volume) -> Volume:
    """The same voxels with axes reordered and flipped to be nearest to S, A, R (``d h w``).

    ``d`` then grows towards superior, ``h`` anterior and ``w`` right; obliqueness stays. No value
    is interpolated, so the same image stored in another orientation gives the same result.
    """
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

    shape = volume.array.shape[::-1]
    transform = ornt_transform(io_orientation(volume.affine), axcodes2ornt("RAS"))
    array = volume.array.T
    for axis, flip in enumerate(transform[:, 1]):
        if flip < 0:
            array = np.flip(array, axis)
    array = array.transpose(np.argsort(transform[:, 0]))
    return Volume(array.T, volume.affine @ inv_ornt_aff(transform, shape))


def coverage(shape: tuple[int, int, int], affine: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """Which of the points (``n 3``, millimetres) lie in the field of view of a grid: bool ``n``."""
    homogeneous = np.c_[points_mm, np.ones(len(points_mm))]
    ijk = np.linalg.solve(np.asarray(affine, np.float64), homogeneous.T)[:3]
    size = np.array(shape[::-1])[:, None]
    return ((ijk >= -0.5 - TIE) & (ijk <= size - 0.5 + TIE)).all(0)


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
    matrix, offset = index_transform(volume.affine, affine)
    array = volume.array if order == 0 else volume.array.astype(np.float32)
    if volume.shape == shape and np.allclose(np.c_[matrix, offset], np.eye(3, 4), atol=TIE):
        return array.copy(), np.ones(shape, bool)
    sampled = scipy.ndimage.affine_transform(
        array,
        matrix,
        (offset + (TIE if order == 0 else 0.0)).tolist(),
        output_shape=shape,
        order=order,
        mode="nearest",
    )
    inside = in_view(volume.shape, matrix, offset, np.ogrid[tuple(slice(n) for n in shape)])
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
    shift[:3, 3] = -TIE
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
    box, start = foreground_box(label.array)
    if box.size == 0:
        return Volume(box, label.affine), (slice(0, 0),) * 3, affine
    low = np.maximum(np.subtract(start, 1), 0)
    high = np.minimum(np.add(start, box.shape) + 1, label.shape)
    part = label.array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    corners = np.array(list(itertools.product(*zip(low - 1, high, strict=True))))
    matrix, offset = index_transform(affine, label.affine)
    reach = corners @ matrix.T + offset
    first = np.clip(np.floor(reach.min(0)).astype(int), 0, shape)
    last = np.clip(np.ceil(reach.max(0)).astype(int) + 1, first, shape)
    window = tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    return Volume(part, moved(label.affine, low)), window, moved(affine, first)


def moved(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The affine of the part of a grid that begins at an index ``d h w``."""
    result = np.array(affine, np.float64)
    result[:3, 3] += result[:3, :3] @ np.asarray(index)[::-1]
    return result


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
        matrix, offset = index_transform(source_affine, target_affine)
        if in_view(source_shape, matrix, offset, lattice).any():
            return True
    return False


def foreground_outside(
    mask: np.ndarray, mask_affine: np.ndarray, shape: tuple[int, int, int], affine: np.ndarray
) -> float:
    """Share of a mask's foreground whose voxel centres lie out of view of another grid."""
    index = np.nonzero(mask)
    if len(index[0]) == 0:
        return 0.0
    matrix, offset = index_transform(affine, mask_affine)
    return 1 - float(in_view(shape, matrix, offset, index).mean())


def parts_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected parts (26 neighbours), numbered from 1, and the voxels of each."""
    parts = np.zeros(mask.shape, np.int32)
    scipy.ndimage.label(mask > 0, np.ones((3, 3, 3)), output=parts)
    return parts, np.bincount(parts.ravel())[1:]


def foreground_box(mask: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """``mask`` cut to its foreground, and the index of the first voxel kept."""
    boxes = scipy.ndimage.find_objects((mask > 0).astype(np.uint8))
    if not boxes:
        return np.zeros((0, 0, 0), np.uint8), (0, 0, 0)
    d, h, w = boxes[0]
    return np.ascontiguousarray(mask[d, h, w]), (d.start, h.start, w.start)


def index_transform(
    source_affine: np.ndarray, target_affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset that map an index ``d h w`` of the target grid to one of the source."""
    ijk = np.linalg.solve(np.asarray(source_affine, np.float64), target_affine)
    return ijk[2::-1, 2::-1], ijk[2::-1, 3]


def in_view(
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
        inside &= (coordinate >= -0.5 - TIE) & (coordinate <= size - 0.5 + TIE)
    return inside
