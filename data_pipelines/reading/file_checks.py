"""Does a file hold what its header declares? Asked before anything is allocated for it.

The readers of nibabel and SimpleITK believe the header: a flipped byte there makes them allocate
gigabytes, and in a compressed MHA file SimpleITK passes damaged voxels on without a word. So the
declared size is compared with the size of the file first, and a compressed stream is followed to
its end, where its checksum is.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.faults import DataError, MissingDataError

MAX_VOXELS = 2**25
"""Largest volume that is read: 1024 x 1024 x 32 voxels."""

MAX_BYTES = 2**27
"""Most bytes of voxels that one file may hold."""

MAX_PADDING = 2**16
"""Most bytes that may follow the voxels."""

_MAX_HEADER = 2**16
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


def check_metaimage(path: Path) -> None:
    """Raise ``DataError`` unless an MHA or MHD file holds what its header declares."""
    fields, offset = _metaimage_fields(path)
    shape = _integers(path, fields.get("DimSize", ""), "DimSize")
    if fields.get("NDims") != str(len(shape)):
        raise unreadable(path, f"NDims {fields.get('NDims')} with DimSize {fields.get('DimSize')}")
    voxel_bytes = _METAIMAGE_BYTES.get(fields.get("ElementType", ""))
    if voxel_bytes is None or fields.get("BinaryData", "True").lower() != "true":
        raise unreadable(path, f"voxels of type {fields.get('ElementType')}, or as text")
    channels = _integers(path, fields.get("ElementNumberOfChannels", "1"), "channels")
    for names, count in _METAIMAGE_GEOMETRY.items():
        given = [fields[name] for name in names if name in fields]
        if not given:
            raise placeless(path, names[0])
        _numbers(path, given[0], names[0], len(shape) ** count)
    _check_unit(path, fields.get("DistanceUnits", "mm"), "DistanceUnits")
    expected = num_bytes(path, (*shape, *channels), voxel_bytes)
    data = path
    if fields["ElementDataFile"].upper() not in ("LOCAL", "LIST"):
        data, offset = _data_file(path, fields["ElementDataFile"]), 0
    elif fields["ElementDataFile"].upper() == "LIST":
        raise unreadable(path, "a list of files")
    header_bytes = _integers(path, fields.get("HeaderSize", "0"), "HeaderSize", least=-1)[0]
    compressed = fields.get("CompressedData", "False").lower() == "true"
    if not compressed and fields.get("CompressedData", "False").lower() != "false":
        raise unreadable(path, f"CompressedData {fields['CompressedData']!r:.60}")
    if header_bytes == -1 and not compressed:
        offset = max(data.stat().st_size - expected, 0)
    else:
        offset += max(header_bytes, 0)
    _check_voxels(path, data, offset, expected, shape, compressed=compressed)
    packed = fields.get("CompressedDataSize")
    if compressed and packed is not None:
        there = data.stat().st_size - offset
        if _integers(path, packed, "CompressedDataSize")[0] != there:
            raise unreadable(path, f"CompressedDataSize {packed} for the {there} bytes there are")


def _metaimage_fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields of a MetaImage header, and where it ends."""
    with path.open("rb") as file:
        start = file.read(_MAX_HEADER)
    fields: dict[str, str] = {}
    offset = 0
    while "ElementDataFile" not in fields:
        end = start.find(b"\n", offset)
        end = len(start) if end < 0 else end
        key, equals, value = start[offset:end].decode("latin-1").partition("=")
        if not equals:
            raise unreadable(path, "no MetaImage header")
        if key.strip() in fields:
            raise unreadable(path, f"the field {key.strip()!r:.60} twice in its header")
        fields[key.strip()] = value.strip()
        offset = end + 1
    return fields, offset


def check_nrrd(path: Path) -> None:
    """Raise ``DataError`` unless an NRRD file holds what its header declares."""
    fields, _, offset = _nrrd_fields(path)
    shape = _integers(path, fields.get("sizes", ""), "sizes")
    if fields.get("dimension") != str(len(shape)):
        raise unreadable(path, f"dimension {fields.get('dimension')} with {len(shape)} sizes")
    voxel_bytes = _NRRD_BYTES.get(fields.get("type", "").lower())
    encoding = fields.get("encoding", "").lower()
    if voxel_bytes is None or encoding not in ("raw", "gzip", "gz"):
        raise unreadable(path, f"type {fields.get('type')!r} in encoding {encoding!r}")
    for skip in ("byte skip", "byteskip", "line skip", "lineskip"):
        if fields.get(skip, "0") != "0":
            raise unreadable(path, f"a {skip} of {fields[skip]}")
    for name in ("space", "space directions", "space origin"):
        if name not in fields:
            raise placeless(path, name)
    if fields["space"].lower() not in _NRRD_SPACES:
        raise unreadable(path, f"the space {fields['space']!r:.60}")
    vectors = [v for v in fields["space directions"].split() if v != "none"]
    for text in (*vectors, fields["space origin"]):
        _numbers(path, text.strip("()").replace(",", " "), "space", 3)
    for text in fields.get("space units", "mm").replace('"', " ").split():
        _check_unit(path, text, "space units")
    data = path
    if (detached := _nrrd_data_name(fields)) is not None:
        data, offset = _data_file(path, detached), 0
    expected = num_bytes(path, shape, voxel_bytes)
    _check_voxels(path, data, offset, expected, shape, compressed=encoding != "raw")


def _nrrd_fields(path: Path) -> tuple[dict[str, str], dict[str, str], int]:
    """The fields of an NRRD header, its key/value pairs, and where it ends."""
    with path.open("rb") as file:
        start = file.read(_MAX_HEADER)
    if not start.startswith(b"NRRD000"):
        raise unreadable(path, "no NRRD header")
    ends = [(start.find(gap), len(gap)) for gap in (b"\n\n", b"\r\n\r\n") if gap in start]
    end, gap = min(ends) if ends else (len(start), 0)
    fields: dict[str, str] = {}
    pairs: dict[str, str] = {}
    for line in start[:end].decode("utf-8", "replace").splitlines()[1:]:
        key, colon, value = line.partition(":")
        if not colon or line.startswith("#"):
            continue
        if value.startswith("="):
            pairs[key] = value[1:].strip()
        elif key.strip().lower() in fields:
            raise unreadable(path, f"the field {key.strip()!r:.60} twice in its header")
        else:
            fields[key.strip().lower()] = value.strip()
    return fields, pairs, end + gap


def _nrrd_data_name(fields: Mapping[str, str]) -> str | None:
    return fields.get("data file", fields.get("datafile"))


def segments(path: Path) -> dict[str, int]:
    """Name and value of each segment of a segmentation by 3D Slicer; nothing in other files.

    Raises:
        DataError: segments that overlap, each in a layer of its own.
    """
    _, pairs, _ = _nrrd_fields(path)
    found: dict[str, int] = {}
    for key, name in pairs.items():
        match = re.fullmatch(r"(Segment\d+)_Name", key)
        if match is None:
            continue
        if pairs.get(f"{match[1]}_Layer", "0") != "0":
            raise DataError(
                f"{path} must hold its segments in one layer; got {name!r:.60} in another. Export "
                "it from 3D Slicer as a label map (.nii.gz)."
            )
        value = _integers(path, pairs.get(f"{match[1]}_LabelValue", ""), f"{match[1]}_LabelValue")
        found[name] = value[0]
    return found


def files_of(path: Path) -> list[Path]:
    """What holds a volume: a file, or a header and the file with its voxels, or those of a folder.

    Headers that cannot be read stand for themselves: reading them says what is wrong.
    """
    if path.is_dir():
        return sorted(file for file in path.iterdir() if not file.name.startswith("."))
    try:
        if path.suffix.lower() in (".mhd", ".mha"):
            name = _metaimage_fields(path)[0]["ElementDataFile"]
            name = None if name.upper() in ("LOCAL", "LIST") else name
        elif path.suffix.lower() == ".nrrd":
            name = _nrrd_data_name(_nrrd_fields(path)[0])
        else:
            return [path]
        return [path] if name is None else [path, _data_file(path, name)]
    except (DataError, OSError):
        return [path]


def num_bytes(path: Path, shape: Sequence[int], voxel_bytes: int) -> int:
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


def check_size(path: Path, expected: int, size: int, *, compressed: bool) -> None:
    """Whether ``size`` bytes of a file can hold ``expected`` bytes of content."""
    if expected > (size * _DEFLATE_RATIO + _CHUNK if compressed else size):
        raise unreadable(path, f"{size} bytes for the {expected} that its header declares")


def check_padding(path: Path, rest: bytes, expected: int, shape: Sequence[int]) -> None:
    """Whether what follows the voxels may be left out, as the format's readers do.

    Zeros may, and less than a header that lost one index of an axis would leave.
    """
    plane = expected // max(shape)
    if len(rest) > MAX_PADDING or (len(rest) >= plane and rest.strip(b"\0")):
        more = "more" if len(rest) > MAX_PADDING else f"{len(rest)} bytes more"
        raise unreadable(path, f"{more} than the {expected} bytes that its header declares")


def _check_voxels(
    path: Path, data: Path, offset: int, expected: int, shape: Sequence[int], *, compressed: bool
) -> None:
    """Whether ``data`` holds, from ``offset`` on, the expected bytes."""
    size = max(data.stat().st_size - offset, 0)
    check_size(path, expected, size, compressed=compressed)
    if not compressed:
        with data.open("rb") as file:
            file.seek(offset + expected)
            check_padding(path, file.read(MAX_PADDING + 1), expected, shape)
        return
    found = _deflated_size(data, offset, expected)
    if found != expected:
        raise unreadable(path, f"{found} bytes for the {expected} that its header declares")


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
    """The file beside a header, or in a folder there, that holds its voxels."""
    data = path.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise DataError(
            f"{path} must name a file of its own folder for its voxels; got {name!r:.80}. Copy "
            "that file beside it and name it in the header, or convert both to one .mha or .nii.gz."
        )
    if "%" in name or not name or not data.is_file():
        raise MissingDataError(
            f"{path} must name one file that holds its voxels; got {name!r}, which is not there. "
            "Copy that file as well, or convert both to one .mha or .nii.gz."
        )
    return data


def _check_unit(path: Path, text: str, name: str) -> None:
    if text.lower() not in ("mm", "?", "unknown", "millimeter", "millimetre", "millimeters"):
        raise DataError(
            f"{path} must give lengths in millimetres; got {name} {text!r:.40}. Convert the file."
        )


def _integers(path: Path, text: str, name: str, *, least: int = 0) -> tuple[int, ...]:
    """Whole numbers in a header field."""
    words = text.split()
    if not words or len(words) > 8 or not all(w.lstrip("-").isdecimal() for w in words):
        raise unreadable(path, f"{name} {text!r:.60}")
    numbers = tuple(int(word[:20]) for word in words)
    if min(numbers) < least:
        raise unreadable(path, f"{name} {text!r:.60}")
    return numbers


def _numbers(path: Path, text: str, name: str, count: int) -> None:
    """Check that a header field holds so many finite numbers."""
    try:
        finite = [math.isfinite(float(word)) for word in text.split()]
    except ValueError:
        finite = []
    if len(finite) != count or not all(finite):
        raise unreadable(path, f"{name} {text!r:.60}")


def placeless(path: Path, name: str) -> DataError:
    """The fault of a header without a place."""
    return DataError(
        f"{path} must say where its voxels lie; got no {name} in its header. Convert the original "
        "images again."
    )


def unreadable(path: Path, came: str) -> DataError:
    """The fault of a file that is damaged or of another kind."""
    return DataError(
        f"{path} must be a readable image; got: {came}. Copy or convert the file again."
    )
