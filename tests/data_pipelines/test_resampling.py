"""Grids, and volumes brought from one to another: by hand, and as SimpleITK does it."""

import dataclasses

import numpy as np
import pytest
import SimpleITK as sitk

from data_pipelines.case import Volume
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.picai.picai_dataset_builder import Builder
from data_pipelines.preparing.geometry import canonical, resample, resample_label
from data_pipelines.preparing.preprocessing import reference_grid
from data_pipelines.reading.volume_io import read_volume
from tests.data_pipelines.fabricate import raw_case
from tests.data_pipelines.test_preprocessing import ORIENTATIONS, rotation, stored_in


def test_canonical_axes_point_to_right_anterior_superior():
    volume = raw_case().images["adc"]
    for permutation, flips in ORIENTATIONS:
        result = canonical(stored_in(volume, permutation, flips))
        np.testing.assert_array_equal(result.array, volume.array)
        np.testing.assert_allclose(result.affine, volume.affine, atol=1e-9)


def test_reference_grid_is_centred_and_keeps_obliqueness():
    t2w = raw_case().images["t2w"]
    shape, matrix = reference_grid(t2w, PreprocessConfig(spacing_mm=(4, 2, 1), size=(5, 8, 12)))
    assert shape == (5, 8, 12)
    np.testing.assert_allclose(matrix @ [5.5, 3.5, 2, 1], t2w.affine @ [11.5, 11.5, 3.5, 1])
    np.testing.assert_allclose(matrix[:3, :3] / (1, 2, 4), t2w.affine[:3, :3] / (1, 1, 3))


def test_reference_grid_of_equal_spacing_falls_on_voxels():
    t2w = raw_case().images["t2w"]
    shape, matrix = reference_grid(t2w, PreprocessConfig(spacing_mm=(3, 1, 1), size=(5, 25, 24)))
    np.testing.assert_allclose(np.linalg.solve(t2w.affine, matrix)[:3, 3], [0, 0, 2], atol=1e-9)
    result, _ = resample(t2w, shape, matrix, order=1)
    np.testing.assert_allclose(result[:, :-1], t2w.array[2:7], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("order", [0, 1])
def test_resampling_to_the_same_grid_changes_nothing(order):
    volume = raw_case().images["hbv"]
    result, inside = resample(volume, volume.shape, volume.affine, order=order)
    np.testing.assert_array_equal(result, volume.array)
    assert inside.all()
    shifted = volume.affine.copy()
    shifted[:3, 3] += volume.affine[:3, 0]
    result, inside = resample(volume, volume.shape, shifted, order=order, fill=-7)
    np.testing.assert_allclose(result[..., :-1], volume.array[..., 1:], rtol=1e-5)
    assert (result[..., -1] == -7).all()
    assert inside[..., :-1].all()
    assert not inside[..., -1].any()


def test_resampling_by_hand():
    volume = Volume(np.arange(5.0).reshape(1, 1, 5), np.diag([2.0, 1, 1, 1]))
    matrix = np.eye(4)
    matrix[0, 3] = -2
    result, inside = resample(volume, (1, 1, 13), matrix, order=1, fill=9)
    expected = [9, 0, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4, 9]
    np.testing.assert_allclose(result.ravel(), expected)
    np.testing.assert_array_equal(inside.ravel(), np.array(expected) != 9)
    nearest, _ = resample(volume, (1, 1, 13), matrix, order=0, fill=9)
    np.testing.assert_array_equal(nearest.ravel(), [9, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 9])


@pytest.mark.parametrize(("order", "method"), [(1, sitk.sitkLinear), (0, sitk.sitkNearestNeighbor)])
def test_resampling_agrees_with_simpleitk(shared_data, order, method):
    folder = shared_data / "picai_mini/images/11373"
    t2w = read_volume(folder / "11373_1001396_t2w.mha")
    adc = read_volume(folder / "11373_1001396_adc.mha")
    adc = dataclasses.replace(adc, array=adc.array.astype(np.float32))
    small = Volume(t2w.array[:, ::4, ::4], t2w.affine @ np.diag([4, 4, 1, 1]))
    result, inside = resample(adc, small.shape, small.affine, order=order, fill=-1)
    image = sitk.ReadImage(str(folder / "11373_1001396_t2w.mha"))[::4, ::4, :]
    moving = sitk.Cast(sitk.ReadImage(str(folder / "11373_1001396_adc.mha")), sitk.sitkFloat32)
    expected = sitk.GetArrayFromImage(
        sitk.Resample(moving, image, sitk.Transform(), method, -1.0, sitk.sitkFloat32)
    )
    np.testing.assert_array_equal(inside, expected >= 0)
    np.testing.assert_allclose(result, expected, atol=0.05)
    assert 0.1 < inside.mean() < 1


@pytest.mark.parametrize("number", range(5))
def test_real_images_are_resampled_as_by_simpleitk(shared_data, number):
    """All modalities of a patient, on the stored grid and on a tilted one."""
    config = DataConfig(name="picai", path=shared_data / "picai_mini")
    builder = Builder(config)
    entry = builder.entries[number]
    raw = builder.read_case(entry)
    grid = PreprocessConfig(spacing_mm=(3.0, 1.1, 1.1), size=(12, 60, 60))
    shape, matrix = reference_grid(raw.images["t2w"], grid)
    for target in (matrix, matrix @ rotation_about((20, 30, 6), (1, 2, 3), 12)):
        itk = to_itk(np.zeros(shape, np.float32), target)
        for name, path in entry.images.items():
            volume = raw.images[name]
            array = volume.array.astype(np.float32)
            result, inside = resample(Volume(array, volume.affine), shape, target, order=1)
            moving = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkFloat32)
            expected = sitk.GetArrayFromImage(
                sitk.Resample(moving, itk, sitk.Transform(), sitk.sitkLinear, np.nan)
            )
            common = inside & np.isfinite(expected)
            assert common.mean() > 0.2
            assert (inside == np.isfinite(expected)).mean() > 0.999  # borders may round
            difference = abs(result[common] - expected[common]).max()
            assert difference < 1e-3 * np.ptp(array)


def rotation_about(voxel_ijk, axis, degrees) -> np.ndarray:
    """A turn of voxel indices about one of them."""
    centre = np.eye(4)
    centre[:3, 3] = voxel_ijk
    turn = rotation(axis, degrees)
    turn[:3, 3] = 0
    return centre @ turn @ np.linalg.inv(centre)


def to_itk(array, matrix) -> sitk.Image:
    """An image of SimpleITK at that place; axes are made orthogonal, as it demands."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def test_real_images_on_their_own_grid_do_not_change(shared_data):
    config = DataConfig(name="picai", path=shared_data / "picai_mini")
    builder = Builder(config)
    raw = builder.read_case(builder.entries[0])
    for volume in raw.images.values():
        result, inside = resample(volume, volume.shape, volume.affine, order=1)
        np.testing.assert_array_equal(result, volume.array)
        assert inside.all()
    source = Volume((raw.label.array > 0).astype(np.uint8), raw.label.affine)
    for sampling in ("linear", "nearest"):
        same = resample_label(source, source.shape, source.affine, sampling=sampling)
        np.testing.assert_array_equal(same, source.array)


@pytest.mark.parametrize("sampling", ["linear", "nearest"])
def test_labels_neither_grow_nor_shrink_at_ties(sampling):
    label = Volume(np.zeros((1, 8, 8), np.uint8), np.eye(4))
    label.array[0, 2:5, 2:6] = 2
    shifted = np.eye(4)
    shifted[0, 3] = 0.5
    result = resample_label(label, (1, 8, 8), shifted, sampling=sampling)
    assert (result > 0).sum() == 12
    assert set(np.unique(result)) == {0, 2}
    outside = np.eye(4)
    outside[0, 3] = 100
    assert not resample_label(label, (1, 8, 8), outside, sampling=sampling).any()


def test_of_several_classes_the_heaviest_wins():
    label = Volume(np.zeros((1, 1, 4), np.uint8), np.eye(4))
    label.array[0, 0] = (1, 1, 2, 0)
    matrix = np.eye(4)
    matrix[0, 3] = 0.4
    # weights of classes 1 and 2 at 0.4, 1.4, 2.4: (1, 0), (0.6, 0.4), (0, 0.6)
    assert resample_label(label, (1, 1, 3), matrix).ravel().tolist() == [1, 1, 2]
    matrix[0, 3] = 0.6
    assert resample_label(label, (1, 1, 3), matrix).ravel().tolist() == [1, 2, 0]
