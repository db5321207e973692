"""Headers of files that promise other content than there is, or content elsewhere."""

import dataclasses
import gzip
import os
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_pipelines.case import Volume
from data_pipelines.faults import DataError
from data_pipelines.nifti_folder.nifti_folder_dataset_builder import Builder
from data_pipelines.preparing.labels import label_classes, predicted_values
from data_pipelines.reading.file_checks import MAX_PADDING
from data_pipelines.reading.volume_io import read_volume
from tests.data_pipelines.fabricate import affine, raw_case, save, write_folder

HEADER = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
    "CompressedData = {compressed}\n{size}TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
    "ElementSpacing = 1 1 3\nDimSize = 24 24 8\nElementType = MET_SHORT\nElementDataFile = {data}\n"
)


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(0, 60, (8, 24, 24)).astype(np.int16)


@pytest.mark.parametrize("change", [0, -1, -400, 7])
def test_the_packed_size_of_metaimage_must_be_that_of_the_file(tmp_path, voxels, change):
    packed = zlib.compress(voxels.tobytes())
    size = f"CompressedDataSize = {len(packed) + change}\n"
    content = HEADER.format(compressed=True, size=size, data="LOCAL").encode() + packed
    (tmp_path / "v.mha").write_bytes(content)
    if change == 0:
        np.testing.assert_array_equal(read_volume(tmp_path / "v.mha").array, voxels)
        return
    with pytest.raises(DataError, match=rf"CompressedDataSize {len(packed) + change} for the"):
        read_volume(tmp_path / "v.mha")


def test_a_field_twice_is_refused(tmp_path, voxels):
    text = HEADER.format(compressed=False, size="DimSize = 8 24 24\n", data="LOCAL")
    (tmp_path / "v.mha").write_bytes(text.encode() + voxels.tobytes())
    with pytest.raises(DataError, match=r"got: the field 'DimSize' twice in its header"):
        read_volume(tmp_path / "v.mha")


@pytest.mark.parametrize("name", ["../secret.raw", "/etc/hostname", "a/../../secret.raw"])
@pytest.mark.parametrize("kind", ["mhd", "nrrd"])
def test_voxels_outside_the_folder_of_the_header_are_refused(tmp_path, voxels, name, kind):
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "secret.raw").write_bytes(voxels.tobytes())
    text = HEADER.format(compressed=False, size="", data=name)
    if kind == "nrrd":
        text = (
            "NRRD0005\ntype: short\ndimension: 3\nspace: left-posterior-superior\n"
            "sizes: 24 24 8\nspace directions: (1,0,0) (0,1,0) (0,0,3)\nendian: little\n"
            f"encoding: raw\nspace origin: (0,0,0)\ndata file: {name}\n\n"
        )
    (tmp_path / f"in/v.{kind}").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"a file of its own folder for its voxels; got '"):
        read_volume(tmp_path / f"in/v.{kind}")


def test_voxels_in_a_folder_beside_the_header_are_read(tmp_path, voxels):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/v.raw").write_bytes(voxels.tobytes())
    text = HEADER.format(compressed=False, size="", data="raw/v.raw")
    (tmp_path / "v.mhd").write_text(text, encoding="utf-8")
    np.testing.assert_array_equal(read_volume(tmp_path / "v.mhd").array, voxels)


@pytest.mark.parametrize("kind", ["mhd", "nrrd"])
def test_an_edit_of_a_detached_data_file_is_noticed(tmp_path, kind):
    raw = raw_case("a")
    config = write_folder(tmp_path / "data", raw)
    (config.path / "a/lesion.nii.gz").unlink()
    save(config.path / f"a/{'lesion.nrrd' if kind == 'nrrd' else 'lesion.mhd'}", raw.label)
    path = config.path / f"a/lesion.{kind}"
    if kind == "mhd":
        data = next(p for p in path.parent.glob("lesion.*raw"))
        text = path.read_text("utf-8").replace(data.name, f"reader1{data.suffix}")
        path.write_text(text, encoding="utf-8")
        data = data.rename(data.with_name(f"reader1{data.suffix}"))
    else:
        content = path.read_bytes()
        end = content.index(b"\n\n")
        data = path.with_name("reader1.raw")
        head = content[:end].replace(b"encoding: gzip", b"encoding: raw")
        data.write_bytes(raw.label.array.tobytes())
        path.write_bytes(head + b"\ndata file: reader1.raw\n\n")
    before = Builder(config)
    assert before.read_case(before.entries[0]).label.array.any()
    content = bytearray(data.read_bytes())
    times = data.stat().st_mtime_ns
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    os.utime(data, ns=(times, times))
    assert Builder(config).data_dir != before.data_dir


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_an_edit_of_a_label_within_one_time_stamp_is_noticed(tmp_path, ending):
    config = write_folder(tmp_path / "data", raw_case("a"), ending=ending)
    path = config.path / f"a/lesion{ending}"
    before = Builder(config).data_dir
    state = path.stat()
    label = raw_case("a").label
    save(path, Volume(np.where(label.array > 0, 2, 0).astype(label.array.dtype), label.affine))
    os.utime(path, ns=(state.st_mtime_ns, state.st_mtime_ns))
    assert Builder(config).data_dir != before


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("more", "accepted"),
    [
        (b"\0" * 512, True),
        (b"x" * 100, True),  # less than a plane that the header could have lost
        (b"x" * 512, False),
        (b"\0" * (MAX_PADDING + 1), False),
    ],
)
def test_bytes_after_the_voxels(tmp_path, voxels, packed, more, accepted):
    content = nib.Nifti1Image(voxels.T, affine()).to_bytes() + more
    path = tmp_path / ("v.nii.gz" if packed else "v.nii")
    path.write_bytes(gzip.compress(content) if packed else content)
    if not accepted:
        with pytest.raises(DataError, match=r"got: .*more than the 9216 bytes that its header"):
            read_volume(path)
        return
    np.testing.assert_array_equal(read_volume(path).array, voxels)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj).T, voxels)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), voxels)


def test_a_checksum_after_the_voxels_is_still_checked(tmp_path, voxels):
    content = bytearray(gzip.compress(nib.Nifti1Image(voxels.T, affine()).to_bytes() + bytes(512)))
    content[-6] ^= 1
    (tmp_path / "v.nii.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"must be a readable image; got: CRC check failed"):
        read_volume(tmp_path / "v.nii.gz")


def scaled(path, array, dtype):
    """As nibabel saves a floating-point array under a header of whole numbers."""
    image = nib.Nifti1Image(array.T.astype(np.float64), affine())
    image.set_data_dtype(dtype)
    nib.save(image, path)
    return nib.load(path).header.get_slope_inter()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("values", [(0, 1), (0, 1, 2), (0, 2, 3, 4, 5), (0, 255)])
def test_labels_that_nibabel_scaled_are_read_as_they_were_meant(tmp_path, dtype, values):
    meant = np.random.default_rng(0).choice(values, (8, 24, 24))
    slope, _ = scaled(tmp_path / "v.nii.gz", meant, dtype)
    read = read_volume(tmp_path / "v.nii.gz").array
    np.testing.assert_array_equal(label_classes(read, "lesion"), meant > 0)
    if max(values) == 2:
        np.testing.assert_array_equal(label_classes(read, "zones"), meant)
    assert slope is None or read.dtype.kind == "f"


def test_zones_of_a_scaled_file_keep_their_numbers_in_prostate158(tmp_path):
    """Where values of the file are exchanged, 0.996 is 1 too."""
    from data_pipelines.config import DataConfig
    from data_pipelines.prostate158.prostate158_dataset_builder import Builder as Set

    raw, folder = raw_case("a"), tmp_path / "train/020"
    for name, volume in (("t2", "t2w"), ("adc", "adc"), ("dwi", "hbv")):
        save(folder / f"{name}.nii.gz", raw.images[volume])
    meant = np.random.default_rng(0).choice(3, (8, 24, 24))
    scaled(folder / "t2_anatomy_reader1.nii.gz", meant, np.uint8)
    config = DataConfig(name="prostate158", path=tmp_path, cache=tmp_path / "c", target="zones")
    builder = Set(config)
    label = builder.read_case(builder.entries[0]).label
    np.testing.assert_array_equal(label.array, np.array([0, 2, 1])[meant])


@pytest.mark.parametrize(
    "values", [(0, 0.5, 1), (0, 0.03, 1), (0, 1.5), (0, 0.98), (-1, 0), (0, 256)]
)
def test_fractions_and_other_values_are_no_labels(values):
    array = np.random.default_rng(0).choice(values, (4, 6, 5))
    with pytest.raises(
        DataError, match=r"whole numbers from 0 to 255 for the target 'lesion'; got"
    ):
        label_classes(array, "lesion")


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([0, 1], np.uint8), np.array([0, 1], np.uint8)),
        (np.array([0, 255], np.int16), np.array([0, 1], np.uint8)),
        (np.array([0, 4.0]), np.array([0, 1], np.uint8)),
        (np.array([0, 1.00000006]), np.array([0, 1], np.uint8)),
        (np.array([0, 4e-5, 6e-5]), np.array([0, 4e-5, 6e-5])),  # each ranks its case
        (np.array([0.5, 1.00000006]), np.array([0.5, 1])),
        (np.array([0.2, 0.7], np.float32), np.array([0.2, 0.7], np.float32)),
        (np.array([0, 0], np.uint8), np.array([0, 0], np.uint8)),
        (np.array([0, 0.0], np.float32), np.array([0, 0], np.float32)),
    ],
)
def test_predictions_are_masks_or_probabilities(array, expected):
    found = predicted_values(array, "lesion")
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_probabilities_in_percent_are_no_mask(dtype):
    with pytest.raises(
        DataError, match=r"0 and one other value, .* got 101 whole numbers from 0 to"
    ):
        predicted_values(np.arange(101).astype(dtype), "lesion")


def test_identity_of_a_data_set_ignores_what_is_not_read(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"))
    before = Builder(config).data_dir
    (config.path / "a/notes.txt").write_text("seen", encoding="utf-8")
    assert Builder(config).data_dir == before
    assert Builder(dataclasses.replace(config, modalities=("T2W", "ADC", "DWI"))).data_dir == before
