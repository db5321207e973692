"""A folder with one DICOM series as a volume, through SimpleITK.

Every file is read by itself and checked by its own elements: what would be stacked wrongly is
refused. That is several series in a folder, several images at one position (as in diffusion series
with several b-values), missing slices, slices of another size, spacing or direction, files that are
no whole image, and enhanced multi-frame files. Converters that know these cases exist; their output
is read.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.reading.dicom_elements import PIXELS, Elements
from data_pipelines.reading.file_checks import MAX_VOXELS

CONVERTER = "Convert the series with dcm2niix and give the file of the image that is meant"

OTHER_FILES = (".txt", ".md", ".csv", ".json", ".xml", ".html", ".pdf", ".log", ".ini", ".db")
"""Endings of what may lie beside the slices, besides DICOMDIR and hidden files."""

_ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
_SPACING_TOLERANCE = 0.02  # of the slice distance
_SAME_DIRECTION = 1e-3  # of a unit vector
_SAME_SPACING = 1e-3  # of itself


def open_series(
    folder: Path,
) -> tuple[tuple[int, int, int], np.ndarray, Callable[[], np.ndarray]]:
    """Shape (``i j k``), affine to LPS+ millimetres, and a function that reads ``d h w``.

    Raises:
        MissingDataError: no DICOM series in the folder.
        DataError: not one series of single-frame images at even distances, all of one kind.
    """
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise MissingDataError(
            f"{folder} must hold one DICOM series; got no DICOM image. Check the path."
        )
    if len(series) > 1:
        raise DataError(
            f"{folder} must hold one DICOM series; got {len(series)}: {', '.join(series[:3])}. "
            "Keep the files of one series in it."
        )
    files = [Path(file) for file in reader.GetGDCMSeriesFileNames(str(folder), series[0])]
    _check_all_used(folder, files)
    elements = [Elements(file) for file in files]
    for slice_elements in elements:
        _check_single_frame(folder, slice_elements)
        _check_pixels(folder, slice_elements, len(files))
    _check_alike(folder, elements)
    readers = [_slice_reader(file) for file in files]
    for file, slice_reader in zip(files, readers, strict=True):
        if slice_reader.GetNumberOfComponents() != 1:
            raise DataError(
                f"{folder} must hold grey-level images; got {slice_reader.GetNumberOfComponents()} "
                f"values a voxel in {file.name}. {CONVERTER}."
            )
    positions = [_position(e, r) for e, r in zip(elements, readers, strict=True)]
    _check_positions(folder, np.array(positions), elements[0])
    affine = np.eye(4)
    direction = np.reshape(readers[0].GetDirection(), (3, 3))
    affine[:3, :3] = direction * readers[0].GetSpacing()
    affine[:3, 3] = positions[0]
    if len(files) > 1:
        affine[:3, 2] = np.subtract(positions[-1], positions[0]) / (len(files) - 1)
    columns, rows = readers[0].GetSize()[:2]
    return (columns, rows, len(files)), affine, lambda: _stacked(files)


def _slice_reader(file: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    return reader


def _stacked(files: Sequence[Path]) -> np.ndarray:
    """The slices, each rescaled by its own slope and intercept, in a type that holds them all."""
    slices = [sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files]
    slices = [array[0] if array.ndim == 3 else array for array in slices]
    return np.stack(slices)  # in NumPy's common type


def _check_all_used(folder: Path, files: Sequence[Path]) -> None:
    """Whether each file of the folder is a slice, or surely none."""
    used = {file.name for file in files}
    for path in sorted(folder.iterdir()):
        other = path.suffix.lower() in OTHER_FILES or path.name == "DICOMDIR"
        if path.name in used or path.name.startswith(".") or other:
            continue
        came = "a folder" if path.is_dir() else f"{path.stat().st_size} bytes that are no image"
        raise DataError(
            f"{folder} must hold nothing but the slices of one DICOM series; got {path.name} "
            f"({came}) beside {len(files)} slices. Copy that file again if it is a slice, or "
            "remove it."
        )


def _check_single_frame(folder: Path, elements: Elements) -> None:
    frames = elements.text(0x00280008) or "1"
    if elements.text(0x00080016) == _ENHANCED_MR or frames != "1":
        raise DataError(
            f"{folder} must hold a DICOM series of single images; got the multi-frame file "
            f"{elements.path.name} ({frames} frames), as enhanced MR stores several b-values in "
            f"one file. {CONVERTER}."
        )
    if elements.text(0x00280004) == "MONOCHROME1":
        raise DataError(
            f"{folder} must hold images in which larger values are brighter; got MONOCHROME1 in "
            f"{elements.path.name}, which runs the other way. {CONVERTER}."
        )
    samples = elements.number(0x00280002) or 1
    if samples != 1:
        raise DataError(
            f"{folder} must hold grey-level images; got {samples} values a voxel in "
            f"{elements.path.name}. {CONVERTER}."
        )


def _check_pixels(folder: Path, elements: Elements, num_files: int) -> None:
    """Whether a file holds the pixels that it declares, and all together are not too many."""
    rows, columns = elements.number(0x00280010) or 0, elements.number(0x00280011) or 0
    pixel_bytes = ((elements.number(0x00280100) or 0) + 7) // 8
    if not rows or not columns or not pixel_bytes or PIXELS not in elements.values:
        raise DataError(
            f"{folder} must hold whole slices; got {elements.path.name} without pixels ({rows} "
            f"rows, {columns} columns). Copy that file again."
        )
    voxels = rows * columns * num_files
    if voxels > MAX_VOXELS:
        raise DataError(
            f"{folder} must hold at most {MAX_VOXELS} voxels; got {rows} x "
            f"{columns} in {num_files} files. Check their headers, or crop the series."
        )
    slope = elements.decimals(0x00281053, 1)
    if slope is not None and not (np.isfinite(slope[0]) and slope[0] != 0):
        raise DataError(
            f"{folder} must hold slices whose rescaling keeps their values; got the slope "
            f"{slope[0]:g} in {elements.path.name}. {CONVERTER}."
        )
    elements.decimals(0x00281052, 1)
    expected = rows * columns * pixel_bytes
    there = elements.num_pixel_bytes
    if there is not None and not expected <= there <= expected + expected % 2:
        raise DataError(
            f"{folder} must hold whole slices; got {there} bytes of pixels in "
            f"{elements.path.name} for {rows} x {columns} of {pixel_bytes} bytes. Copy that file "
            "again."
        )


def _check_alike(folder: Path, elements: Sequence[Elements]) -> None:
    """Whether all slices have the size, spacing and direction of the first."""
    first = elements[0]
    for other in elements[1:]:
        for name, tags in (("size", (0x00280010, 0x00280011)), ("bits", (0x00280100,))):
            values = [tuple(e.number(tag) for tag in tags) for e in (first, other)]
            if values[0] != values[1]:
                raise _unlike(folder, name, first, other, values)
        for name, tag, count, tolerance in (
            ("PixelSpacing", 0x00280030, 2, _SAME_SPACING),
            ("ImageOrientationPatient", 0x00200037, 6, _SAME_DIRECTION),
        ):
            ours, theirs = first.decimals(tag, count), other.decimals(tag, count)
            if ours is None and theirs is None:
                continue
            if ours is None or theirs is None:
                raise _unlike(folder, name, first, other, (ours, theirs))
            scale = max(ours) if name == "PixelSpacing" else 1.0
            if np.abs(np.subtract(ours, theirs)).max() > tolerance * scale:
                raise _unlike(folder, name, first, other, (ours, theirs))


def _unlike(
    folder: Path, name: str, first: Elements, other: Elements, values: Sequence[object]
) -> DataError:
    return DataError(
        f"{folder} must hold slices of one size, spacing and direction; got another {name} in "
        f"{other.path.name} than in {first.path.name}: {values[1]} and {values[0]}. {CONVERTER}."
    )


def _check_positions(folder: Path, positions: np.ndarray, first: Elements) -> None:
    """Whether the slices, in the order in which they are stacked, lie at even distances."""
    steps = np.diff(positions, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    if len(steps) == 0:
        return
    longest = lengths.max()
    repeated = len(positions) - len(np.unique(positions.round(3), axis=0))
    if repeated:
        raise DataError(
            f"{folder} must hold one image for each slice position; got {repeated} more, as "
            f"diffusion series with several b-values have. {CONVERTER}."
        )
    if (np.linalg.norm(steps - steps.mean(0), axis=1) > _SPACING_TOLERANCE * longest).any():
        raise DataError(
            f"{folder} must hold slices at even distances; got distances from {lengths.min():.3f} "
            f"to {longest:.3f} mm. Add the missing slices, or convert the series with dcm2niix."
        )
    (declared,) = first.decimals(0x00180088, 1) or (0.0,)
    times = lengths.mean() / declared if declared > 0 else 1.0
    if round(times) > 1 and abs(times - round(times)) < _SPACING_TOLERANCE * round(times):
        raise DataError(
            f"{folder} must hold every slice of its series; got slices {lengths.mean():.3f} mm "
            f"apart where SpacingBetweenSlices says {declared:g} mm, so that "
            f"{round(times) - 1} of {round(times)} seem to be missing. Add the missing slices."
        )


def _position(elements: Elements, reader: sitk.ImageFileReader) -> Sequence[float]:
    """Where the first voxel lies; SimpleITK's origin of a slice that does not say it."""
    return elements.decimals(0x00200032, 3) or reader.GetOrigin()
