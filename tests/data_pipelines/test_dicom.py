"""DICOM series, of which every slice is believed for itself and none is left out."""

import struct

import numpy as np
import pytest
import SimpleITK as sitk

from data_pipelines.case import Volume
from data_pipelines.faults import DataError
from data_pipelines.reading.volume_io import read_volume
from tests.data_pipelines.fabricate import affine

SHAPE = (6, 12, 10)
ROWS, COLUMNS, SLOPE, INTERCEPT = 0x00280010, 0x00280011, 0x00281053, 0x00281052
LONG = (b"OB", b"OW", b"SQ", b"UN")


def element(tag: int, form: bytes, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    start = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + form
    long = form in LONG
    return start + struct.pack("<HI" if long else "<H", *((0,) if long else ()), len(value)) + value


def text(*values: float) -> bytes:
    return "\\".join(f"{value:.6f}".rstrip("0").rstrip(".") for value in values).encode()


def dicom_slice(stored: np.ndarray, k: int, matrix: np.ndarray, /, **changed) -> bytes:
    """One file of explicit little endian syntax; ``changed`` replaces or removes elements."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    values = {
        "sop_class": (0x00080016, b"UI", b"1.2.840.10008.5.1.4.1.1.4"),
        "instance": (0x00080018, b"UI", f"1.2.3.9.{k}".encode()),
        "modality": (0x00080060, b"CS", b"MR"),
        "study": (0x0020000D, b"UI", b"1.2.3"),
        "series": (0x0020000E, b"UI", b"1.2.3.4"),
        "number": (0x00200013, b"IS", str(k + 1).encode()),
        "position": (0x00200032, b"DS", text(*(lps @ [0, 0, k, 1])[:3])),
        "orientation": (0x00200037, b"DS", text(*direction[:, :2].T.ravel())),
        "samples": (0x00280002, b"US", struct.pack("<H", 1)),
        "photometric": (0x00280004, b"CS", b"MONOCHROME2"),
        "rows": (ROWS, b"US", struct.pack("<H", stored.shape[0])),
        "columns": (COLUMNS, b"US", struct.pack("<H", stored.shape[1])),
        "spacing": (0x00280030, b"DS", text(spacing[1], spacing[0])),
        "allocated": (0x00280100, b"US", struct.pack("<H", 16)),
        "stored": (0x00280101, b"US", struct.pack("<H", 16)),
        "high": (0x00280102, b"US", struct.pack("<H", 15)),
        "signed": (0x00280103, b"US", struct.pack("<H", 0)),
        "intercept": (INTERCEPT, b"DS", b"0"),
        "slope": (SLOPE, b"DS", b"1"),
        "pixels": (0x7FE00010, b"OW", stored.astype("<u2").tobytes()),
    }
    for name, value in changed.items():
        tag, form, _ = values.get(name, (0x00180088, b"DS", b""))
        values[name] = (tag, form, value)
    elements = sorted(v for v in values.values() if v[2] is not None)
    meta = element(0x00020002, b"UI", b"1.2.840.10008.5.1.4.1.1.4")
    meta += element(0x00020003, b"UI", f"1.2.3.9.{k}".encode())
    meta += element(0x00020010, b"UI", b"1.2.840.10008.1.2.1")
    group = element(0x00020000, b"UL", struct.pack("<I", len(meta)))
    return b"\0" * 128 + b"DICM" + group + meta + b"".join(element(*e) for e in elements)


@pytest.fixture
def stored():
    return np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)


def write(folder, stored, change=lambda k: {}):
    folder.mkdir()
    for k, plane in enumerate(stored):
        (folder / f"IM{k:03d}.dcm").write_bytes(dicom_slice(plane, k, affine(), **change(k)))
    return folder


def upright(volume: Volume) -> np.ndarray:
    """Slices in the order in which they were written."""
    return volume.array if volume.affine[2, 2] > 0 else volume.array[::-1]


@pytest.mark.parametrize(
    ("slope", "intercept"),
    [
        (lambda k: 1.0 if k == 0 else 0.001, lambda k: 0.0),
        (lambda k: 1.0, lambda k: 0.0 if k == 0 else -1000.0),
        (lambda k: 1.0 + k, lambda k: 100.0 * k),
        (lambda k: 0.5, lambda k: -1.5),
        (lambda k: 1.0, lambda k: 60000.0 * (k == 5)),
    ],
)
def test_every_slice_is_rescaled_by_its_own_values(tmp_path, stored, slope, intercept):
    def change(k):
        return {"slope": text(slope(k)), "intercept": text(intercept(k))}

    volume = read_volume(write(tmp_path / "adc", stored, change))
    expected = np.stack([plane * slope(k) + intercept(k) for k, plane in enumerate(stored)])
    np.testing.assert_allclose(upright(volume), expected, rtol=1e-6)


def test_a_series_as_pydicom_and_scanners_write_it(tmp_path, stored):
    """With a private sequence of undefined length, and files beside the slices."""
    private = struct.pack("<HH2sHI", 0x0029, 0x1010, b"SQ", 0, 0xFFFFFFFF)
    private += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    private += element(0x00080104, b"LO", b"inside")
    private += struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    folder = write(tmp_path / "t2w", stored)
    for path in folder.iterdir():
        content = path.read_bytes()
        place = content.index(struct.pack("<HH", 0x7FE0, 0x0010))
        path.write_bytes(content[:place] + private + content[place:])
    (folder / "notes.txt").write_text("of the scan", encoding="utf-8")
    (folder / "._IM000.dcm").write_bytes(b"Mac OS X")
    (folder / "DICOMDIR").write_bytes(b"index")
    volume = read_volume(folder)
    np.testing.assert_array_equal(upright(volume), stored)
    np.testing.assert_allclose(abs(volume.affine[:3, :3]), abs(affine()[:3, :3]), atol=1e-5)


@pytest.mark.parametrize("empty", [[0], [5], [0, 1, 2], [1, 3, 5], [1, 2, 3, 4, 5]])
def test_files_of_a_series_that_are_no_image_are_named(tmp_path, stored, empty):
    folder = write(tmp_path / "adc", stored)
    for k in empty:
        (folder / f"IM{k:03d}.dcm").write_bytes(b"")
    with pytest.raises(DataError, match=rf"nothing but the slices .* got IM{empty[0]:03d}.dcm \(0"):
        read_volume(folder)


@pytest.mark.parametrize(
    ("changed", "text_"),
    [
        ({"rows": struct.pack("<H", 24)}, r"got 240 bytes of pixels in IM002.dcm for 24 x 10 of 2"),
        ({"rows": struct.pack("<H", 13)}, r"got 240 bytes of pixels in IM002.dcm for 13 x 10 of 2"),
        ({"columns": struct.pack("<H", 9)}, r"got 240 bytes of pixels in IM002.dcm for 12 x 9"),
        ({"allocated": struct.pack("<H", 32)}, r"got 240 bytes of pixels .* of 4 bytes"),
        ({"pixels": b"\0" * 238}, r"must hold whole slices; got 238 bytes of pixels in IM002.dcm"),
        ({"spacing": b"2\\2"}, r"another PixelSpacing in IM002.dcm than in IM00\d.dcm: \(2.0, 2"),
        ({"orientation": b"1\\0\\0\\0\\1\\0"}, r"got another ImageOrientationPatient in IM002.dcm"),
        ({"photometric": b"MONOCHROME1"}, r"larger values are brighter; got MONOCHROME1 in IM002"),
        ({"slope": b"0"}, r"whose rescaling keeps their values; got the slope 0 in IM002.dcm"),
        ({"slope": b"one"}, r"a whole DICOM image; got: 'one' for 1 numbers in RescaleSlope"),
    ],
)  # fmt: skip
def test_a_slice_unlike_the_others_is_refused(tmp_path, stored, changed, text_):
    folder = write(tmp_path / "adc", stored, lambda k: changed if k == 2 else {})
    with pytest.raises(DataError, match=text_) as caught:
        read_volume(folder)
    assert caught.value.file == folder


def test_a_whole_slice_of_another_size_is_refused(tmp_path, stored):
    folder = write(tmp_path / "adc", stored)
    (folder / "IM002.dcm").write_bytes(dicom_slice(stored[2, :10], 2, affine()))
    with pytest.raises(
        DataError, match=r"another size in IM002.dcm than in IM00\d.dcm: \(10, 10\)"
    ):
        read_volume(folder)


def test_size_is_bounded_before_anything_is_allocated(tmp_path, stored):
    huge = {"rows": struct.pack("<H", 20000), "columns": struct.pack("<H", 20000)}
    folder = write(tmp_path / "adc", stored, lambda k: huge)
    with pytest.raises(DataError, match=r"at most 33554432 voxels; got 20000 x 20000 in 6 files"):
        read_volume(folder)


def test_slices_further_apart_than_declared_are_missing(tmp_path, stored):
    folder = write(tmp_path / "t2w", stored, lambda k: {"between": b"3"})
    np.testing.assert_array_equal(upright(read_volume(folder)), stored)
    for k in (1, 3, 5):
        (folder / f"IM{k:03d}.dcm").unlink()
    with pytest.raises(DataError, match=r"every slice of its series; got slices 6.000 mm apart"):
        read_volume(folder)


def test_a_damaged_element_is_named(tmp_path, stored):
    folder = write(tmp_path / "t2w", stored)
    path = folder / "IM003.dcm"
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<HH", 0x0028, 0x0030)) + 6
    content[place : place + 2] = struct.pack("<H", 60000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"IM003.dcm"):
        read_volume(folder)


def test_a_tilted_stack_keeps_its_shear(tmp_path, stored):
    matrix = affine()
    matrix[:3, 2] += [0, 0.4, 0]
    (tmp_path / "t2w").mkdir()
    for k, plane in enumerate(stored):
        (tmp_path / "t2w" / f"{k}.dcm").write_bytes(dicom_slice(plane, k, matrix))
    volume = read_volume(tmp_path / "t2w")
    place = [3, 4, 2, 1] if volume.affine[2, 2] > 0 else [3, 4, 3, 1]
    np.testing.assert_allclose((volume.affine @ place)[:3], (matrix @ [3, 4, 2, 1])[:3], atol=1e-4)


def test_sitk_alone_would_read_other_values(tmp_path, stored):
    """Why slices are read one by one: the series reader takes the type of the first for all."""
    change = {0: {"slope": b"1"}}
    folder = write(tmp_path / "adc", stored, lambda k: change.get(k, {"slope": b"0.001"}))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sorted(str(path) for path in folder.iterdir()))
    array = sitk.GetArrayFromImage(reader.Execute())
    assert array.dtype == np.uint16
    assert array[1:].max() <= 3
