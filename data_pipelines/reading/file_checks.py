"""Does a file hold what its header declares? Asked before anything is allocated for it.

The readers of nibabel and SimpleITK believe the header: a flipped byte there makes them allocate
gigabytes, and in a compressed MHA file SimpleITK passes damaged voxels on without a word. So the
declared size is compared with the size of the file first, and a compressed stream is followed to
its end, where its checksum is.
"""

import gzip
import itertools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from data_pipelines.faults import DataError, MissingDataError

MAX_VOXELS = 2**26
"""Largest volume that is read: 1024 x 1024 x 64 voxels."""

MAX_BYTES = 2**28
"""Most bytes of voxels that one file may hold."""

_MAX_HEADER = 2**16
_MAX_NIFTI_OFFSET = 2**24
_DEFLATE_RATIO = 1032  # the most that deflate can pack into one byte
_CHUNK = 2**20

_METAIMAGE_BYTES = {
    "MET_CHAR": 1,
    "MET_UCHAR": 1,
    "MET_SHORT": 2,
    "MET_USHORT": 2,
    "MET_INT": 4,
    "MET_UINT": 4,
    "MET_LONG": 4,
    "MET_ULONG": 4,
    "MET_LONG_LONG": 8,
    "MET_ULONG_LONG": 8,
    "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}
_METAIMAGE_GEOMETRY = {
    ("TransformMatrix", "Rotation", "Orientation"): 2,
    ("Offset", "Position", "Origin"): 1,
    ("ElementSpacing", "ElementSize"): 1,
}
_NRRD_SPACES = {
    *("right-anterior-superior", "ras", "left-anterior-superior", "las"),
    *("left-posterior-superior", "lps"),
}
_NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char"), 1),
    **dict.fromkeys(("uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16"), 2),
    **dict.fromkeys(("int16_t", "ushort", "unsigned short", "unsigned short int"), 2),
    **dict.fromkeys(("uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int"), 4),
    **dict.fromkeys(("uint32", "uint32_t", "float"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long"), 8),
    **dict.fromkeys(("signed long long int", "int64", "int64_t", "ulonglong"), 8),
    **dict.fromkeys(("unsigned long long", "unsigned long long int", "uint64", "uint64_t"), 8),
    "double": 8,
}


def nifti_content(path: Path) -> tuple[type[nib.Nifti1Image], bytes]:
    """All bytes of a NIfTI file, decompressed and found complete, and the class that reads them.

    Raises:
        DataError: header and content do not fit together; the message names the file.
    """
    compressed = path.name.lower().endswith(".gz")
    size = path.stat().st_size
    with gzip.open(path) if compressed else path.open("rb") as stream:
        start = stream.read(4)
        header_size = {348: 348, 540: 540}.get(
            int.from_bytes(start, "little"), int.from_bytes(start, "big")
        )
        kinds = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
        if header_size not in kinds:
            raise _unreadable(path, "no NIfTI header")
        kind = kinds[header_size]
        start += stream.read(header_size - 4)
        header = kind.header_class(start, check=False)  # a check would mend zero spacings
        if bytes(header["magic"]).rstrip(b"\0")[:3] not in (b"n+1", b"n+2"):
            raise _unreadable(path, f"the magic {bytes(header['magic'])!r}")
        _check_nifti_place(path, header)
        voxel_bytes = header.get_data_dtype().itemsize
        offset = header.get_data_offset()
        expected = offset + _num_bytes(path, header.get_data_shape(), voxel_bytes)
        if not header_size <= offset <= _MAX_NIFTI_OFFSET:
            raise _unreadable(path, f"voxels that begin at byte {offset}")
        _check_size(path, expected, size, compressed=compressed)
        content = start + stream.read(expected - len(start) + 1)
    if len(content) != expected:
        more = "more" if len(content) > expected else len(content)
        raise _unreadable(path, f"{more} of the {expected} bytes that its header declares")
    return kind, content


def _check_nifti_place(path: Path, header: nib.Nifti1Header) -> None:
    """Whether the header says where the voxels lie, and one place only."""
    codes = int(header["sform_code"]), int(header["qform_code"])
    if min(codes) < 0 or not any(codes):
        raise _placeless(path, "sform or qform")
    pixdim = np.asarray(header["pixdim"], np.float64)[1:4]
    if not codes[0] and not (pixdim > 0).all():
        raise DataError(
            f"{path} must have a positive voxel size; got {pixdim.tolist()} mm. "
            "Repair the header of the file."
        )
    if np.isinf([header["scl_slope"], header["scl_inter"]]).any():
        raise _unreadable(path, f"the intensity scale {header['scl_slope']}")
    if not all(codes):
        return
    extent = np.subtract((*header.get_data_shape(), 1, 1, 1)[:3], 1)
    corners = np.array(list(itertools.product((0, 1), repeat=3))) * extent
    sform, qform = np.asarray(header.get_sform()), np.asarray(header.get_qform())
    apart = (sform - qform)[:3, :3] @ corners.T + (sform - qform)[:3, 3:]
    farthest = np.linalg.norm(apart, axis=0).max()
    if not farthest <= max(np.linalg.norm(sform[:3, :3], axis=0).min(), 1e-3):
        raise DataError(
            f"{path} must lie in one place; got an sform and a qform up to {farthest:.1f} mm apart"
            ". Set the code of the wrong one to 0."
        )


def check_metaimage(path: Path) -> None:
    """Raise ``DataError`` unless an MHA or MHD file holds what its header declares."""
    with path.open("rb") as file:
        start = file.read(_MAX_HEADER)
    fields: dict[str, str] = {}
    offset = 0
    while "ElementDataFile" not in fields:
        end = start.find(b"\n", offset)
        end = len(start) if end < 0 else end
        key, equals, value = start[offset:end].decode("latin-1").partition("=")
        if not equals:
            raise _unreadable(path, "no MetaImage header")
        fields[key.strip()] = value.strip()
        offset = end + 1
    shape = _integers(path, fields.get("DimSize", ""), "DimSize")
    if fields.get("NDims") != str(len(shape)):
        raise _unreadable(path, f"NDims {fields.get('NDims')} with DimSize {fields.get('DimSize')}")
    voxel_bytes = _METAIMAGE_BYTES.get(fields.get("ElementType", ""))
    if voxel_bytes is None or fields.get("BinaryData", "True").lower() != "true":
        raise _unreadable(path, f"voxels of type {fields.get('ElementType')}, or as text")
    channels = _integers(path, fields.get("ElementNumberOfChannels", "1"), "channels")
    for names, count in _METAIMAGE_GEOMETRY.items():
        given = [fields[name] for name in names if name in fields]
        if not given:
            raise _placeless(path, names[0])
        _numbers(path, given[0], names[0], len(shape) ** count)
    expected = _num_bytes(path, (*shape, *channels), voxel_bytes)
    data = path
    if fields["ElementDataFile"].upper() not in ("LOCAL", "LIST"):
        data, offset = _data_file(path, fields["ElementDataFile"]), 0
    elif fields["ElementDataFile"].upper() == "LIST":
        raise _unreadable(path, "a list of files")
    header_bytes = _integers(path, fields.get("HeaderSize", "0"), "HeaderSize", least=-1)[0]
    compressed = fields.get("CompressedData", "False").lower() == "true"
    if not compressed and fields.get("CompressedData", "False").lower() != "false":
        raise _unreadable(path, f"CompressedData {fields['CompressedData']!r:.60}")
    if header_bytes == -1 and not compressed:
        offset = max(data.stat().st_size - expected, 0)
    else:
        offset += max(header_bytes, 0)
    _check_voxels(path, data, offset, expected, compressed=compressed)


def check_nrrd(path: Path) -> None:
    """Raise ``DataError`` unless an NRRD file holds what its header declares."""
    with path.open("rb") as file:
        start = file.read(_MAX_HEADER)
    if not start.startswith(b"NRRD000"):
        raise _unreadable(path, "no NRRD header")
    ends = [(start.find(gap), len(gap)) for gap in (b"\n\n", b"\r\n\r\n") if gap in start]
    end, gap = min(ends) if ends else (len(start), 0)
    fields: dict[str, str] = {}
    for line in start[:end].decode("latin-1").splitlines()[1:]:
        key, colon, value = line.partition(":")
        if colon and not line.startswith("#"):
            fields[key.strip().lower()] = value.removeprefix("=").strip()
    shape = _integers(path, fields.get("sizes", ""), "sizes")
    if fields.get("dimension") != str(len(shape)):
        raise _unreadable(path, f"dimension {fields.get('dimension')} with {len(shape)} sizes")
    voxel_bytes = _NRRD_BYTES.get(fields.get("type", "").lower())
    encoding = fields.get("encoding", "").lower()
    if voxel_bytes is None or encoding not in ("raw", "gzip", "gz"):
        raise _unreadable(path, f"type {fields.get('type')!r} in encoding {encoding!r}")
    for skip in ("byte skip", "byteskip", "line skip", "lineskip"):
        if fields.get(skip, "0") != "0":
            raise _unreadable(path, f"a {skip} of {fields[skip]}")
    for name in ("space", "space directions", "space origin"):
        if name not in fields:
            raise _placeless(path, name)
    if fields["space"].lower() not in _NRRD_SPACES:
        raise _unreadable(path, f"the space {fields['space']!r:.60}")
    vectors = [v for v in fields["space directions"].split() if v != "none"]
    for text in (*vectors, fields["space origin"]):
        _numbers(path, text.strip("()").replace(",", " "), "space", 3)
    detached = fields.get("data file", fields.get("datafile"))
    data, offset = (path, end + gap) if detached is None else (_data_file(path, detached), 0)
    expected = _num_bytes(path, shape, voxel_bytes)
    _check_voxels(path, data, offset, expected, compressed=encoding != "raw")


def _num_bytes(path: Path, shape: Sequence[int], voxel_bytes: int) -> int:
    """Bytes of the voxels, if there are some and not too many."""
    shape = tuple(int(n) for n in shape)
    if not shape or min(shape) < 1 or voxel_bytes < 1:
        raise DataError(
            f"{path} must have at least one voxel along each axis; got the shape {shape}. "
            "Copy or convert the file again."
        )
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS or voxels * voxel_bytes > MAX_BYTES:
        raise DataError(
            f"{path} must hold at most {MAX_VOXELS} voxels in {MAX_BYTES >> 20} MiB; got the shape "
            f"{shape} at {voxel_bytes} bytes a voxel. Check its header, or crop or convert it."
        )
    return voxels * voxel_bytes


def _check_size(path: Path, expected: int, size: int, *, compressed: bool) -> None:
    """Whether ``size`` bytes of a file can hold ``expected`` bytes of content."""
    if expected > (size * _DEFLATE_RATIO + _CHUNK if compressed else size):
        raise _unreadable(path, f"{size} bytes for the {expected} that its header declares")


def _check_voxels(path: Path, data: Path, offset: int, expected: int, *, compressed: bool) -> None:
    """Whether ``data`` holds, from ``offset`` on, exactly the expected bytes."""
    size = max(data.stat().st_size - offset, 0)
    _check_size(path, expected, size, compressed=compressed)
    found = _deflated_size(data, offset, expected) if compressed else size
    if found != expected:
        raise _unreadable(path, f"{found} bytes for the {expected} that its header declares")


def _deflated_size(path: Path, offset: int, most: int) -> int:
    """Bytes in the zlib or gzip stream from ``offset`` on and after it; stops beyond ``most``."""
    stream = zlib.decompressobj(wbits=47)
    total = 0
    with path.open("rb") as file:
        file.seek(offset)
        while not stream.eof and total <= most:
            packed = stream.unconsumed_tail or file.read(_CHUNK)
            if not packed:
                raise EOFError("the compressed voxels end too early")
            total += len(stream.decompress(packed, _CHUNK))
        return total + len(stream.unused_data) + len(file.read(1))


def _data_file(path: Path, name: str) -> Path:
    """The file beside a header that holds its voxels."""
    data = path.parent / name
    if "%" in name or not name or not data.is_file():
        raise MissingDataError(
            f"{path} must name one file that holds its voxels; got {name!r}, which is not there. "
            "Copy that file as well, or convert both to one .mha or .nii.gz."
        )
    return data


def _integers(path: Path, text: str, name: str, *, least: int = 0) -> tuple[int, ...]:
    """Whole numbers in a header field."""
    words = text.split()
    if not words or len(words) > 8 or not all(w.lstrip("-").isdecimal() for w in words):
        raise _unreadable(path, f"{name} {text!r:.60}")
    numbers = tuple(int(word[:20]) for word in words)
    if min(numbers) < least:
        raise _unreadable(path, f"{name} {text!r:.60}")
    return numbers


def _numbers(path: Path, text: str, name: str, count: int) -> None:
    """Check that a header field holds so many finite numbers."""
    try:
        finite = [math.isfinite(float(word)) for word in text.split()]
    except ValueError:
        finite = []
    if len(finite) != count or not all(finite):
        raise _unreadable(path, f"{name} {text!r:.60}")


def _placeless(path: Path, name: str) -> DataError:
    return DataError(
        f"{path} must say where its voxels lie; got no {name} in its header. Convert the original "
        "images again."
    )


def _unreadable(path: Path, came: str) -> DataError:
    return DataError(
        f"{path} must be a readable image; got: {came}. Copy or convert the file again."
    )
