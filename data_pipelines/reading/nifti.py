"""NIfTI files, checked before anything is allocated for them, and where their voxels lie.

What nibabel refuses or reads in its own way although the format is clear is put right here in a
copy of the header: lengths in metres or microns, a quaternion longer than 1, a handedness of 0.
"""

import gzip
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from data_pipelines.case import corners_apart
from data_pipelines.faults import DataError
from data_pipelines.reading.file_checks import (
    MAX_PADDING,
    check_padding,
    check_size,
    num_bytes,
    placeless,
    unreadable,
)

_MAX_OFFSET = 2**24
_UNITS = {1: ("metre", 1e3), 3: ("micron", 1e-3)}
_UNIT_BITS = 0b111
_LAST_CODE = 5
"""Of the codes that say how an sform or qform is meant. nibabel drops the form of a higher one when
it reads the voxels, and other readers take it: it counts as none."""
_QUATERNION_TOLERANCE = 0.01
_ROUNDING = 3 * np.finfo(np.float32).eps  # of a squared length, as in nibabel


def open_image(path: Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """The image of a file found complete, and its affine to RAS+ millimetres.

    Raises:
        DataError: header and content do not fit together; the message names the file.
    """
    kind, content = _content(path)
    image = kind.from_bytes(content)
    affine = np.array(image.affine, np.float64)
    affine[:3] *= _millimetres(image.header)
    return image, affine


def unit(image: nib.Nifti1Image) -> str:
    """In what the header gives lengths."""
    return _UNITS.get(int(image.header["xyzt_units"]) & _UNIT_BITS, ("millimetre", 1))[0]


def _millimetres(header: nib.Nifti1Header) -> float:
    """Millimetres in the unit of the header; unknown units are millimetres."""
    return _UNITS.get(int(header["xyzt_units"]) & _UNIT_BITS, ("", 1.0))[1]


def _content(path: Path) -> tuple[type[nib.Nifti1Image], bytes]:
    """All bytes of header and voxels, and the class that reads them."""
    compressed = path.name.lower().endswith(".gz")
    size = path.stat().st_size
    with gzip.open(path) if compressed else path.open("rb") as stream:
        start = stream.read(4)
        header_size = {348: 348, 540: 540}.get(
            int.from_bytes(start, "little"), int.from_bytes(start, "big")
        )
        kinds = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
        if header_size not in kinds:
            raise unreadable(path, "no NIfTI header")
        kind = kinds[header_size]
        start += stream.read(header_size - 4)
        header = kind.header_class(start, check=False)  # a check would mend zero spacings
        if bytes(header["magic"]).rstrip(b"\0")[:3] not in (b"n+1", b"n+2"):
            raise unreadable(path, f"the magic {bytes(header['magic'])!r}")
        _mend(path, header)
        _check_place(path, header)
        shape = header.get_data_shape()
        offset = header.get_data_offset()
        num = num_bytes(path, shape, header.get_data_dtype().itemsize)
        if not header_size <= offset <= _MAX_OFFSET:
            raise unreadable(path, f"voxels that begin at byte {offset}")
        expected = offset + num
        check_size(path, expected, size, compressed=compressed)
        content = header.binaryblock + stream.read(expected - header_size)
        if len(content) < expected:
            raise unreadable(
                path, f"{len(content)} of the {expected} bytes that its header declares"
            )
        check_padding(path, _rest(stream), num, shape)
    return kind, content


def _rest(stream: BinaryIO | gzip.GzipFile) -> bytes:
    """What follows the voxels: to the end, where gzip's checksum is, or beyond what is allowed."""
    return stream.read(MAX_PADDING + 1)


def _mend(path: Path, header: nib.Nifti1Header) -> None:
    """Set what readers of the format agree on and nibabel does not."""
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1
    for name in ("sform_code", "qform_code"):
        if int(header[name]) > _LAST_CODE:
            header[name] = 0
    if int(header["qform_code"]) <= 0:
        return
    names = ("quatern_b", "quatern_c", "quatern_d")
    vector = np.array([header[name] for name in names], np.float64)
    length = np.linalg.norm(vector)
    if length**2 <= 1 + _ROUNDING:
        return
    if int(header["sform_code"]) > 0:  # which nibabel and ITK take then
        header["qform_code"] = 0
    elif not length <= 1 + _QUATERNION_TOLERANCE:
        raise unreadable(path, f"a qform whose quaternion has the length {length:g}")
    else:
        for name, value in zip(names, vector / length * (1 - 1e-7), strict=True):
            header[name] = value


def _check_place(path: Path, header: nib.Nifti1Header) -> None:
    """Whether the header says where the voxels lie, and one place only."""
    codes = int(header["sform_code"]), int(header["qform_code"])
    if min(codes) < 0 or not any(codes):
        raise placeless(path, "sform or qform")
    pixdim = np.asarray(header["pixdim"], np.float64)[1:4]
    if not codes[0] and not (pixdim > 0).all():
        raise DataError(
            f"{path} must have a positive voxel size; got {pixdim.tolist()} mm. "
            "Repair the header of the file."
        )
    if np.isinf([header["scl_slope"], header["scl_inter"]]).any():
        raise unreadable(path, f"the intensity scale {header['scl_slope']}")
    if not all(codes):
        return
    sform, qform = np.asarray(header.get_sform()), np.asarray(header.get_qform())
    apart = corners_apart(sform, qform, (*header.get_data_shape(), 1, 1, 1)[2::-1])
    if not apart <= max(np.linalg.norm(sform[:3, :3], axis=0).min(), 1e-3):
        raise DataError(
            f"{path} must lie in one place; got an sform and a qform up to "
            f"{apart * _millimetres(header):.1f} mm apart. Set the code of the wrong one to 0."
        )
