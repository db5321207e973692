"""A case as the second network of a cascade sees it, and where what it says there counts."""

import dataclasses
import zlib
from typing import NamedTuple

import numpy as np

from data_pipelines.case import STORED_UNIT, Case, Volume, spacing_of

FOUND = 0.5
"""Probability above which a voxel is of what the first network finds."""


class Found(NamedTuple):
    """What a first network found in a case, brought to the grid of the second.

    Attributes:
        corner: ``d h w`` index of the first voxel of the box.
        size: of the box, ``d h w`` voxels.
        probability: within the box, compressed int16 in multiples of ``STORED_UNIT``.
        remark: what makes the box doubtful, in words; empty where nothing does.
    """

    corner: tuple[int, int, int]
    size: tuple[int, int, int]
    probability: bytes
    remark: str

    def cut(self, case: Case) -> Case:
        """The box of the case on the second's grid, with the probability as last channel."""
        from data_pipelines.preparing import geometry  # slow to load, and not needed for --help

        box = tuple(slice(n, n + size) for n, size in zip(self.corner, self.size, strict=True))
        prior = np.frombuffer(zlib.decompress(self.probability), np.int16).reshape(*self.size, 1)
        return dataclasses.replace(
            case,
            image=np.concatenate([case.image[box], prior], -1),
            label=case.label[box],
            affine=geometry.moved(case.affine, np.array(self.corner)),
        )


def box_around(probability: np.ndarray, first: Case, case: Case, size: tuple[int, ...]) -> Found:
    """Where a box of ``size`` lies in ``case``: around the largest part that was found.

    The box is centred on that part's extent and lies within the grid. Where nothing was found it is
    the middle of the grid.

    Args:
        probability: ``d h w k`` of the first network.
        first: the case on the first's grid.
        case: the same on the second's.
        size: ``d h w`` voxels of the second's grid, at most all of them.
    """
    from data_pipelines.preparing import geometry  # slow to load, and not needed for --help

    foreground = probability[..., 0] if probability.shape[-1] == 1 else 1 - probability[..., 0]
    d, h, w = case.label.shape
    prior, _ = geometry.resample(Volume(foreground, first.affine), (d, h, w), case.affine, order=1)
    parts, voxels = geometry.parts_of(prior > FOUND)
    middle, remark = np.array([d, h, w]) / 2, ""
    if voxels.size:
        extent, start = geometry.foreground_box(parts == 1 + int(voxels.argmax()))
        middle = np.array(start) + np.array(extent.shape) / 2
        if any(n > most for n, most in zip(extent.shape, size, strict=True)):
            remark = (
                "what the first network of the cascade found is larger than the box: "
                f"{_times(extent.shape)} voxels in one of {_times(size)}"
            )
    else:
        remark = "the first network of the cascade found nothing: the box is the middle of the grid"
    last = np.subtract([d, h, w], size)
    z, y, x = (int(n) for n in np.clip(np.round(middle - np.array(size) / 2), 0, last))
    depth, height, width = (int(n) for n in size)
    box = prior[z : z + depth, y : y + height, x : x + width]
    stored = np.round(box / STORED_UNIT).astype(np.int16)
    kept = zlib.compress(stored.tobytes(), 1)
    return Found((z, y, x), (depth, height, width), kept, remark)


def beyond_margin(cut: Case, margin_mm: float) -> np.ndarray:
    """Voxels ``d h w`` of a box that are more than ``margin_mm`` from what was found in it.

    Found is the largest part; distances are Euclidean, from the middles of voxels. Where nothing
    was found, no voxel is beyond.

    Args:
        cut: as ``Found.cut`` gives it.
        margin_mm: 0 keeps the part alone.
    """
    import scipy.ndimage  # slow to load, and not needed for --help

    from data_pipelines.preparing import geometry

    parts, voxels = geometry.parts_of(cut.image[..., -1] > FOUND / STORED_UNIT)
    if not voxels.size:
        return np.zeros(parts.shape, bool)
    outside = parts != 1 + voxels.argmax()
    distance = scipy.ndimage.distance_transform_edt(outside, sampling=spacing_of(cut.affine))
    return np.asarray(distance) > margin_mm


def as_background(probability: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Probabilities ``d h w k`` that are those of background alone in some places ``d h w``.

    That is 0 for ``k = 1``, and the first of several classes.
    """
    background = np.zeros(probability.shape[-1], probability.dtype)
    background[0] = probability.shape[-1] > 1
    return np.where(where[..., None], background, probability)


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
