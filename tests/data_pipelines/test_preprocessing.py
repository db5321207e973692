"""A case from its files to the reference grid, and results back to its own frame."""

import dataclasses
import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_pipelines.case import STORED_UNIT, Volume
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.picai.picai_dataset_builder import Builder
from data_pipelines.preparing.geometry import overlaps, resample
from data_pipelines.preparing.preprocessing import check_preprocess, preprocess_case, to_original
from data_pipelines.reading.volume_io import read_volume, write_nifti
from tests.data_pipelines.fabricate import SMALL, affine, raw_case, save

CONFIG = DataConfig(preprocess=SMALL)


def with_image(raw, name, **changes):
    volume = dataclasses.replace(raw.images[name], **changes)
    return dataclasses.replace(raw, images={**raw.images, name: volume})


def with_label(raw, array, matrix=None):
    matrix = raw.label.affine if matrix is None else matrix
    return dataclasses.replace(raw, label=Volume(array, matrix))


def stored_in(volume: Volume, permutation, flips) -> Volume:
    """The same image with its file axes ``i j k`` flipped, then permuted."""
    image = nib.Nifti1Image(volume.array.T, volume.affine)
    start = nib.orientations.io_orientation(volume.affine)
    wanted = start[list(permutation)] * [[1, -1 if flip else 1] for flip in flips]
    image = image.as_reoriented(nib.orientations.ornt_transform(start, wanted))
    return Volume(np.asarray(image.dataobj).T, image.affine)


ORIENTATIONS = list(
    itertools.product(itertools.permutations(range(3)), itertools.product((0, 1), repeat=3))
)


def test_a_crop_around_the_gland(tmp_path):
    raw = raw_case()
    mask = np.zeros((8, 24, 24), np.uint8)
    mask[2:5, 9:14, 7:12] = 1
    grid = PreprocessConfig(spacing_mm=(3, 1, 1), size=(5, 9, 11), centre="gland")
    config = DataConfig(preprocess=grid)
    gland = Volume(mask, raw.label.affine)
    case = preprocess_case(dataclasses.replace(raw, gland=gland), config)
    # The box is centred on voxel 3, 11, 9; the crop of 5 x 9 x 11 begins at 1, 7, 4.
    np.testing.assert_allclose(case.affine[:3, 3], (raw.label.affine @ [4, 7, 1, 1])[:3])
    np.testing.assert_array_equal(case.label, raw.label.array[1:6, 7:16, 4:15] > 0)
    elsewhere = stored_in(gland, (2, 0, 1), (1, 0, 1))
    again = preprocess_case(dataclasses.replace(raw, gland=elsewhere), config)
    np.testing.assert_array_equal(again.image, case.image)
    with pytest.raises(MissingDataError, match=r"for training and for prediction; got none"):
        preprocess_case(raw, config)
    with pytest.raises(DataError, match=r"needs a mask of the gland; got an empty one"):
        preprocess_case(dataclasses.replace(raw, gland=Volume(mask * 0, gland.affine)), config)
    for target in ("gland", "zones"):
        with pytest.raises(DataError, match=rf"placed by what is to be found; .* '{target}'"):
            check_preprocess(dataclasses.replace(config, target=target))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": (0, 16, 16)}, r"at least one voxel along each axis .* got \(0, 16, 16\)"),
        ({"spacing_mm": (3.0, -1.0, 1.0)}, r"a positive spacing; got .* \(3.0, -1.0, 1.0\) mm"),
        ({"clip_percentiles": (90, 10)}, r"percentiles must rise within 0 to 100; got 90 and 10"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change, text):
    config = DataConfig(preprocess=dataclasses.replace(SMALL, **change))
    with pytest.raises(DataError, match=text):
        preprocess_case(raw_case(), config)


def test_grids_overlap_also_when_one_is_tiny():
    big, tiny = affine((1, 1, 1), (0, 0, 0), 0), affine((0.1, 0.1, 0.1), (50.3, 50.3, 50.3), 0)
    assert overlaps((100, 100, 100), big, (2, 2, 2), tiny)
    assert overlaps((2, 2, 2), tiny, (100, 100, 100), big)
    far = affine((1, 1, 1), (200, 0, 0), 0)
    assert not overlaps((100, 100, 100), big, (100, 100, 100), far)


def test_scaled_intensities():
    raw = raw_case()
    case = preprocess_case(raw, CONFIG)
    assert case.image.shape == (6, 16, 16, 3)
    assert case.image.dtype == np.int16
    assert case.present.tolist() == [True, True, True]
    values = case.image * STORED_UNIT
    np.testing.assert_allclose(values.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(values.std((0, 1, 2)), 1, atol=1e-3)
    sampled, _ = resample(raw.images["t2w"], (6, 16, 16), case.affine, order=1)
    clipped = np.clip(sampled, *np.percentile(sampled, (0.5, 99.5)))
    expected = (clipped - clipped.mean()) / clipped.std()
    np.testing.assert_allclose(values[..., 0], expected, atol=1e-3)
    brighter = with_image(raw, "t2w", array=raw.images["t2w"].array.astype(np.float64) * 3 + 50)
    np.testing.assert_allclose(preprocess_case(brighter, CONFIG).image, case.image, atol=1)


def test_outside_the_field_of_view_is_zero():
    raw = raw_case()
    half = raw.images["adc"]
    raw = with_image(raw, "adc", array=half.array[:, :, :7])
    case = preprocess_case(raw, CONFIG)
    _, inside = resample(raw.images["adc"], case.label.shape, case.affine, order=1)
    assert 0.2 < inside.mean() < 0.8
    assert not case.image[~inside, 1].any()
    assert abs(case.image[inside, 1].mean() * STORED_UNIT) < 1e-3


def test_labels_keep_their_place():
    case = preprocess_case(raw_case(), CONFIG)
    # The crop of 6 x 16 x 16 is centred in 8 x 24 x 24: it starts at voxel 1, 4, 4.
    expected = np.zeros((6, 16, 16), np.uint8)
    expected[2:4, 6:10, 4:9] = 1
    np.testing.assert_array_equal(case.label, expected)
    assert case.truth.shape == (2, 4, 5)
    assert case.truth_offset == (3, 10, 8)
    np.testing.assert_array_equal(case.original_truth, raw_case().label.array > 0)
    assert case.positive


def test_a_label_on_another_grid_lands_at_the_same_place():
    raw = raw_case()
    label, matrix = raw.label.array, raw.label.affine.copy()
    matrix[:3, 3] += matrix[:3, :3] @ [2, 5, 1]
    moved = with_label(raw, label[1:7, 5:20, 2:22], matrix)
    case, expected = preprocess_case(moved, CONFIG), preprocess_case(raw, CONFIG)
    np.testing.assert_array_equal(case.label, expected.label)
    np.testing.assert_array_equal(case.original_truth, expected.original_truth)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64])
def test_label_dtype_does_not_matter(dtype):
    raw = raw_case()
    case = preprocess_case(with_label(raw, raw.label.array.astype(dtype)), CONFIG)
    np.testing.assert_array_equal(case.label, preprocess_case(raw, CONFIG).label)


def test_zones_keep_their_classes():
    label = np.zeros((8, 24, 24), np.int32)
    label[3:5, 8:12, 8:16], label[3:5, 12:16, 8:16] = 1, 2
    config = dataclasses.replace(CONFIG, target="zones")
    case = preprocess_case(with_label(raw_case(), label), config)
    np.testing.assert_array_equal(np.bincount(case.label.ravel()), [6 * 256 - 128, 64, 64])
    np.testing.assert_array_equal(case.original_truth, label)


def stored_alike(raw, permutation, flips):
    """The case with all its files in another orientation."""
    return dataclasses.replace(
        raw,
        images={name: stored_in(v, permutation, flips) for name, v in raw.images.items()},
        label=stored_in(raw.label, permutation, flips),
    )


OFF_GRID = PreprocessConfig(spacing_mm=(2.7, 1.3, 1.13), size=(7, 13, 15))
"""A grid that meets no voxel of the test case: everything is interpolated, nothing ties."""


@pytest.mark.parametrize(("permutation", "flips"), ORIENTATIONS)
@pytest.mark.parametrize("grid", [SMALL, OFF_GRID], ids=["on-grid", "off-grid"])
def test_orientation_on_disk_does_not_matter(tmp_path, grid, permutation, flips):
    config = DataConfig(preprocess=grid)
    raw = raw_case()
    turned = stored_alike(raw, permutation, flips)
    expected, case = preprocess_case(raw, config), preprocess_case(turned, config)
    assert case.original_shape == turned.images["t2w"].shape
    np.testing.assert_allclose(case.affine, expected.affine, atol=1e-9)
    assert_images_agree(case.image, expected.image)
    np.testing.assert_array_equal(case.label, expected.label)
    np.testing.assert_array_equal(case.original_truth, turned.label.array > 0)
    # The prediction, written in the frame of the stored T2W file, overlays the stored label.
    restored = to_original(case.label.astype(np.float32), case) > 0.5
    write_nifti(tmp_path / "mask.nii", restored.astype(np.uint8), case.original_affine)
    saved = nib.load(tmp_path / "mask.nii")
    assert saved.shape == turned.images["t2w"].shape[::-1]
    np.testing.assert_allclose(saved.affine, turned.images["t2w"].affine, atol=1e-5)
    mask = np.asarray(saved.dataobj).T > 0
    straight = to_original(expected.label.astype(np.float32), expected) > 0.5
    in_place = stored_in(Volume(straight.astype(np.uint8), raw.label.affine), permutation, flips)
    np.testing.assert_array_equal(mask, in_place.array)
    if grid == SMALL:
        np.testing.assert_array_equal(mask, turned.label.array > 0)


def assert_images_agree(image, expected):
    """Within 1e-4 of the range, or one stored unit, which is the least that can differ."""
    difference = abs(image.astype(int) - expected)
    assert difference.max() <= max(np.ptp(expected.astype(int)) * 1e-4, 1)


def rotation(axis, degrees) -> np.ndarray:
    """A turn of the whole frame, with a shift."""
    matrix = np.eye(4)
    turn = Rotation.from_rotvec(np.deg2rad(degrees) * np.asarray(axis) / np.linalg.norm(axis))
    matrix[:3, :3] = turn.as_matrix()
    matrix[:3, 3] = (31.0, -12.5, 7.25)
    return matrix


@settings(max_examples=40, deadline=None)
@given(
    axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda a: np.linalg.norm(a) > 0.1),
    degrees=st.floats(-30, 30),
    orientation=st.sampled_from(ORIENTATIONS),
)
def test_a_turned_frame_gives_the_same_arrays(axis, degrees, orientation):
    config = DataConfig(preprocess=OFF_GRID)
    raw = raw_case()
    turn = rotation(axis, degrees)

    def turned(volume: Volume) -> Volume:
        return Volume(volume.array, turn @ volume.affine)

    other = dataclasses.replace(
        raw,
        images={name: turned(volume) for name, volume in raw.images.items()},
        label=turned(raw.label),
    )
    expected = preprocess_case(raw, config)
    case = preprocess_case(stored_alike(other, *orientation), config)
    np.testing.assert_allclose(case.affine, turn @ expected.affine, atol=1e-9)
    assert_images_agree(case.image, expected.image)
    np.testing.assert_array_equal(case.label, expected.label)


def test_real_case_in_another_orientation_gives_the_same_label(shared_data):
    config = DataConfig(name="picai", path=shared_data / "picai_mini", target="gland")
    builder = Builder(config)
    raw = builder.read_case(builder.entries[-1])
    turned = dataclasses.replace(
        raw,
        images={name: stored_in(v, (1, 2, 0), (1, 0, 1)) for name, v in raw.images.items()},
        label=stored_in(raw.label, (2, 0, 1), (0, 1, 1)),
    )
    expected, case = preprocess_case(raw, config), preprocess_case(turned, config)
    np.testing.assert_array_equal(case.label, expected.label)
    np.testing.assert_allclose(case.image, expected.image, atol=1)


def test_absent_modalities_are_marked_and_zero():
    raw = raw_case()
    raw = dataclasses.replace(raw, images={k: v for k, v in raw.images.items() if k != "adc"})
    case = preprocess_case(raw, dataclasses.replace(CONFIG, allow_missing=True))
    assert case.present.tolist() == [True, False, True]
    assert not case.image[..., 1].any()
    with pytest.raises(
        MissingDataError, match=r"every modality; got none for adc. .*allow-missing"
    ):
        preprocess_case(raw, CONFIG)
    with pytest.raises(MissingDataError, match=r"at least one of the modalities adc; got t2w, hbv"):
        preprocess_case(raw, dataclasses.replace(CONFIG, modalities=("adc",), allow_missing=True))


def test_t2w_sets_the_grid_even_if_it_is_no_input():
    raw = raw_case()
    case = preprocess_case(raw, dataclasses.replace(CONFIG, modalities=("hbv", "adc")))
    both = preprocess_case(raw, CONFIG)
    np.testing.assert_array_equal(case.image, both.image[..., [2, 1]])
    assert case.original_shape == (8, 24, 24)
    without = dataclasses.replace(raw, images={"hbv": raw.images["hbv"]})
    case = preprocess_case(without, dataclasses.replace(CONFIG, modalities=("hbv",)))
    assert case.original_shape == (8, 13, 14)


def test_negative_and_unlabelled_cases():
    case = preprocess_case(raw_case(positive=False), CONFIG)
    assert not case.positive
    assert case.truth.shape == (0, 0, 0)
    assert case.original_truth.shape == (8, 24, 24)
    unlabelled = dataclasses.replace(raw_case(), label=None)
    with pytest.raises(MissingDataError, match=r"must have a label; got none. .*empty if .*lesion"):
        preprocess_case(unlabelled, CONFIG)
    assert not preprocess_case(unlabelled, CONFIG, require_label=False).label.any()


@pytest.mark.parametrize(
    ("value", "target", "text"),
    [
        (0.5, "lesion", r"whole numbers from 0 to 255 for the target 'lesion'; got 0.5."),
        (-1, "lesion", r"got -1. Correct"),
        (np.nan, "lesion", r"got nan. Correct"),
        (3000, "gland", r"got 3000. Correct"),
        (3, "zones", r"whole numbers from 0 to 2 for the target 'zones'; got 3. Correct"),
    ],
)
def test_unexpected_label_values_are_refused(value, target, text):
    label = np.zeros((8, 24, 24))
    label[4, 4, 4] = value
    with pytest.raises(DataError, match=text):
        preprocess_case(with_label(raw_case(), label), dataclasses.replace(CONFIG, target=target))


def test_misplaced_grids_are_refused():
    raw = raw_case()
    far = raw.label.affine.copy()
    far[0, 3] += 1000
    with pytest.raises(
        DataError, match=r"'adc' must overlap the reference image; got origins \(990"
    ):
        preprocess_case(with_image(raw, "adc", affine=far), CONFIG)
    with pytest.raises(DataError, match=r"'label' must overlap the reference image"):
        preprocess_case(with_label(raw, raw.label.array, far), CONFIG)
    near = raw.label.affine.copy()
    near[:3, 3] -= 20 * near[:3, 0]
    with pytest.raises(DataError, match=r"foreground must lie within the reference image"):
        preprocess_case(with_label(raw, raw.label.array, near), CONFIG)
    corner = np.zeros_like(raw.label.array)
    corner[0, :2, :2] = 1
    with pytest.raises(DataError, match=r"reach into the crop of \(6, 16, 16\) voxels .* Enlarge"):
        preprocess_case(with_label(raw, corner), CONFIG)
    edge = raw.images["adc"].affine.copy()
    edge[:3, 3] -= 11.5 * edge[:3, 0]
    with pytest.raises(DataError, match=r"'adc' must reach into the crop .* got none of it"):
        preprocess_case(with_image(raw, "adc", affine=edge), CONFIG)


def test_unusable_images_are_refused():
    raw = raw_case()
    broken = raw.images["hbv"].array.copy()
    broken[4, 6, 6] = np.nan
    with pytest.raises(DataError, match=r"'hbv' must hold finite values; got NaN"):
        preprocess_case(with_image(raw, "hbv", array=broken), CONFIG)
    with pytest.raises(DataError, match=r"'hbv' must vary within the crop; got the constant 5"):
        preprocess_case(with_image(raw, "hbv", array=np.full_like(broken, 5)), CONFIG)


def test_results_return_to_the_original_frame():
    case = preprocess_case(raw_case(), CONFIG)
    restored = to_original(case.label.astype(np.float32), case)
    assert restored.dtype == np.float32
    np.testing.assert_array_equal(restored > 0.5, case.original_truth)
    classes = np.stack([1.0 - case.label, case.label], axis=-1)
    assert to_original(classes, case).shape == (8, 24, 24, 2)
    np.testing.assert_array_equal(to_original(classes, case)[..., 1], restored)
    assert not to_original(classes, case)[0].any()  # the crop does not reach this slice


def test_saved_results_overlay_the_original_files(shared_data, tmp_path):
    """Affine and shape equal those of the T2W file, and the mask is where the label is."""
    grid = PreprocessConfig(spacing_mm=(3.0, 1.0, 1.0), size=(20, 96, 96))
    config = DataConfig(
        name="picai", path=shared_data / "picai_mini", target="gland", preprocess=grid
    )
    builder = Builder(config)
    for entry in builder.entries:
        case = preprocess_case(builder.read_case(entry), config)
        probability = to_original(case.label.astype(np.float32), case)
        restored = (probability > 0.5).astype(np.uint8)
        write_nifti(tmp_path / "out.nii.gz", restored, case.original_affine)
        saved = nib.load(tmp_path / "out.nii.gz")
        image = sitk.ReadImage(str(entry.images["t2w"]))
        assert saved.shape == image.GetSize()
        corner = [n - 1 for n in saved.shape]
        for index in ([0, 0, 0], corner):
            x, y, z = image.TransformIndexToPhysicalPoint(index)
            np.testing.assert_allclose((saved.affine @ [*index, 1])[:3], (-x, -y, z), atol=1e-3)
        label = np.asarray(nib.load(entry.label).dataobj) > 0
        mask = np.asarray(saved.dataobj) > 0
        dice = 2 * (mask & label).sum() / (mask.sum() + label.sum())
        assert dice > 0.98


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_saved_affine_equals_that_of_the_t2w_file(tmp_path, ending):
    t2w = stored_in(raw_case().images["t2w"], (1, 0, 2), (1, 0, 1))
    save(tmp_path / f"t2w{ending}", t2w)
    raw = dataclasses.replace(
        raw_case(), images={**raw_case().images, "t2w": read_volume(tmp_path / f"t2w{ending}")}
    )
    case = preprocess_case(raw, CONFIG)
    restored = to_original(case.label.astype(np.float32), case)
    write_nifti(tmp_path / "mask.nii.gz", (restored > 0.5).astype(np.uint8), case.original_affine)
    saved = nib.load(tmp_path / "mask.nii.gz")
    assert saved.shape == t2w.shape[::-1]
    if ending == ".nii.gz":
        original = nib.load(tmp_path / "t2w.nii.gz")
        np.testing.assert_array_equal(saved.affine, original.affine)
        assert saved.shape == original.shape
    np.testing.assert_allclose(saved.affine, t2w.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(saved.dataobj).T, case.original_truth)
