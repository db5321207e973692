"""Layouts on disk: folders of users, nnU-Net's, and that of PI-CAI."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from data_pipelines.case import CaseInfo
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.modalities import modality_of
from data_pipelines.nifti_folder.nifti_folder_dataset_builder import Builder as FolderBuilder
from data_pipelines.picai.picai_dataset_builder import Builder as PicaiBuilder
from tests.data_pipelines.fabricate import SMALL, raw_case, save, write_dicom, write_folder
from tests.data_pipelines.test_builders import assert_same, build


def test_missing_folders_are_named(tmp_path):
    config = DataConfig(name="nifti_folder", cache=tmp_path / "cache", preprocess=SMALL)
    with pytest.raises(DataError, match=r"'nifti_folder' needs a folder; pass --data.path FOLDER"):
        FolderBuilder(config)
    config = dataclasses.replace(config, path=tmp_path / "nowhere")
    with pytest.raises(MissingDataError, match=r"no folder at .*nowhere. Check --data.path"):
        FolderBuilder(config)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(MissingDataError, match=r"a folder for each case, or imagesTr; found no"):
        FolderBuilder(config)
    with pytest.raises(MissingDataError, match=r"needs the folder 'images'"):
        PicaiBuilder(config)
    (tmp_path / "nowhere/images").mkdir()
    with pytest.raises(MissingDataError, match=r"needs the folder 'labels' .* Clone https"):
        PicaiBuilder(config)
    (tmp_path / "nowhere/labels").mkdir()
    with pytest.raises(MissingDataError, match=r"<modality>.mha; found none for t2w, adc, hbv"):
        PicaiBuilder(config)
    assert not config.cache.exists()


def test_other_names_of_modalities():
    wanted = ("t2w", "adc", "hbv", "dce")
    for name, modality in {
        "T2W": "t2w",
        "t2_tse": "t2w",
        "ADC": "adc",
        "DWI": "hbv",
        "High B": "hbv",
        "high-b-value": "hbv",
        "DCE": "dce",
        "cor": None,
    }.items():
        assert modality_of(name, wanted) == modality


def test_folder_layout_details(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b"), label="label")
    folder = config.path / "a"
    (folder / "hbv.nii.gz").rename(folder / "DWI.nii.gz")
    save(folder / "gland.nii.gz", raw_case().label)
    (folder / "notes.txt").touch()
    (config.path / ".hidden").mkdir()
    (config.path / "patients.csv").write_text(
        "case,patient,age\na,p1,60\nb,p1,61\n", encoding="utf-8"
    )
    entries = FolderBuilder(config).entries
    assert [(e.case_id, e.patient_id) for e in entries] == [("a", "p1"), ("b", "p1")]
    assert entries[0].images["hbv"].name == "DWI.nii.gz"
    assert entries[0].label.name == "label.nii.gz"
    gland = FolderBuilder(dataclasses.replace(config, target="gland")).entries
    assert gland[0].label.name == "gland.nii.gz"
    assert gland[1].label.name == "label.nii.gz"


def test_endings_may_be_in_upper_case(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"))
    for name in ("t2w", "lesion"):
        (config.path / f"a/{name}.nii.gz").rename(config.path / f"a/{name.upper()}.NII.GZ")
    _, cases = build(config)
    assert cases["a"].present.all()
    assert cases["a"].positive


def test_two_files_for_one_modality_are_refused(tmp_path):
    config = write_folder(tmp_path / "data", raw_case())
    save(config.path / "a" / "adc.mha", raw_case().images["adc"])
    save(config.path / "a" / "lesion.mha", raw_case().label)
    with pytest.raises(DataError) as caught:
        FolderBuilder(config).prepare()
    assert "one file for 'adc'; got adc.mha, adc.nii.gz in" in str(caught.value)
    assert "one file for 'lesion'; got lesion.mha, lesion.nii.gz in" in str(caught.value)


def test_faulty_patient_tables_are_refused(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b"))
    table = config.path / "patients.csv"
    table.write_text("case,patient\na,p1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"patient of every case; got none for b. Add the rows"):
        FolderBuilder(config)
    table.write_text("name,patient\na,p1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"columns case and patient; got name, patient"):
        FolderBuilder(config)
    table.write_text("case,patient\na,p1\nb,p2\na,p3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"one row for a case; got several for a. Remove all but"):
        FolderBuilder(config)
    table.unlink()
    table.symlink_to("nowhere.csv")  # not the same as no table: each case would be a patient
    with pytest.raises(DataError, match=r"patients.csv must be a readable file; got: No such file"):
        FolderBuilder(config)


def test_blanks_in_a_table_part_no_patient(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b"))
    (config.path / "patients.csv").write_text(
        " case , patient,group\na , p1, north\nb,p1 ,north \n", encoding="utf-8"
    )
    entries = FolderBuilder(config).entries
    assert [(e.patient_id, e.metadata) for e in entries] == [("p1", {"group": "north"})] * 2


def test_cases_without_a_modality_can_be_allowed(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b"))
    (config.path / "b" / "t2w.nii.gz").unlink()
    _, cases = build(dataclasses.replace(config, allow_missing=True))
    assert cases["a"].present.tolist() == [True, True, True]
    assert cases["b"].present.tolist() == [False, True, True]
    assert cases["b"].original_shape == (8, 13, 14)


def write_nnunet(root, *cases, description=None) -> DataConfig:
    for case in cases:
        for number, name in enumerate(("hbv", "t2w", "adc")):
            save(root / f"imagesTr/{case.case_id}_{number:04d}.nii.gz", case.images[name])
        save(root / f"labelsTr/{case.case_id}.nii.gz", case.label)
    content = {"channel_names": {"0": "High_B", "1": "T2W", "2": "ADC"}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(
        json.dumps(content if description is None else description), encoding="utf-8"
    )
    return DataConfig(name="nifti_folder", path=root, cache=root.parent / "cache", preprocess=SMALL)


def test_nnunet_layout_gives_the_same_cases(tmp_path):
    raws = raw_case("p1_s1"), raw_case("p2_s1", seed=1)
    _, cases = build(write_nnunet(tmp_path / "nnunet", *raws))
    _, expected = build(write_folder(tmp_path / "folders", *raws))
    assert list(cases) == ["p1_s1", "p2_s1"]
    for case_id, case in cases.items():
        assert_same(case, expected[case_id])


def test_nnunet_labels_without_an_image_are_warned_of(tmp_path):
    config = write_nnunet(tmp_path / "data", raw_case("a"))
    shutil.copy(config.path / "labelsTr/a.nii.gz", config.path / "labelsTr/B_1.nii.gz")
    (config.path / "labelsTr/._a.nii.gz").touch()
    builder, cases = build(config)
    assert list(cases) == ["a"]
    (problem,) = builder.check_list()
    assert (problem.case_id, problem.level) == ("B_1", "warning")
    assert "B_1.nii.gz should have images; got none for it in" in problem.text


def test_hidden_files_are_no_cases(tmp_path):
    nnunet = write_nnunet(tmp_path / "nnunet", raw_case("a"))
    (nnunet.path / "imagesTr/._a_0000.nii.gz").write_bytes(b"of a Mac")
    assert [entry.case_id for entry in FolderBuilder(nnunet).entries] == ["a"]
    folder = tmp_path / "picai/images/1"
    folder.mkdir(parents=True)
    (tmp_path / "picai/labels").mkdir()
    for name in ("1_100_t2w.mha", "._1_100_t2w.mha", ".1_100_adc.mha"):
        (folder / name).touch()
    entries = PicaiBuilder(dataclasses.replace(nnunet, path=tmp_path / "picai")).entries
    assert [entry.case_id for entry in entries] == ["1_100"]
    assert [*entries[0].images] == ["t2w"]


def test_nnunet_version_1_and_its_missing_files(tmp_path):
    description = {"modality": {"0": "dwi", "1": "T2", "2": "Adc"}}
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    assert list(FolderBuilder(config).entries[0].images) == ["t2w", "adc", "hbv"]
    (config.path / "imagesTr/a_0002.nii.gz").unlink()
    (config.path / "labelsTr/a.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        FolderBuilder(config).prepare()
    assert "got no 'adc', looked for a_0002.nii.gz in" in str(caught.value)
    assert "got none, looked for" in str(caught.value)
    assert "labelsTr/a.nii.gz" in str(caught.value)


@pytest.mark.parametrize(
    ("description", "text"),
    [
        ({}, r'must hold "channel_names", such as .* got None'),
        ([], r"must hold an object; got \[\]"),
        ({"channel_names": {"0": "CT"}}, r"a wanted channel \(t2w, adc, hbv\); got CT"),
        (
            {"channel_names": {"0": "T2", "1": "t2_tse"}},
            r"once; got 't2w' again as channel 1 \(t2_t",
        ),
    ],
)
def test_faulty_dataset_json_is_refused(tmp_path, description, text):
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    with pytest.raises(DataError, match=text):
        FolderBuilder(config)


def test_unreadable_dataset_json_is_refused(tmp_path):
    config = write_nnunet(tmp_path / "data", raw_case("a"))
    (config.path / "dataset.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset.json must be JSON"):
        FolderBuilder(config)
    (config.path / "dataset.json").unlink()
    with pytest.raises(MissingDataError, match=r"needs dataset.json, which names the channels"):
        FolderBuilder(config)


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "TZ": 1, "PZ": 2},
        {"0": "background", "1": "tz", "2": "pz"},
        {"transition_zone": 1, "peripheral_zone": 2},
    ],
)
def test_zones_in_another_order_are_refused(tmp_path, labels):
    description = {"channel_names": {"0": "DWI", "1": "T2W", "2": "ADC"}, "labels": labels}
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    assert FolderBuilder(dataclasses.replace(config, target="gland")).entries  # zones make it up
    message = (
        r"number the classes of 'zones' as {'pz': 1, 'tz': 2}; got .*. "
        r'Renumber the labels, in labelsTr and in "labels", or choose another --data.target.'
    )
    with pytest.raises(DataError, match=message):
        FolderBuilder(dataclasses.replace(config, target="zones"))


@pytest.mark.parametrize("names", [("PZ", "tz"), ("peripheral_zone", "Transitional Zone")])
def test_zones_go_by_short_and_long_names(tmp_path, names):
    description = {"channel_names": {"0": "DWI", "1": "T2W", "2": "ADC"}}
    description["labels"] = {"background": 0, names[0]: 1, names[1]: 2}
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    assert FolderBuilder(dataclasses.replace(config, target="zones")).entries


def test_zones_of_unknown_names_are_to_be_renamed(tmp_path):
    description = {"channel_names": {"0": "T2W"}, "labels": {"background": 0, "outer": 1, "tz": 2}}
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    message = (
        r"got {'background': 0, 'outer': 1, 'tz': 2}. Rename the labels, and renumber them if they "
        r"differ, or choose another --data.target."
    )
    with pytest.raises(DataError, match=message):
        FolderBuilder(dataclasses.replace(config, target="zones"))


@pytest.mark.parametrize(
    ("target", "labels", "text"),
    [
        ("lesion", {"PZ": 1, "TZ": 2}, r"than the target 'lesion', .* got PZ, TZ. Choose another"),
        ("lesion", {"Peripheral Zone": 1}, r"got Peripheral Zone. Choose another --data.target"),
        ("lesion", {"prostate": 1, "csPCa": 2}, r"got prostate. Make it so with value 2 set to 1"),
        ("lesion", {"benign": 1, "cancer": 2}, r"got benign. Make it so with value 2 set to 1 and"),
        ("lesion", {"lesion": 1, "ignore": 2}, r"got ignore. Make it so with value 1 set to 1 and"),
        ("lesion", {"whole-gland": [1, 2], "lesion": 2}, r"got whole-gland. Make .* value 2 set"),
        ("gland", {"prostate": 1, "bladder": 2}, r"the target 'gland', .* got bladder. Make it so"),
        ("gland", {"lesion": 1}, r"the target 'gland', .* got lesion. Choose another"),
        ("lesion", {"lesion": 1}, None),
        ("lesion", {"csPCa": 1}, None),
        ("lesion", {"index lesion": 1}, None),
        ("lesion", {"ISUP 2": 2, "ISUP 3": 3, "ISUP 4": 4}, None),
        ("lesion", {"tumor": 1, "cspca": 2}, None),
        ("gland", {"CG": 1, "PZ": 2}, None),
    ],
)
def test_labels_of_another_structure_are_refused(tmp_path, target, labels, text):
    description = {"channel_names": {"0": "DWI", "1": "T2W", "2": "ADC"}}
    description["labels"] = {"background": 0, **labels}
    root = tmp_path / "data"
    (root / "imagesTr").mkdir(parents=True)
    (root / "imagesTr/a_0000.nii.gz").touch()
    config = dataclasses.replace(write_nnunet(root, description=description), target=target)
    if text is None:
        assert FolderBuilder(config).entries
    else:
        with pytest.raises(DataError, match=text):
            FolderBuilder(config)


PICAI_PATIENTS = ("10000", "10021", "10574", "10795", "11373")


@pytest.mark.parametrize(
    ("target", "volumes_ml"),
    [
        ("lesion", (0, 8.73, 0, 0, 0.31)),
        ("gland", (35.7, 63.9, 41.4, 32.2, 44.3)),
        ("zones", (36.3, 64.1, 42.9, 33.4, 45.0)),
    ],
)
def test_real_patients(shared_data, tmp_path, target, volumes_ml):
    config = DataConfig(
        name="picai", path=shared_data / "picai_mini", target=target, cache=tmp_path
    )
    built, cases = build(config, PicaiBuilder)
    assert tuple(info.patient_id for info in built.infos) == PICAI_PATIENTS
    assert [info.positive for info in built.infos] == [ml > 0 for ml in volumes_ml]
    for case, volume in zip(cases.values(), volumes_ml, strict=True):
        voxel_ml = abs(np.linalg.det(case.original_affine[:3, :3])) / 1000
        assert (case.original_truth > 0).sum() * voxel_ml == pytest.approx(volume, abs=0.06)
        on_grid = (case.label > 0).sum() * np.prod(config.preprocess.spacing_mm) / 1000
        assert on_grid == pytest.approx(volume, rel=0.05, abs=0.03)
        assert case.label.max() <= len(config.classes)
        assert case.image.shape == (*config.preprocess.size, 3)
        assert case.present.all()
    if target == "zones":  # the peripheral zone lies behind the transition zone
        for case in cases.values():
            rows = [np.argwhere(case.label == i)[:, 1].mean() for i in (1, 2)]
            assert rows[0] < rows[1]


def test_labels_of_people_go_before_those_of_an_ai(shared_data, tmp_path):
    config = DataConfig(name="picai", path=shared_data / "picai_mini", cache=tmp_path / "cache")
    entry = PicaiBuilder(config).entries[1]
    assert entry.case_id == "10021_1000021"
    assert entry.metadata["label_source"] == "csPCa_lesion_delineations/human_expert/resampled"
    assert entry.metadata["center"] == "RUMC"
    assert entry.metadata["case_ISUP"] == "3"


def test_picai_layout_details(tmp_path):
    root = tmp_path / "picai"
    lesions = root / "picai_labels/csPCa_lesion_delineations"
    for case_id, fold in (("1_100", 0), ("1_101", 3)):
        raw = raw_case(case_id)
        for name, volume in raw.images.items():
            save(root / f"public_images_fold{fold}/1/{case_id}_{name}.mha", volume)
        save(root / f"public_images_fold{fold}/1/{case_id}_sag.mha", raw.images["t2w"])
    save(lesions / "AI/Bosma22a/1_100.nii.gz", raw_case().label)
    save(lesions / "human_expert/original/1_100.nii.gz", raw_case(positive=False).label)
    config = DataConfig(name="picai", path=root, cache=tmp_path / "cache", preprocess=SMALL)
    with pytest.raises(DataError) as caught:
        PicaiBuilder(config).prepare()
    assert "faults: 1, cases: 2" in str(caught.value)
    assert "- 1_101: a case must have a label for the target 'lesion'" in str(caught.value)
    save(lesions / "AI/Bosma22a/1_101.nii.gz", raw_case().label)
    built, _ = build(config, PicaiBuilder)
    assert built.infos == (CaseInfo("1_100", "1", False), CaseInfo("1_101", "1", True))


def test_a_table_of_patients_groups_and_availability(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b"))
    table = config.path / "patients.csv"
    table.write_text("case,patient,group,available\na,p1,north,T2 adc\nb,p2,,\n", encoding="utf-8")
    config = dataclasses.replace(config, allow_missing=True)
    built, cases = build(config)
    assert cases["a"].present.tolist() == [True, True, False]
    assert cases["b"].present.tolist() == [True, True, True]
    stored = json.loads((built.data_path / "cases.json").read_text("utf-8"))["cases"]
    assert [case["metadata"] for case in stored] == [{"group": "north"}, {}]
    (config.path / "a/adc.nii.gz").unlink()
    with pytest.raises(DataError, match=r"calls available must have a file; got none for 'adc'"):
        FolderBuilder(config).prepare()
    table.write_text("case,patient,available\na,p1,t2w pet\nb,p2,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"modalities in the column available, .* got pet. Use"):
        FolderBuilder(config)


def test_dicom_folders_and_a_gland_mask_in_a_case_folder(tmp_path):
    raw = raw_case("a")
    config = write_folder(tmp_path / "data", raw)
    folder = config.path / "a"
    (folder / "hbv.nii.gz").unlink()
    write_dicom(
        folder / "DWI", dataclasses.replace(raw.images["hbv"], array=raw.images["adc"].array)
    )
    save(folder / "gland.nii.gz", raw.label)
    entry = FolderBuilder(config).entries[0]
    assert entry.images["hbv"] == folder / "DWI"
    assert entry.gland is None  # not asked for
    _, cases = build(config)
    np.testing.assert_allclose(cases["a"].image[..., 2], cases["a"].image[..., 1], atol=2)
    around = dataclasses.replace(config, preprocess=dataclasses.replace(SMALL, centre="gland"))
    assert FolderBuilder(around).entries[0].gland == folder / "gland.nii.gz"
    state = FolderBuilder(config).data_dir
    (folder / "DWI" / "slice000.dcm").touch()
    assert FolderBuilder(config).data_dir != state
