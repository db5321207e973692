"""The elements of one DICOM file as far as they say what its pixels are, read before the pixels.

GDCM believes Rows and Columns: it allocates what they say and leaves what the file does not hold as
it finds it in memory. So the length of the pixel data is asked of the file itself.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from data_pipelines.faults import DataError

PIXELS = 0x7FE00010
_SYNTAX = 0x00020010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG_FORMS = {
    *(b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"),
}
_Element = tuple[int, int, bytes]  # tag, length, and the form of the value where it is said
_IMPLICIT = "1.2.840.10008.1.2"
_EXPLICIT = "1.2.840.10008.1.2.1"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_MAX_VALUE = 2**12
_MAX_DEPTH = 32


class Elements:
    """Elements before the pixels of a file, and how many bytes the pixels have.

    Attributes:
        values: raw value by tag, of elements of at most 4 KiB outside sequences.
        num_pixel_bytes: None where they are compressed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[int, bytes] = {}
        self.num_pixel_bytes: int | None = None
        self._order = "<"
        with path.open("rb") as file:
            try:
                self._read(file)
            except (struct.error, EOFError, OverflowError):
                raise _damaged(path, "an element that reaches beyond its end") from None

    def text(self, tag: int) -> str:
        """A value of characters, without padding."""
        return self.values.get(tag, b"").decode("latin-1").strip(" \0")

    def number(self, tag: int) -> int | None:
        """An unsigned 16-bit value."""
        value = self.values.get(tag, b"")
        return struct.unpack(f"{self._order}H", value[:2])[0] if len(value) >= 2 else None

    def decimals(self, tag: int, count: int) -> tuple[float, ...] | None:
        """So many decimal strings; None if the element is not there or empty.

        Raises:
            DataError: other than ``count`` numbers.
        """
        text = self.text(tag)
        if not text:
            return None
        try:
            values = tuple(float(word) for word in text.split("\\"))
        except ValueError:
            values = ()
        if len(values) != count:
            raise _damaged(self.path, f"{text!r:.60} for {count} numbers in {_name(tag)}")
        return values

    def _read(self, file: BinaryIO) -> None:
        self._size = file.seek(0, 2)
        file.seek(128)
        explicit, order = False, "<"
        if file.read(4) == b"DICM":
            syntax = self._meta(file)
            if syntax == _DEFLATED:
                raise _damaged(self.path, "the deflated transfer syntax")
            explicit, order = syntax != _IMPLICIT, ">" if syntax == _BIG_ENDIAN else "<"
            plain = syntax in (_IMPLICIT, _EXPLICIT, _BIG_ENDIAN)
        else:  # of the time before files had a preamble
            file.seek(0)
            plain = True
        self._order = order
        while (element := self._element(file, order, explicit=explicit)) is not None:
            tag, length, _ = element
            if tag == PIXELS:
                if length != _UNDEFINED:
                    self.num_pixel_bytes = min(length, self._size - file.tell())
                elif plain:
                    raise _damaged(self.path, "compressed pixels in an uncompressed syntax")
                self.values[PIXELS] = b""
                return
            self._value(file, element, order, explicit=explicit)

    def _meta(self, file: BinaryIO) -> str:
        """Pass over the elements of group 2; the transfer syntax."""
        while True:
            start = file.tell()
            element = self._element(file, "<", explicit=True)
            if element is None or element[0] >> 16 != 2:
                file.seek(start)
                return self.text(_SYNTAX)
            self._value(file, element, "<", explicit=True)

    def _element(self, file: BinaryIO, order: str, *, explicit: bool) -> _Element | None:
        """The next element; None at the end."""
        start = file.read(8)
        if not start:
            return None
        group, element = struct.unpack(f"{order}HH", start[:4])
        tag = group << 16 | element
        if not explicit or group == 0xFFFE:
            return tag, struct.unpack(f"{order}I", start[4:])[0], b""
        if start[4:6] in _LONG_FORMS:
            return tag, struct.unpack(f"{order}I", file.read(4))[0], start[4:6]
        return tag, struct.unpack(f"{order}H", start[6:])[0], start[4:6]

    def _value(
        self, file: BinaryIO, element: _Element, order: str, *, explicit: bool, depth: int = 0
    ) -> None:
        """Keep a short value, pass over a long one and over sequences."""
        tag, length, form = element
        explicit = explicit and form != b"UN"  # what an unknown sequence holds is implicit
        if length == _UNDEFINED:
            self._pass_sequence(file, order, explicit=explicit, depth=depth + 1)
            return
        if length > self._size - file.tell():
            raise EOFError
        if length > _MAX_VALUE or depth:
            file.seek(length, 1)
        else:
            self.values.setdefault(tag, file.read(length))

    def _pass_sequence(self, file: BinaryIO, order: str, *, explicit: bool, depth: int) -> None:
        """Go to the end of a sequence or item of undefined length."""
        if depth > _MAX_DEPTH:
            raise _damaged(self.path, f"sequences more than {_MAX_DEPTH} deep")
        while True:
            element = self._element(file, order, explicit=explicit)
            if element is None:
                raise EOFError
            if element[0] in (_SEQUENCE_END, _ITEM_END):
                return
            self._value(file, element, order, explicit=explicit, depth=depth)


NAMES: Mapping[int, str] = {
    0x00080016: "SOPClassUID",
    0x00180088: "SpacingBetweenSlices",
    0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient",
    0x00280002: "SamplesPerPixel",
    0x00280004: "PhotometricInterpretation",
    0x00280008: "NumberOfFrames",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280030: "PixelSpacing",
    0x00280100: "BitsAllocated",
    0x00281052: "RescaleIntercept",
    0x00281053: "RescaleSlope",
}
"""Elements that are read, by tag."""


def _name(tag: int) -> str:
    return NAMES.get(tag, f"({tag >> 16:04x},{tag & 0xFFFF:04x})")


def _damaged(path: Path, came: str) -> DataError:
    return DataError(
        f"{path} must be a whole DICOM image; got: {came}. Copy the file again, or convert the "
        "series with dcm2niix."
    )
