import gzip
import os
import re

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_pipelines.case import Volume
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.reading.volume_io import read_volume, write_nifti
from tests.data_pipelines.fabricate import affine, raw_case, save, write_dicom


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".mhd", ".nrrd"])
def test_every_format_gives_the_same_volume(tmp_path, ending):
    volume = raw_case().images["t2w"]
    path = tmp_path / f"t2w{ending}"
    save(path, volume)
    read = read_volume(path)
    np.testing.assert_array_equal(read.array, volume.array)
    np.testing.assert_allclose(read.affine, volume.affine, atol=1e-5)
    assert read.shape == (8, 24, 24)
    np.testing.assert_allclose(read.spacing_mm, (3, 1, 1), atol=1e-6)


def test_voxel_positions_agree_with_simpleitk(shared_data):
    path = shared_data / "picai_mini/images/11373/11373_1001396_adc.mha"
    image = sitk.ReadImage(str(path))
    volume = read_volume(path)
    x, y, z = image.TransformIndexToPhysicalPoint((5, 40, 11))
    np.testing.assert_allclose((volume.affine @ [5, 40, 11, 1])[:3], (-x, -y, z), atol=1e-9)
    assert volume.array[11, 40, 5] == image[5, 40, 11]


def test_nifti_scaling_and_trailing_axes(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
    image = nib.Nifti1Image(array, np.eye(4))
    image.header.set_slope_inter(0.5, 1.0)
    nib.save(image, tmp_path / "v.nii")
    stored = nib.load(tmp_path / "v.nii").get_fdata()
    volume = read_volume(tmp_path / "v.nii")
    np.testing.assert_allclose(volume.array, stored[..., 0].T)
    assert volume.shape == (4, 3, 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_written_files_come_back(tmp_path, dtype, ending):
    array = (np.arange(60).reshape(3, 4, 5) / 2).astype(dtype)
    path = tmp_path / "new" / f"out{ending}"
    write_nifti(path, array, affine())
    image = nib.load(path)
    assert image.shape == (5, 4, 3)
    assert image.get_data_dtype() == dtype
    np.testing.assert_allclose(image.affine, affine(), atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), affine(), atol=1e-5)
    np.testing.assert_array_equal(read_volume(path).array, array)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(image, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_nifti(tmp_path / "out.nii.gz", np.zeros((2, 2, 2), np.uint8), np.eye(4))
    assert not list(tmp_path.iterdir())


def test_wrong_output_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"array must be uint8 or float32; got float64"):
        write_nifti(tmp_path / "out.nii.gz", np.zeros((2, 2, 2)), np.eye(4))
    with pytest.raises(ValueError, match=r"path must end in .nii.gz or .nii; got out.mha"):
        write_nifti(tmp_path / "out.mha", np.zeros((2, 2, 2), np.uint8), np.eye(4))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha"])
def test_broken_files_are_named(tmp_path, ending):
    path = tmp_path / f"broken{ending}"
    with pytest.raises(MissingDataError, match=rf"no file at .*broken\{ending}"):
        read_volume(path)
    path.write_bytes(b"this is no image")
    with pytest.raises(DataError, match=rf"broken\{ending} must be a readable image; got: "):
        read_volume(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"must be a readable image"):
        read_volume(path)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "cut.nii.gz"
    rng = np.random.default_rng(0)
    save(path, Volume(rng.normal(size=(8, 24, 24)).astype(np.float32), np.eye(4)))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut.nii.gz must be a readable image"):
        read_volume(path)
    whole = gzip.compress(b"\0" * 400)
    path.write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"cut.nii.gz must be a readable image"):
        read_volume(path)


def test_unusable_volumes_are_refused(tmp_path):
    path = tmp_path / "v.nii"
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4, 5), np.uint8), np.eye(4)), path)
    with pytest.raises(DataError, match=r"must be three-dimensional; got shape \(2, 3, 4, 5\)"):
        read_volume(path)
    array = np.zeros((2, 3, 4), np.float32)
    array[0, 1, 2:] = np.nan
    save(path, Volume(array, np.eye(4)))
    with pytest.raises(DataError, match=r"v.nii must hold finite values; got 2 NaN or infinite"):
        read_volume(path)
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4), np.complex64), np.eye(4)), path)
    with pytest.raises(DataError, match=r"one real number a voxel; got complex64"):
        read_volume(path)
    colours = sitk.GetImageFromArray(np.zeros((2, 3, 4, 3), np.uint8), isVector=True)
    sitk.WriteImage(colours, str(tmp_path / "rgb.mha"))
    with pytest.raises(DataError, match=r"must be three-dimensional; got shape \(4, 3, 2, 3\)"):
        read_volume(tmp_path / "rgb.mha")
    (tmp_path / "v.png").touch()
    with pytest.raises(DataError, match=r"volumes must be one of .nii.gz, .* got .*v.png"):
        read_volume(tmp_path / "v.png")


def test_unusable_geometry_is_refused(tmp_path):
    path = tmp_path / "v.nii"
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.uint8), None)
    image.header.set_sform(np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), 1)
    nib.save(image, path)
    with pytest.raises(DataError, match=r"must have three independent axes"):
        read_volume(path)
    image.header.set_sform(np.diag([1.0, 0, 1, 1]), 1)
    nib.save(image, path)
    with pytest.raises(DataError, match=r"must have a positive voxel size; got \[1.0, 0.0, 1.0\]"):
        read_volume(path)


def header(**fields):
    """A NIfTI file of 2 x 3 x 4 voxels with header fields set."""
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.uint8), np.eye(4))
    content = bytearray(image.to_bytes())
    view = np.frombuffer(content, nib.Nifti1Header.template_dtype, count=1)
    for name, value in fields.items():
        view[0][name] = value
    return bytes(content)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sform_code": 0}, r"must say where its voxels lie; got no sform or qform in its header"),
        ({"sform_code": 6}, r"must say where its voxels lie; got no sform or qform in its header"),
        ({"qform_code": 1, "qoffset_x": 30}, r"must lie in one place; got an sform and a qform up"),
        ({"dim": (3, 2, -3, 4, 1, 1, 1, 1)}, r"at least one voxel along each axis; got the shape"),
        (
            {"dim": (3, 2000, 2000, 2000, 1, 1, 1, 1)},
            r"at most 33554432 voxels in 128 MiB; got the",
        ),
        ({"dim": (3, 2, 3, 5, 1, 1, 1, 1)}, r"got: 376 bytes for the 382 that its header declares"),
        ({"vox_offset": 10}, r"got: voxels that begin at byte 10"),
        ({"scl_slope": np.inf}, r"got: the intensity scale inf"),
        ({"sizeof_hdr": 347}, r"must be a readable image; got: no NIfTI header. Copy or convert"),
        ({"magic": b"nix"}, r"must be a readable image; got: the magic b'nix.*'. Copy or convert"),
    ],
)
def test_nifti_headers_that_lie_are_refused(tmp_path, fields, text):
    (tmp_path / "v.nii").write_bytes(header(**fields))
    with pytest.raises(DataError, match=text) as caught:
        read_volume(tmp_path / "v.nii")
    assert caught.value.file == tmp_path / "v.nii"


def test_text_headers_must_name_place_and_file(tmp_path):
    save(tmp_path / "v.mhd", Volume(np.zeros((2, 3, 4), np.uint8), np.eye(4)))
    text = (tmp_path / "v.mhd").read_text("utf-8")
    (tmp_path / "v.mhd").write_text(text.replace("Offset", "Offside"), encoding="utf-8")
    with pytest.raises(DataError, match=r"must say where its voxels lie; got no Offset"):
        read_volume(tmp_path / "v.mhd")
    (tmp_path / "v.mhd").write_text(text.replace("= v.", "= w."), encoding="utf-8")
    with pytest.raises(MissingDataError, match=r"one file that holds its voxels; got 'w\."):
        read_volume(tmp_path / "v.mhd")


@pytest.mark.parametrize(
    ("ending", "line", "text"),
    [
        ("mha", None, r"got: no MetaImage header"),
        ("mha", b"NDims = 2", r"got: NDims 2 with DimSize 4 3 2"),
        ("mha", b"ElementType = MET_OTHER", r"got: voxels of type MET_OTHER, or as text"),
        ("mha", b"BinaryData = False", r"got: voxels of type MET_UCHAR, or as text"),
        ("mha", b"ElementDataFile = LIST", r"got: a list of files"),
        ("mha", b"CompressedData = Maybe", r"got: CompressedData 'Maybe'"),
        ("nrrd", None, r"got: no NRRD header"),
        ("nrrd", b"dimension: 2", r"got: dimension 2 with 3 sizes"),
        ("nrrd", b"type: block", r"got: type 'block' in encoding '(gzip|raw)'"),
        ("nrrd", b"encoding: bzip2", r"got: type '\w+( \w+)*' in encoding 'bzip2'"),
        ("nrrd", b"space: scanner-xyz", r"got: the space 'scanner-xyz'"),
    ],
)
def test_text_headers_of_what_cannot_be_read_are_refused(tmp_path, ending, line, text):
    path = tmp_path / f"v.{ending}"
    save(path, Volume(np.zeros((2, 3, 4), np.uint8), np.eye(4)))
    content = path.read_bytes()
    if line is None:
        content = b"this is no image\n" + content
    else:
        key = re.escape(re.match(rb"\w+ ?[=:]", line)[0])
        content, replaced = re.subn(rb"(?m)^" + key + rb".*$", line, content, count=1)
        assert replaced
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"must be a readable image; " + text) as caught:
        read_volume(path)
    assert caught.value.file == path


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "v.nii").mkdir()
    with pytest.raises(DataError, match=r"must be a file; got a folder. Check the path"):
        read_volume(tmp_path / "v.nii")
    os.mkfifo(tmp_path / "v.mha")
    with pytest.raises(DataError, match=r"must be a regular file; got a device or pipe"):
        read_volume(tmp_path / "v.mha")


def test_a_channel_of_a_file_with_four_axes(tmp_path):
    array = np.arange(48, dtype=np.int16).reshape(2, 3, 4, 2)
    nib.save(nib.Nifti1Image(array, affine()), tmp_path / "v.nii.gz")
    volume = read_volume(tmp_path / "v.nii.gz", channel=1)
    np.testing.assert_array_equal(volume.array, array[..., 1].T)
    with pytest.raises(DataError, match=r"a fourth axis with channel 2; got shape \(2, 3, 4, 2\)"):
        read_volume(tmp_path / "v.nii.gz", channel=2)
    save(tmp_path / "w.nii", raw_case().images["t2w"])
    with pytest.raises(DataError, match=r"a fourth axis with channel 0; got shape \(24, 24, 8\)"):
        read_volume(tmp_path / "w.nii", channel=0)


def test_a_dicom_series_is_a_volume(tmp_path):
    volume = raw_case().images["t2w"]
    write_dicom(tmp_path / "t2w", volume)
    read = read_volume(tmp_path / "t2w")
    flipped = np.allclose(read.affine[:3, 2], -volume.affine[:3, 2], atol=1e-4)
    np.testing.assert_array_equal(read.array[::-1] if flipped else read.array, volume.array)
    expected = volume.affine @ ([0, 0, 7, 1] if flipped else [0, 0, 0, 1])
    np.testing.assert_allclose(read.affine[:, 3], expected, atol=1e-4)
    np.testing.assert_allclose(abs(read.affine[:3, :3]), abs(volume.affine[:3, :3]), atol=1e-4)


def test_dicom_that_would_be_stacked_wrongly_is_refused(tmp_path):
    volume = raw_case().images["t2w"]
    write_dicom(tmp_path / "gap", volume, skip=(3,))
    with pytest.raises(DataError, match=r"slices at even distances; got distances from 3.000 to 6"):
        read_volume(tmp_path / "gap")
    write_dicom(tmp_path / "b", volume)
    write_dicom(tmp_path / "b", volume, name="again")
    with pytest.raises(
        DataError, match=r"one image for each slice position; got 8 more, .*dcm2nii"
    ):
        read_volume(tmp_path / "b")
    write_dicom(tmp_path / "two", volume)
    write_dicom(tmp_path / "two", volume, name="other", tags={"0020|000e": "1.2.3.5"})
    with pytest.raises(DataError, match=r"must hold one DICOM series; got 2: 1\.2\.3\."):
        read_volume(tmp_path / "two")
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingDataError, match=r"must hold one DICOM series; got no DICOM image"):
        read_volume(tmp_path / "none")


def test_enhanced_dicom_is_refused_and_a_converter_named(tmp_path):
    (tmp_path / "hbv").mkdir()
    image = sitk.GetImageFromArray(raw_case().images["t2w"].array)
    image.SetMetaData("0008|0060", "MR")
    image.SetMetaData("0008|0016", "1.2.840.10008.5.1.4.1.1.4.1")
    sitk.WriteImage(image, str(tmp_path / "hbv" / "enhanced.dcm"))
    with pytest.raises(DataError, match=r"series of single images; got the multi-frame .*dcm2niix"):
        read_volume(tmp_path / "hbv")


def test_colour_dicom_is_refused(tmp_path):
    (tmp_path / "t2w").mkdir()
    image = sitk.GetImageFromArray(np.zeros((24, 24, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "t2w" / "colour.dcm"))
    with pytest.raises(
        DataError, match=r"must hold grey-level images; got 3 values a voxel in col"
    ):
        read_volume(tmp_path / "t2w")
