"""Where voxels lie: headers that say it in unusual ways, and those that cannot be believed."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_pipelines.case import RawCase, Volume
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError
from data_pipelines.picai.picai_dataset_builder import on_t2w_grid
from data_pipelines.preparing.examination import examine
from data_pipelines.preparing.geometry import canonical, resample_label
from data_pipelines.preparing.preprocessing import preprocess_case, reference_grid
from data_pipelines.reading.volume_io import read_volume, write_nifti
from tests.data_pipelines.fabricate import SMALL, affine, raw_case

CONFIG = DataConfig(preprocess=SMALL)


def centre_mm(volume: Volume, mask: np.ndarray) -> np.ndarray:
    index = np.argwhere(mask).mean(0)[::-1]
    return volume.affine[:3, :3] @ index + volume.affine[:3, 3]


def stored_in(volume: Volume, axes: str) -> Volume:
    """The same voxels in another order and direction of axes, header right."""
    image = nib.Nifti1Image(volume.array.T, volume.affine)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
    )
    image = image.as_reoriented(turn)
    return Volume(np.asarray(image.dataobj).T, image.affine)


@pytest.mark.parametrize("axes", ["LPS", "LAS", "RPI", "LPI"])
@pytest.mark.parametrize("shift_mm", [0.0, 1.5, 4.0])
def test_a_label_in_another_orientation_stays_where_its_header_places_it(axes, shift_mm):
    raw = raw_case()
    t2w = raw.images["t2w"]
    label = stored_in(Volume((raw.label.array > 0).astype(np.uint8), t2w.affine), axes)
    label.affine[0, 3] += shift_mm
    assert label.shape == t2w.shape
    placed = on_t2w_grid(label, t2w)
    np.testing.assert_allclose(
        centre_mm(placed, placed.array > 0), centre_mm(label, label.array > 0), atol=1e-9
    )
    on_grid = resample_label(placed, t2w.shape, t2w.affine)
    expected = centre_mm(t2w, raw.label.array > 0) + np.array([shift_mm, 0, 0])
    np.testing.assert_allclose(centre_mm(t2w, on_grid), expected, atol=0.51)


def test_a_label_on_the_same_axes_is_put_on_the_grid_by_index():
    raw = raw_case()
    t2w = raw.images["t2w"]
    label = Volume(raw.label.array, t2w.affine.copy())
    label.affine[:3, 3] += [1.5, 0, 30]
    np.testing.assert_array_equal(on_t2w_grid(label, t2w).affine, t2w.affine)


@pytest.mark.parametrize("header", [np.diag([s, s, z, 1]) for s in (1.0, -1.0) for z in (1.0, 3.0)])
@pytest.mark.parametrize("part", ["label", "adc", "gland"])
def test_an_array_stored_without_its_header_is_refused(header, part):
    raw = raw_case()
    t2w = raw.images["t2w"]
    volumes = {"label": raw.label, "gland": raw.label, **raw.images, "adc": t2w}
    volumes[part] = Volume(volumes[part].array, header)
    raw = dataclasses.replace(
        raw,
        images={name: volumes[name] for name in raw.images},
        label=volumes["label"],
        gland=volumes["gland"],
    )
    with pytest.raises(DataError, match=rf"'{part}' must say where its voxels lie; got them from"):
        preprocess_case(raw, CONFIG)


@pytest.mark.parametrize(("shift_voxels", "refused"), [(10, False), (12, False), (13, True)])
def test_a_label_of_which_more_than_half_lies_outside_is_refused(shift_voxels, refused):
    raw = raw_case()
    array = np.zeros_like(raw.label.array)
    array[3:5, 10:14, 10:14] = 1  # moved by 12 voxels, half of its columns leave the 24
    label = Volume(array[:, :, :20], raw.label.affine.copy())
    label.affine[:3, 3] += label.affine[:3, 0] * shift_voxels
    raw = dataclasses.replace(raw, label=label)
    config = DataConfig(preprocess=PreprocessConfig((3.0, 1.0, 1.0), (6, 24, 24)))
    if not refused:
        assert preprocess_case(raw, config).positive
        return
    with pytest.raises(DataError, match=r"half of it at least; got 75% of the lesion outside"):
        preprocess_case(raw, config)


def test_the_largest_part_of_the_gland_places_the_crop():
    raw = raw_case()
    t2w = raw.images["t2w"]
    gland = np.zeros(t2w.shape, np.uint8)
    gland[2:6, 8:16, 6:14] = 1
    config = PreprocessConfig((3.0, 1.0, 1.0), (4, 8, 8), centre="gland")
    expected = reference_grid(t2w, config, Volume(gland, t2w.affine))
    stray = gland.copy()
    stray[0, 0, 0] = 1
    stray[7, 20:23, 20:23] = 1
    found = reference_grid(t2w, config, Volume(stray, t2w.affine))
    np.testing.assert_array_equal(found[1], expected[1])

    data = dataclasses.replace(CONFIG, preprocess=config)
    warned = {}
    for name, mask in (("clean", gland), ("stray", stray)):
        case = dataclasses.replace(raw, gland=Volume(mask, t2w.affine))
        problems = examine("a", case, [], {}, data).problems
        warned[name] = [p.text for p in problems if "one connected part" in p.text]
    assert warned["clean"] == []
    assert "got 3, the largest of 0.768 ml and 0.03 ml in the others" in warned["stray"][0]


def test_a_gland_mask_outside_the_image_is_refused():
    raw = raw_case()
    gland = Volume((raw.label.array > 0).astype(np.uint8), raw.label.affine.copy())
    gland.affine[0, 3] += 14
    config = dataclasses.replace(SMALL, centre="gland")
    with pytest.raises(DataError, match=r"mask of the gland must lie within .* 60% of it outside"):
        preprocess_case(
            dataclasses.replace(raw, gland=gland), dataclasses.replace(CONFIG, preprocess=config)
        )


def test_a_slice_between_planes_gets_a_remedy_that_helps():
    raw = raw_case()
    thin = {name: Volume(v.array[:1], affine((1.0, 1.0, 1.0))) for name, v in raw.images.items()}
    label = Volume(np.zeros((1, 24, 24), np.uint8), affine((1.0, 1.0, 1.0)))
    flat = RawCase("a", "a", thin, label)
    config = DataConfig(preprocess=PreprocessConfig((3.0, 1.0, 1.0), (6, 12, 12)))
    with pytest.raises(DataError, match=r"Use --data.preprocess.spacing-mm 1 1 1\.") as caught:
        preprocess_case(flat, config)
    assert "'t2w' must hold at least one plane of the reference grid; got a volume of 1" in str(
        caught.value
    )
    finer = PreprocessConfig((1.0, 1.0, 1.0), (6, 12, 12))
    assert preprocess_case(flat, DataConfig(preprocess=finer)).image.any()


def sheared() -> np.ndarray:
    matrix = affine((3.0, 1.0, 1.0))
    matrix[:3, 2] += [0, 0.3, 0]
    return matrix


def test_a_sheared_mask_lies_in_one_place(tmp_path):
    mask = np.zeros((8, 24, 24), np.uint8)
    mask[2:5, 8:12, 9:13] = 1
    write_nifti(tmp_path / "sheared.nii.gz", mask, sheared())
    image = nib.load(tmp_path / "sheared.nii.gz")
    np.testing.assert_allclose(image.affine, sheared(), atol=1e-5)
    assert image.get_qform(coded=True) == (None, 0), "a qform would place it elsewhere"
    read = read_volume(tmp_path / "sheared.nii.gz")
    np.testing.assert_allclose(read.affine, sheared(), atol=1e-5)
    np.testing.assert_array_equal(read.array, mask)
    with pytest.raises(RuntimeError, match="orthonormal"):  # ITK: in no place rather than another
        sitk.ReadImage(str(tmp_path / "sheared.nii.gz"))

    write_nifti(tmp_path / "straight.nii.gz", mask, affine())
    itk = sitk.ReadImage(str(tmp_path / "straight.nii.gz"))
    x, y, z = itk.TransformIndexToPhysicalPoint((23, 22, 7))
    np.testing.assert_allclose((affine() @ [23, 22, 7, 1])[:3], (-x, -y, z), atol=1e-4)


def nifti(path, *, scale=1.0, **fields):
    """T2W with an affine in another unit, and header fields set."""
    volume = raw_case().images["t2w"]
    matrix = volume.affine.copy()
    matrix[:3] *= scale
    image = nib.Nifti1Image(volume.array.T, matrix)
    image.set_qform(matrix, 1)
    image.set_sform(matrix, 1)
    content = bytearray(image.to_bytes())
    view = np.frombuffer(content, nib.Nifti1Header.template_dtype, count=1)
    for name, value in fields.items():
        view[0][name] = value
    path.write_bytes(content)
    return volume


@pytest.mark.parametrize(
    ("code", "scale"), [(0, 1.0), (1, 1e-3), (1 + 8, 1e-3), (2, 1.0), (2 + 16, 1.0), (3, 1e3)]
)
def test_units_of_length_are_applied(tmp_path, code, scale):
    volume = nifti(tmp_path / "v.nii", scale=scale, xyzt_units=code)
    read = read_volume(tmp_path / "v.nii")
    np.testing.assert_allclose(read.affine, volume.affine, atol=1e-4)
    np.testing.assert_array_equal(read.array, volume.array)


def test_a_unit_that_cannot_be_meant_is_named(tmp_path):
    nifti(tmp_path / "v.nii", xyzt_units=1)
    with pytest.raises(DataError, match=r"0.01 to 200 mm; got 1e\+03, .* whose unit is the metre"):
        read_volume(tmp_path / "v.nii")


@pytest.mark.parametrize(
    ("fields", "came"),
    [
        ({"quatern_b": 0, "quatern_c": 1.000001, "quatern_d": 0}, None),
        ({"quatern_b": 0, "quatern_c": 0, "quatern_d": 1.000001}, None),  # elsewhere; sform wins
        ({"quatern_b": 0, "quatern_c": 1.2, "quatern_d": 0}, None),
        ({"quatern_c": 1.000001, "sform_code": 0}, None),
        ({"pixdim": (0, 1, 1, 3, 0, 0, 0, 0)}, None),
        ({"quatern_c": 1.2, "sform_code": 0}, r"quaternion has the length 1.2"),
        ({"sform_code": 6}, None),  # no code of the format, which counts as none: the other holds
        ({"qform_code": 6, "quatern_c": 0.5}, None),
        ({"sform_code": 6, "quatern_c": 1.2}, r"quaternion has the length 1.2"),
    ],
)
def test_quaternion_and_handedness_as_other_readers_take_them(tmp_path, fields, came):
    path = tmp_path / "v.nii"
    turned = np.diag([-1.0, 1.0, -1.0, 1.0])  # the quaternion 0 1 0
    volume = Volume(raw_case().images["t2w"].array, turned @ np.diag([1.0, 1.0, 3.0, 1.0]))
    image = nib.Nifti1Image(volume.array.T, volume.affine)
    image.set_qform(volume.affine, 1)
    image.set_sform(volume.affine, 1)
    content = bytearray(image.to_bytes())
    view = np.frombuffer(content, nib.Nifti1Header.template_dtype, count=1)
    for name, value in fields.items():
        view[0][name] = value
    path.write_bytes(content)
    if came:
        with pytest.raises(DataError, match=came):
            read_volume(path)
        return
    read = read_volume(path)
    np.testing.assert_allclose(read.affine, volume.affine, atol=1e-5)
    itk = sitk.ReadImage(str(path))
    x, y, z = itk.TransformIndexToPhysicalPoint((5, 4, 3))
    np.testing.assert_allclose((read.affine @ [5, 4, 3, 1])[:3], (-x, -y, z), atol=1e-4)
    np.testing.assert_array_equal(read.array, sitk.GetArrayFromImage(itk))


@pytest.mark.parametrize("ending", ["mha", "mhd", "nrrd"])
def test_other_formats_in_another_unit_are_refused(tmp_path, ending):
    path = tmp_path / f"v.{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 6, 5), np.uint8)), str(path))
    content = path.read_bytes()
    line = b"DistanceUnits = cm\n" if ending != "nrrd" else b'space units: "cm" "cm" "cm"\n'
    start = content.index(b"\n") + 1
    path.write_bytes(content[:start] + line + content[start:])
    with pytest.raises(DataError, match=r"must give lengths in millimetres; got .* 'cm'"):
        read_volume(path)


@pytest.mark.parametrize("stored", [0, 1, 2])
def test_canonical_does_not_move_a_voxel(stored):
    volume = raw_case().images["t2w"]
    turned = stored_in(volume, ("RAS", "LPI", "SPL")[stored])
    again = canonical(turned)
    np.testing.assert_allclose(again.affine, canonical(volume).affine, atol=1e-9)
    np.testing.assert_array_equal(again.array, canonical(volume).array)
