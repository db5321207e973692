"""What one case is: modalities and targets, raw volumes with their geometry, the stored record.

A *raw case* is what a reader finds on disk: volumes on their own grids. A *case* is what the
builders store and the loaders return: every modality on one reference grid, scaled, with all that
is needed to bring a prediction back into the frame of the original T2W file.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

MODALITIES = ("t2w", "adc", "hbv")
"""The field's set: T2-weighted, apparent diffusion coefficient, high-b-value diffusion."""

TARGET_CLASSES: dict[str, tuple[str, ...]] = {
    "lesion": ("lesion",),
    "gland": ("gland",),
    "zones": ("pz", "tz"),
}
"""Foreground classes of each target, in label order: class ``i`` is stored as ``i + 1``."""

STORED_UNIT = 1 / 2048
"""Scaled intensities are stored as int16 multiples of this (range -16 to 16)."""


class DataError(ValueError):
    """A fault of the user's data; the message holds the rule, what came and the remedy.

    Attributes:
        file: the file at fault, where it is one file's fault.
        part: the modality at fault, or ``label`` or ``gland``.
    """

    file: Path | None = None
    part: str | None = None


class MissingDataError(DataError, FileNotFoundError):
    """A file or folder that must exist does not."""


class DataErrors(DataError):
    """Several faults at once, one a line of the message."""

    def __init__(self, errors: Sequence[DataError]):
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = tuple(errors)

    def __reduce__(self):
        return type(self), (self.errors,)


def raise_all(errors: Sequence[DataError]) -> None:
    """Raise nothing, the one error, or all of them as one."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise DataErrors(errors)


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
        label: uint8 ``d h w``, the target on the reference grid.
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
        return bool(self.truth.any())

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
class PreprocessConfig:
    """The reference grid and the intensity scaling. Saved with the data set and each checkpoint."""

    spacing_mm: tuple[float, float, float] = (3.0, 2.0, 2.0)
    """Voxel size of the reference grid in mm, d h w."""
    size: tuple[int, int, int] = (20, 48, 48)
    """Voxels of the reference grid, d h w."""
    centre: Literal["image", "gland"] = "image"
    """Centre of the reference grid: the T2W image's, or a gland mask's (needed to predict too)."""
    label_sampling: Literal["linear", "nearest"] = "linear"
    """How labels go between grids: the class of the largest linear weight, or the nearest voxel."""
    clip_percentiles: tuple[float, float] = (0.5, 99.5)
    """Intensities are clipped to these percentiles of the crop before they are scaled."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data are read, and how they are stored."""

    name: str = "phantom"
    """Builder: phantom, picai, prostate158, msd_prostate or nifti_folder."""
    path: Path | None = None
    """Where the user's files lie (not needed by the phantom)."""
    target: Literal["lesion", "gland", "zones"] = "lesion"
    """What is segmented."""
    modalities: tuple[str, ...] = MODALITIES
    """Contrasts to use, in channel order."""
    allow_missing: bool = False
    """Accept cases that lack a modality (they are marked absent) instead of refusing them."""
    reader: Literal[1, 2] = 1
    """Prostate158 only: whose labels are used."""
    num_cases: int = 100
    """Phantom only: number of patients to make."""
    seed: int = 0
    """Phantom only: which population to draw."""
    cache: Path = Path("~/.cache/cmsad_jax")
    """Where built data sets are kept; one folder per configuration."""
    preprocess: PreprocessConfig = PreprocessConfig()
    residency: Literal["auto", "device", "host"] = "auto"
    """Where training cases lie; auto: on an accelerator of which they fill less than a quarter."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes."""
        return TARGET_CLASSES[self.target]

    @property
    def num_classes(self) -> int:
        """Network outputs ``k``: 1 (sigmoid) for one class, else the classes and background."""
        return 1 if len(self.classes) == 1 else len(self.classes) + 1
