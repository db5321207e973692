"""Which file means what, and who is who: names of modalities, labels, cases and patients."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_pipelines.building.validation import validate
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.modalities import by_modality, standard_names
from data_pipelines.msd_prostate.msd_prostate_dataset_builder import Builder as TaskBuilder
from data_pipelines.nifti_folder.nifti_folder_dataset_builder import Builder
from data_pipelines.prostate158.prostate158_dataset_builder import Builder as Prostate158Builder
from data_pipelines.reading.case_files import check_patients
from experiments.prediction.inputs import find_inputs
from tests.data_pipelines.fabricate import SMALL, affine, raw_case, save, write_folder
from tests.data_pipelines.test_layouts import write_nnunet

CHANNELS = {"0": "High_B", "1": "T2W", "2": "ADC"}


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        (("T2W", "ADC", "HBV"), ("t2w", "adc", "hbv")),
        (("t2", "adc_map", "dwi"), ("t2w", "adc", "hbv")),
        (("t2w,adc",), ("t2w", "adc")),
        (("t2w, adc", "High-B"), ("t2w", "adc", "hbv")),
        (("hbv", "dwi"), ("hbv", "dwi")),
        (("T2W", "DCE"), ("t2w", "dce")),
    ],
)
def test_modalities_as_people_type_them(typed, names):
    assert standard_names(typed) == names
    assert DataConfig(modalities=typed).modalities == names


@pytest.mark.parametrize("typed", [(), ("",), ("t2w", "T2W")])
def test_modalities_that_cannot_be_meant_are_refused(typed):
    with pytest.raises(DataError, match=r"one modality, and each once; got .* Write --data"):
        DataConfig(modalities=typed)


def test_capitals_and_aliases_find_the_files(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b", seed=1))
    for old, new in (("a/t2w", "a/T2W"), ("a/hbv", "a/HBV"), ("b/t2w", "b/t2"), ("b/hbv", "b/dwi")):
        (config.path / f"{old}.nii.gz").rename(config.path / f"{new}.nii.gz")
    for typed in (("T2W", "ADC", "HBV"), ("t2", "adc", "dwi")):
        builder = Builder(dataclasses.replace(config, modalities=typed))
        assert [*builder.entries[1].images] == ["t2w", "adc", "hbv"]
        assert validate(builder).num_errors == 0


def test_the_very_name_goes_before_an_alias():
    wanted = ("t2w", "hbv")
    files = [("DWI", 1), ("hbv", 2), ("t2", 3), ("high_b", 4)]
    assert by_modality(files, wanted) == ({"hbv": [2], "t2w": [3]}, [1, 4])
    assert by_modality(files, ("hbv", "dwi")) == ({"dwi": [1], "hbv": [2]}, [3, 4])


def test_a_name_before_an_alias_in_every_layout_and_command(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"))
    save(config.path / "a/dwi.nii.gz", raw_case(seed=5).images["hbv"])
    builder = Builder(config)
    assert builder.entries[0].images["hbv"].name == "hbv.nii.gz"
    (warning,) = validate(builder).problems
    assert "got dwi.nii.gz, of which nothing is read" in warning.text
    (case,) = find_inputs(config.path, config.modalities)
    assert case.images["hbv"].name == "hbv.nii.gz"
    (said,) = case.problems
    assert said.level == "warning"
    assert "got dwi.nii.gz, of which nothing is read" in said.text

    nnunet = write_nnunet(
        tmp_path / "nnunet",
        raw_case("a"),
        description={"channel_names": {"0": "DWI", "1": "T2W", "2": "ADC", "3": "hbv"}},
    )
    save(nnunet.path / "imagesTr/a_0003.nii.gz", raw_case().images["hbv"])
    assert Builder(nnunet).entries[0].images["hbv"].name == "a_0003.nii.gz"
    (case,) = find_inputs(nnunet.path / "imagesTr", config.modalities)
    assert case.images["hbv"].name == "a_0003.nii.gz"


@pytest.mark.parametrize("name", ["lesion_2.nii.gz", "lesion2.mha", "finding.nrrd", "._x/y", None])
def test_files_of_a_case_that_nothing_reads_are_named(tmp_path, name):
    config = write_folder(tmp_path / "data", raw_case("a"))
    save(config.path / "a/zones.nii.gz", raw_case().label)  # of another target
    (config.path / "a/._adc.nii.gz").write_bytes(b"of a Mac")
    if name and "/" not in name:
        save(config.path / "a" / name, raw_case().label)
    warnings = validate(Builder(config)).problems
    if name is None or "/" in name:
        assert warnings == []
    else:
        assert [p.level for p in warnings] == ["warning"]
        assert f"every volume of a case should be used; got {name}, of which" in warnings[0].text


def test_prostate158_names_files_that_it_does_not_know(tmp_path):
    folder = tmp_path / "train/020"
    for name in ("t2", "adc", "dwi", "t2_tumor_reader1", "adc_tumor_reader2", "tumor_new"):
        save(folder / f"{name}.nii.gz", raw_case().label)
    config = DataConfig(name="prostate158", path=tmp_path, cache=tmp_path / "cache")
    (problem,) = Prostate158Builder(config).entries[0].problems
    assert "got tumor_new.nii.gz, of which nothing is read" in problem.text


@pytest.mark.parametrize(
    ("names", "level"),
    [
        (("P01", "p01"), "error"),
        (("02", "2"), "error"),
        (("3", "3.0"), "error"),
        (("Müller", "Mu\u0308ller"), "error"),
        (("P01", "P1"), "warning"),
        (("a_1", "A-01"), "warning"),
        (("p1", "p10", "p100", "p2"), None),
        (("1", "10", "0.5", "a1"), None),
        (("x", "x_1"), None),
    ],
)
def test_patients_written_in_two_ways_are_said(names, level):
    problems = check_patients(names)
    assert [problem.level for problem in problems] == ([level] if level else [])
    if problems:
        assert "got " + ", ".join(sorted(names)) in problems[0].text


def test_a_table_with_a_patient_written_in_two_ways_is_refused(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b", seed=1))
    (config.path / "patients.csv").write_text("case,patient\na,P01\nb,p01\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"written in one way in all cases, .* got P01, p01"):
        Builder(config).prepare()


def test_a_modality_that_no_case_has_is_refused(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b", seed=1))
    config = dataclasses.replace(config, allow_missing=True)
    (config.path / "a/adc.nii.gz").unlink()
    assert validate(Builder(config)).num_errors == 0
    (config.path / "b/adc.nii.gz").rename(config.path / "b/ct.nii.gz")
    with pytest.raises(DataError, match=r"got no 'adc' in any of 2, .* --data.modalities t2w hbv"):
        Builder(config).prepare()


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({"csPCa lesion": 1, "ignore": 2}, r"got ignore. Make it so with value 1 set to 1"),
        ({"ROI": 1, "Ignore": 2}, r"got Ignore. Make it so"),
        ({"foreground": 1, "ignore": 2}, r"no voxels that are to be ignored .* got ignore with"),
        ({"ignore": 1}, r"no voxels that are to be ignored"),
        ({"bladder": 1}, r"got bladder. Choose another --data.target, or rename it \(lesion\)"),
        ({"lesion": [1, 2]}, r"must give each label one value; got the region lesion of \[1, 2\]"),
        ({"lesion": 0, "background": 1}, r"the background the value 0; got it for 'lesion'"),
        ({f"lesion_area{n}": n for n in range(1, 6)}, None),
        ({"ROI": 3}, None),
        ({"foreground": 3}, None),
        ({"3": "PI-RADS 4", "4": "PI-RADS 5"}, None),
    ],
)
def test_labels_that_are_not_the_target_are_refused(tmp_path, labels, text):
    description = {"channel_names": CHANNELS, "labels": {"background": 0, **labels}}
    if "3" in labels:
        description["labels"] = {"0": "background", **labels}
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    if text is None:
        assert validate(Builder(config)).num_errors == 0
    else:
        with pytest.raises(DataError, match=text):
            Builder(config)


def test_values_without_a_name_are_refused(tmp_path):
    description = {"channel_names": CHANNELS, "labels": {"background": 0, "lesion": 1}}
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)  # holds a 3
    with pytest.raises(DataError, match=r"must hold the values that dataset.json names; got 3"):
        Builder(config).prepare()
    description["labels"] = {"background": 0, "lesion": 3}
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    assert validate(Builder(config)).num_errors == 0


def test_zones_with_voxels_to_ignore_are_refused(tmp_path):
    labels = {"background": 0, "pz": 1, "tz": 2, "ignore": 3}
    description = {"channel_names": CHANNELS, "labels": labels}
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    with pytest.raises(DataError, match=r"no voxels that are to be ignored"):
        Builder(dataclasses.replace(config, target="zones"))


def listed(*case_ids, labels="labelsTr", **more):
    return {
        "channel_names": CHANNELS,
        "training": [
            {"image": f"./imagesTr/{c}.nii.gz", "label": f"./{labels}/{c}.nii.gz"} for c in case_ids
        ],
        **more,
    }


def test_the_list_of_training_cases_is_followed(tmp_path):
    raws = [raw_case(f"p{n}", seed=n) for n in range(3)]
    description = listed("p0", "p2", labels="labelsTr_v2", numTraining=2)
    config = write_nnunet(tmp_path / "data", *raws, description=description)
    for n in (0, 2):
        save(config.path / f"labelsTr_v2/p{n}.nii.gz", raw_case(positive=False).label)
    builder = Builder(config)
    assert [(e.case_id, e.label.parent.name) for e in builder.entries] == [
        ("p0", "labelsTr_v2"),
        ("p2", "labelsTr_v2"),
    ]
    problems = validate(builder).problems
    assert {p.level for p in problems} == {"warning"}
    assert any('should be in the list "training"' in p.text and p.case_id == "p1" for p in problems)


@pytest.mark.parametrize(
    ("description", "text"),
    [
        (listed("a", numTraining=2), r'"numTraining" says; got 1 and 2. Correct'),
        (listed("a", "a"), r'list each case once in "training"; got a again'),
        (listed("a", labels="../other"), r"files below its own folder; got './../other/a.nii.gz'"),
        (listed("a", training=["a.nii.gz"]), r'list image and label of each case in "training"'),
        ({"channel_names": CHANNELS, "dataset": {}}, r'got a list "dataset", which is not read'),
    ],
)
def test_lists_that_cannot_be_followed_are_refused(tmp_path, description, text):
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    with pytest.raises(DataError, match=text):
        Builder(config)


def test_a_listed_case_without_images_is_an_error(tmp_path):
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=listed("a", "b"))
    with pytest.raises(DataError, match=r"b: a case must have every modality; got no 't2w'"):
        Builder(config).prepare()


def test_another_number_of_cases_and_odd_files_are_warned_of(tmp_path):
    description = {"channel_names": CHANNELS, "numTraining": 3}
    config = write_nnunet(tmp_path / "data", raw_case("a"), description=description)
    save(config.path / "imagesTr/a_0007.nii.gz", raw_case().label)
    save(config.path / "imagesTr/a_0001.mha", raw_case().label)
    texts = [problem.text for problem in Builder(config).check_list()]
    assert any("got a_0001.mha, a_0007.nii.gz, of which nothing is read" in text for text in texts)
    assert any("got numTraining 3 and 1 cases" in text for text in texts)


def write_task(root, labels=None, **description):
    grid = affine()
    t2w, adc = (np.random.default_rng(n).integers(1, 900, (24, 24, 8)) for n in range(2))
    zones = np.zeros((24, 24, 8), np.uint8)
    zones[8:16, 8:12, 2:6], zones[8:16, 12:16, 2:6] = 1, 2
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    for n in range(2):
        image = np.stack([adc, t2w], -1).astype(np.int16)
        nib.save(nib.Nifti1Image(image, grid), root / f"imagesTr/prostate_0{n}.nii.gz")
        array = zones if labels is None else labels(zones)
        nib.save(nib.Nifti1Image(array, grid), root / f"labelsTr/prostate_0{n}.nii.gz")
    if description:
        (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return (
        DataConfig(
            name="msd_prostate",
            path=root,
            cache=root.parent / "cache",
            target="zones",
            modalities=("t2w", "adc"),
            preprocess=SMALL,
        ),
        t2w,
    )


def test_the_order_of_the_decathlons_channels_is_read(tmp_path):
    config, t2w = write_task(tmp_path / "data", modality={"0": "ADC", "1": "T2"})
    builder = TaskBuilder(config)
    assert builder.entries[0].channels == {"t2w": 1, "adc": 0}
    raw = builder.read_case(builder.entries[0])
    np.testing.assert_array_equal(raw.images["t2w"].array, t2w.T)
    listed_alone = [
        {"image": "./imagesTr/prostate_01.nii.gz", "label": "./labelsTr/prostate_01.nii.gz"}
    ]
    config, _ = write_task(
        tmp_path / "listed", modality={"0": "T2", "1": "ADC"}, training=listed_alone, numTraining=1
    )  # fmt: skip
    builder = TaskBuilder(config)
    assert [entry.case_id for entry in builder.entries] == ["prostate_01"]
    (problem,) = builder.check_list()
    assert "got prostate_00.nii.gz, which is not, so that it is left out" in problem.text
    config, _ = write_task(tmp_path / "one", modality={"0": "T2"})
    with pytest.raises(DataError, match=r"must name the channels T2 and ADC; got none for adc"):
        TaskBuilder(config)


@pytest.mark.parametrize("value", [1, 2])
def test_one_zone_alone_is_warned_of(tmp_path, value):
    config, _ = write_task(tmp_path / "data", lambda zones: ((zones == 2) * value).astype(np.uint8))
    problems = validate(TaskBuilder(config)).problems
    text = f"both zones should be there; got only value {value}"
    warned = [problem.case_id for problem in problems if text in problem.text]
    assert warned == ["prostate_00", "prostate_01"]
    both, _ = write_task(tmp_path / "both")
    assert not any("both zones" in p.text for p in validate(TaskBuilder(both)).problems)


def write_segmentation(path, array, segments, layer=0):
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine()
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=True)
    lines = "".join(
        f"Segment{n}_Name:={name}\nSegment{n}_LabelValue:={value}\nSegment{n}_Layer:={layer}\n"
        for n, (name, value) in enumerate(segments.items())
    )
    content = path.read_bytes()
    end = content.index(b"\n\n") + 1
    path.write_bytes(content[:end] + lines.encode() + content[end:])


@pytest.mark.parametrize(
    ("segments", "layer", "text"),
    [
        ({}, 0, None),
        ({"lesion": 3}, 0, None),
        ({"Segment_1": 3}, 0, None),
        ({"lesion 1": 3, "lesion 2": 4}, 0, None),
        ({"lesion": 3, "prostate": 1}, 0, r"got prostate. Make it so with value 3 set to 1"),
        ({"bladder": 3}, 0, r"got bladder. Choose another --data.target"),
        ({"lesion": 3}, 1, r"must hold its segments in one layer; got 'lesion' in another"),
    ],
)
def test_a_segmentation_of_3d_slicer_is_a_label(tmp_path, segments, layer, text):
    raw = raw_case("a")
    config = write_folder(tmp_path / "data", raw)
    (config.path / "a/lesion.nii.gz").unlink()
    path = config.path / "a/lesion.seg.nrrd"
    write_segmentation(path, raw.label.array.astype(np.uint8), segments, layer)
    builder = Builder(config)
    if text is None:
        assert validate(builder).problems == []
        read = builder.read_case(builder.entries[0]).label
        np.testing.assert_array_equal(read.array, raw.label.array)
    else:
        with pytest.raises(DataError, match=text):
            builder.prepare()


def names_of(root):
    return [case.case_id for case in find_inputs(root, ("t2w", "adc"))]


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_cases_of_equal_folders_are_told_apart(tmp_path):
    touch(tmp_path, *(f"{p}/mri/{m}.nii.gz" for p in "AB" for m in ("t2w", "adc")))
    touch(tmp_path, "C/scan/t2w.nii.gz", "C/scan/adc.nii.gz")
    assert names_of(tmp_path) == ["A_mri", "B_mri", "scan"]
    assert names_of(tmp_path / "A/mri") == ["mri"]
    touch(tmp_path, *(f"{p}/2/MRI/{m}.mha" for p in ("A", "D") for m in ("t2w", "adc")))
    assert names_of(tmp_path) == ["A_2_MRI", "A_mri", "B_mri", "D_2_MRI", "scan"]
    touch(tmp_path / "flat", *(f"{s}/p1_{m}.mha" for s in ("x", "y") for m in ("t2w", "adc")))
    assert names_of(tmp_path / "flat") == ["x_p1", "y_p1"]


def test_linked_case_folders_are_cases_as_in_training(tmp_path):
    for n in range(3):
        touch(tmp_path / f"archive/{n}/mri", "t2w.nii.gz", "adc.nii.gz")
        (tmp_path / "cases").mkdir(exist_ok=True)
        (tmp_path / f"cases/case_{n}").symlink_to(tmp_path / f"archive/{n}/mri")
    touch(tmp_path / "cases/case_9", "t2w.nii.gz", "adc.nii.gz")
    (tmp_path / "cases/round").symlink_to(tmp_path / "cases")
    assert names_of(tmp_path / "cases") == ["case_0", "case_1", "case_2", "case_9"]
    assert names_of(tmp_path / "cases/case_1") == ["case_1"], "named as it is called, not its goal"


def test_segmentations_make_no_case(tmp_path):
    touch(tmp_path / "a", "t2w.nii.gz", "adc.nii.gz", *(f"seg_{m}.nii.gz" for m in ("t2w", "adc")))
    touch(tmp_path / "flat", *(f"p1{s}_{m}.mha" for s in ("", "_seg") for m in ("t2w", "adc")))
    touch(tmp_path / "only", *(f"mask_{m}.nii.gz" for m in ("t2w", "adc")))
    assert names_of(tmp_path) == ["a", "p1"]
    with pytest.raises(DataError, match="the input must hold files named by modality"):
        find_inputs(tmp_path / "only", ("t2w", "adc"))


def test_results_of_earlier_predictions_are_no_inputs(tmp_path):
    touch(tmp_path, "c9/t2w.nii.gz", "c9/adc.nii.gz", ".git/x_t2w.nii.gz", ".git/x_adc.nii.gz")
    for results in ("results", "."):
        touch(tmp_path / results, "predictions.json")
        touch(tmp_path / results, *(f"attention/c9_{m}.nii.gz" for m in ("t2w", "adc")))
        touch(tmp_path / results, "masks/c9.nii.gz")
    assert names_of(tmp_path) == ["c9"]
