import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_pipelines.case import DataError, MissingDataError, Volume
from data_pipelines.volume_io import read_grid, read_volume, write_nifti
from tests.data_pipelines.fabricate import affine, raw_case, save


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".mhd", ".nrrd"])
def test_every_format_gives_the_same_volume(tmp_path, ending):
    volume = raw_case().images["t2w"]
    path = tmp_path / f"t2w{ending}"
    save(path, volume)
    read = read_volume(path)
    np.testing.assert_array_equal(read.array, volume.array)
    np.testing.assert_allclose(read.affine, volume.affine, atol=1e-5)
    assert read.shape == (8, 24, 24)
    assert read_grid(path).shape == read.shape
    np.testing.assert_array_equal(read_grid(path).affine, read.affine)
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
