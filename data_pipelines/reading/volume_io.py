"""Read and write volumes: NIfTI through nibabel; MHA, MHD, NRRD and DICOM through SimpleITK.

Whatever the format, a volume comes out as ``Volume``: array ``d h w`` and an affine to RAS+
millimetres, as nibabel gives it. SimpleITK's LPS is turned into RAS here and nowhere else.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from data_pipelines.case import Volume, corners_apart, spacing_of
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.files import atomic_file
from data_pipelines.reading import dicom, file_checks, nifti

NIFTI_SUFFIXES = (".nii.gz", ".nii")
SEGMENTATION = ".seg.nrrd"
"""File name ending of a segmentation of 3D Slicer."""
SUFFIXES = (*NIFTI_SUFFIXES, ".mha", ".mhd", SEGMENTATION, ".nrrd")
"""File name endings that can be read, the longer ones first."""

_ONE_PLACE = 0.1  # of the smallest voxel side; sform and qform of a written file differ by less
_PLAUSIBLE_MM = (0.01, 200.0)
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def name_without_ending(name: str) -> str | None:
    """A file name without the ending of a volume; None if it has no such ending."""
    ending = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    return name[: -len(ending)] if ending else None


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie: ``shape`` is ``d h w``, ``affine`` as in ``Volume``."""

    shape: tuple[int, int, int]
    affine: np.ndarray


def read_volume(path: Path, channel: int | None = None) -> Volume:
    """Read a volume in the dtype of the file (NIfTI intensity scaling applied).

    Args:
        path: a file with one of ``SUFFIXES``, or a folder with one DICOM series.
        channel: which volume of a NIfTI file with four axes; None for files with three.

    Raises:
        MissingDataError: no such file.
        DataError: unreadable, not three-dimensional, not real numbers, not finite, or no usable
            geometry; the message names the file.
    """
    with _faults_named(path):
        grid, load = _open(path, channel)
        array = load()
        _check_values(path, array)
    return Volume(array, grid.affine)


def _check_values(path: Path, array: np.ndarray) -> None:
    if array.dtype.kind not in "buif":
        raise DataError(
            f"{path} must hold one real number a voxel; got {array.dtype}. "
            "Convert the file to one scalar image."
        )
    num_bad = int(array.size - np.isfinite(array).sum())
    if num_bad:
        raise DataError(
            f"{path} must hold finite values; got {num_bad} NaN or infinite voxels. "
            "Repair or leave out this file."
        )


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, *, case_id: str = "") -> None:
    """Write ``array`` (``d h w``, uint8 or float32) as NIfTI, whole or not at all.

    ``case_id`` (up to 79 bytes of it) goes into the header's ``descrip``, so that a file that was
    renamed still says whose it is.

    An affine with shear, which a qform cannot hold, is written as sform alone, lest the file lie in
    two places: ITK then refuses it as it refuses the file from which the affine was read.

    Loaded with nibabel the file has shape ``(w, h, d)`` and this affine (as float32, which is what
    the format holds), so it overlays the file from which the affine was read.
    """
    if array.dtype not in (np.uint8, np.float32):
        raise TypeError(f"array must be uint8 or float32; got {array.dtype}. Convert it first.")
    if not path.name.endswith(NIFTI_SUFFIXES):
        raise ValueError(f"path must end in .nii.gz or .nii; got {path.name}. Rename it.")
    image = nib.Nifti1Image(array.T, affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    apart = corners_apart(affine, image.get_qform(), array.shape)
    if apart > _ONE_PLACE * min(spacing_of(affine)):  # a qform cannot hold shear
        image.set_qform(None, code="unknown")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = case_id.encode()[:79]
    with atomic_file(path) as partial:
        nib.save(image, partial)


@contextlib.contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    """Whatever the readers raise on a broken file becomes a ``DataError`` that names it."""
    try:
        if path.is_symlink() and not path.exists():
            raise MissingDataError(
                f"{path} must be a file; got a link that leads nowhere. Fetch the file that it "
                "stands for (git annex get, datalad get), or copy it there."
            )
        if not path.exists():
            raise MissingDataError(f"no file at {path}. Check the path.")
        if path.is_dir() and path.name.lower().endswith(SUFFIXES):
            raise DataError(f"{path} must be a file; got a folder. Check the path.")
        if not path.is_dir() and not path.is_file():
            raise DataError(f"{path} must be a regular file; got a device or pipe. Check the path.")
        yield
    except DataError as error:
        error.file = path
        raise
    except Exception as error:  # hostile bytes make readers raise anything
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else type(error).__name__
        fault = DataError(
            f"{path} must be a readable image; got: {reason}. Copy or convert the file again."
        )
        fault.file = path
        raise fault from error


def _open(path: Path, channel: int | None) -> tuple[Grid, Callable[[], np.ndarray]]:
    """Read the header; the second result reads the voxels, as ``d h w``."""
    name = path.name.lower()
    if path.is_dir():
        shape, affine, load = dicom.open_series(path)
        return _checked_grid(path, shape, _LPS_TO_RAS @ affine), load
    if name.endswith(NIFTI_SUFFIXES):
        return _open_nifti(path, channel)
    if name.endswith(SUFFIXES):
        return _open_itk(path)
    raise DataError(f"volumes must be one of {', '.join(SUFFIXES)}; got {path}. Convert the file.")


def _open_nifti(path: Path, channel: int | None) -> tuple[Grid, Callable[[], np.ndarray]]:
    image, affine = nifti.open_image(path)
    shape = image.shape
    while len(shape) > (3 if channel is None else 4) and shape[-1] == 1:
        shape = shape[:-1]
    if channel is not None and (len(shape) != 4 or channel >= shape[3]):
        raise DataError(
            f"{path} must have a fourth axis with channel {channel}; got shape {shape}. "
            "Check that the file is of this data set."
        )
    unit = nifti.unit(image)
    grid = _checked_grid(path, shape if channel is None else shape[:3], affine, unit)

    def load() -> np.ndarray:
        if channel is None:
            return np.asanyarray(image.dataobj).reshape(shape).T
        return np.asanyarray(image.dataobj[..., channel]).T

    return grid, load


def _open_itk(path: Path) -> tuple[Grid, Callable[[], np.ndarray]]:
    if path.suffix.lower() == ".nrrd":
        file_checks.check_nrrd(path)
    else:
        file_checks.check_metaimage(path)
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    shape = reader.GetSize()
    if reader.GetNumberOfComponents() != 1:
        shape = (*shape, reader.GetNumberOfComponents())
    dimension = reader.GetDimension()
    affine = np.eye(4)
    if dimension == 3:
        direction = np.reshape(reader.GetDirection(), (3, 3))
        affine[:3, :3] = direction * reader.GetSpacing()
        affine[:3, 3] = reader.GetOrigin()
    grid = _checked_grid(path, shape, _LPS_TO_RAS @ affine)
    return grid, lambda: sitk.GetArrayFromImage(reader.Execute())


def _checked_grid(
    path: Path, shape: Sequence[int], affine: np.ndarray, unit: str = "millimetre"
) -> Grid:
    """The grid of a file that lists its axes as ``(i, j, k)``, if it is a usable one."""
    if len(shape) != 3:
        raise DataError(
            f"{path} must be three-dimensional; got shape {tuple(shape)}. Convert it to one volume."
        )
    affine = np.asarray(affine, np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (lengths > 0).all():
        raise DataError(
            f"{path} must have a positive voxel size; got {lengths.tolist()} mm. "
            "Repair the header of the file."
        )
    low, high = _PLAUSIBLE_MM
    if not (lengths >= low).all() or not (lengths <= high).all():
        raise DataError(
            f"{path} must have voxels of {low:g} to {high:g} mm; got "
            f"{', '.join(f'{n:.3g}' for n in lengths)} mm from a header whose unit is the {unit}. "
            "Correct the spacing or the unit (xyzt_units) in the header."
        )
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise DataError(
            f"{path} must have three independent axes; got the affine {affine[:3, :3].tolist()}. "
            "Repair the header of the file."
        )
    i, j, k = (int(n) for n in shape)
    return Grid((k, j, i), affine)
