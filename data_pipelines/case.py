"""What one case is: raw volumes with their geometry, and the stored record.

A *raw case* is what a reader finds on disk: volumes on their own grids. A *case* is what the
builders store and the loaders return: every modality on one reference grid, scaled, with all that
is needed to bring a prediction back into the frame of the original T2W file.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.targets import foreground

STORED_UNIT = 1 / 2048
"""Scaled intensities are stored as int16 multiples of this (range -16 to 16)."""


@dataclasses.dataclass(frozen=True)
class Volume:
    """A voxel array and where it lies in the patient.

    Attributes:
        array: ``d h w``, that is NIfTI's ``(i, j, k)`` array transposed: ``array[k, j, i]``.
        affine: 4 x 4 float64, NIfTI's: maps the voxel index ``(i, j, k, 1)`` to millimetres in
            RAS+ (x grows towards the patient's right, y anterior, z superior).
    """

    array: np.ndarray
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels, ``d h w``."""
        d, h, w = self.array.shape
        return d, h, w

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in millimetres, ``d h w``."""
        return spacing_of(self.affine)


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in millimetres in ``d h w`` order of a NIfTI affine."""
    i, j, k = np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)
    return float(k), float(j), float(i)


def corners_apart(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance between the places that two affines give a corner voxel of ``d h w``."""
    extent = np.subtract(shape, 1)[::-1]
    corners = np.array(list(itertools.product((0, 1), repeat=3))) * extent
    difference = np.asarray(affine, np.float64) - other
    apart = difference[:3, :3] @ corners.T + difference[:3, 3:]
    return float(np.linalg.norm(apart, axis=0).max())


@dataclasses.dataclass(frozen=True)
class RawCase:
    """One study as it lies on disk.

    Attributes:
        case_id: unique name of the study; becomes file names, so letters, digits, ``._-`` only.
        patient_id: who was imaged; folds never separate the cases of one patient.
        images: modality name to volume, each on its own grid; an absent modality has no key.
        label: classes on a grid of its own, or None where no label is asked for.
        metadata: further facts worth keeping (centre, grade), as text.
        gland: a mask of the gland on a grid of its own, for a crop around it.
    """

    case_id: str
    patient_id: str
    images: Mapping[str, Volume]
    label: Volume | None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gland: Volume | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One study on the reference grid, as stored.

    Attributes:
        image: int16 ``d h w m``, scaled intensities in multiples of ``STORED_UNIT``; an absent
            modality and voxels outside a modality's field of view are 0.
        label: uint8 ``d h w``, the parts of the target on the reference grid, and ``IGNORED``.
        present: bool ``m``.
        affine: 4 x 4 float64 of the reference grid.
        original_shape, original_affine: grid of the original T2W file, into which predictions go.
        truth: uint8, the label on the original T2W grid, cut to its foreground's bounding box
            (shape ``(0, 0, 0)`` if there is no foreground).
        truth_offset: ``d h w`` index of the first voxel of ``truth`` in the original grid.
    """

    case_id: str
    patient_id: str
    image: np.ndarray
    label: np.ndarray
    present: np.ndarray
    affine: np.ndarray
    original_shape: tuple[int, int, int]
    original_affine: np.ndarray
    truth: np.ndarray
    truth_offset: tuple[int, int, int]

    @property
    def positive(self) -> bool:
        """Whether the original label holds any foreground."""
        return bool(foreground(self.truth).any())

    @property
    def original_truth(self) -> np.ndarray:
        """uint8 ``d h w``: the label on the whole original T2W grid."""
        full = np.zeros(self.original_shape, np.uint8)
        corner = tuple(
            slice(start, start + size)
            for start, size in zip(self.truth_offset, self.truth.shape, strict=True)
        )
        full[corner] = self.truth
        return full


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What one image of a case is like as its file has it, before anything is scaled.

    Attributes:
        spacing_mm: voxel size along its canonical axes, ``d h w``.
        intensity: 0.5th, 50th and 99.5th percentile of the voxels above 0 in its middle.
    """

    spacing_mm: tuple[float, float, float]
    intensity: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class CaseInfo:
    """What the folds must know of a case.

    Attributes:
        case_id: unique name of the study.
        patient_id: who was imaged.
        positive: whether the label holds any foreground.
        metadata: further facts, such as PI-CAI's ``center``.
        images: what the image of each modality is like; empty where that was not measured.
    """

    case_id: str
    patient_id: str
    positive: bool
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    images: Mapping[str, ImageFacts] = dataclasses.field(default_factory=dict, compare=False)
