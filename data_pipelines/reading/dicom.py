"""A folder with one DICOM series as a volume, through SimpleITK.

What would be stacked wrongly is refused: several series in a folder, several images at one
position (as in diffusion series with several b-values), missing slices, and enhanced multi-frame
files. Converters that know these cases exist; their output is read.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from data_pipelines.faults import DataError, MissingDataError

CONVERTER = "Convert the series with dcm2niix and give the file of the image that is meant"

_ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
_SPACING_TOLERANCE = 0.02  # of the slice distance


def open_series(
    folder: Path,
) -> tuple[tuple[int, int, int], np.ndarray, Callable[[], np.ndarray]]:
    """Shape (``i j k``), affine to LPS+ millimetres, and a function that reads ``d h w``.

    Raises:
        MissingDataError: no DICOM series in the folder.
        DataError: not one series of single-frame images at even distances.
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
    files = reader.GetGDCMSeriesFileNames(str(folder), series[0])
    positions = []
    for file in files:
        slice_reader = sitk.ImageFileReader()
        slice_reader.SetFileName(file)
        slice_reader.ReadImageInformation()
        _check_single_frame(folder, Path(file), slice_reader)
        positions.append(_position(slice_reader))
    _check_positions(folder, np.array(positions))
    reader.SetFileNames(files)
    first = sitk.ImageFileReader()
    first.SetFileName(files[0])
    first.ReadImageInformation()
    affine = np.eye(4)
    direction = np.reshape(first.GetDirection(), (3, 3))
    affine[:3, :3] = direction * first.GetSpacing()
    affine[:3, 3] = positions[0]
    if len(files) > 1:
        affine[:3, 2] = np.subtract(positions[-1], positions[0]) / (len(files) - 1)
    columns, rows = first.GetSize()[:2]
    return (columns, rows, len(files)), affine, lambda: sitk.GetArrayFromImage(reader.Execute())


def _check_single_frame(folder: Path, file: Path, reader: sitk.ImageFileReader) -> None:
    sop_class = _tag(reader, "0008|0016")
    frames = _tag(reader, "0028|0008") or "1"
    size = reader.GetSize()
    if sop_class == _ENHANCED_MR or frames != "1" or (len(size) > 2 and size[2] > 1):
        raise DataError(
            f"{folder} must hold a DICOM series of single images; got the multi-frame file "
            f"{file.name} ({frames} frames), as enhanced MR stores several b-values in one file. "
            f"{CONVERTER}."
        )
    if reader.GetNumberOfComponents() != 1:
        raise DataError(
            f"{folder} must hold grey-level images; got {reader.GetNumberOfComponents()} values a "
            f"voxel in {file.name}. {CONVERTER}."
        )


def _check_positions(folder: Path, positions: np.ndarray) -> None:
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


def _position(reader: sitk.ImageFileReader) -> Sequence[float]:
    """Where the first voxel lies; SimpleITK's origin of a single slice."""
    text = _tag(reader, "0020|0032")
    if text:
        return [float(number) for number in text.split("\\")]
    return reader.GetOrigin()


def _tag(reader: sitk.ImageFileReader, name: str) -> str:
    return reader.GetMetaData(name).strip().rstrip("\0") if reader.HasMetaDataKey(name) else ""
