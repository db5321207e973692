"""Published data sets in small: PI-CAI with its known faults, Prostate158, MSD Task05."""

import csv
import dataclasses
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_pipelines.building.builders import builder_names, open_builder
from data_pipelines.building.records import decode
from data_pipelines.case import CaseInfo, Volume
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.picai.picai_dataset_builder import on_t2w_grid
from data_pipelines.prostate158.options import Prostate158Options
from data_pipelines.serving import splits
from tests.data_pipelines.fabricate import SMALL, raw_case, save

PACKAGE = Path(__file__).parents[2] / "data_pipelines"
LESIONS = "labels/csPCa_lesion_delineations"
HUMAN = f"{LESIONS}/human_expert/resampled"
GLAND = "labels/anatomical_delineations/whole_gland/AI/Bosma22b"
ZONES = "labels/anatomical_delineations/zonal_pz_tz/AI/Yuan23"


def config_of(name: str, root: Path, **changes) -> DataConfig:
    return DataConfig(
        name=name, path=root, cache=root.parent / "cache", preprocess=SMALL, **changes
    )


def cases_of(config: DataConfig):
    builder = open_builder(config)
    builder.prepare()
    return builder, {case.case_id: case for case in map(decode, builder.source())}


def problems_of(config: DataConfig) -> list[tuple[str, str]]:
    """Level and text of the problems of the first case."""
    builder = open_builder(config)
    found = builder.examine(builder.entries[0])
    return [(p.level, p.text) for p in found.problems if "1e-6 mm2/s" not in p.text]


@pytest.mark.parametrize("name", builder_names())
def test_every_data_set_says_what_it_is(name):
    readme = (PACKAGE / name / "README.md").read_text("utf-8")
    assert (PACKAGE / name / "CITATIONS.bib").read_text("utf-8").strip().startswith("@")
    assert "data.target" in readme
    if not name.startswith("phantom"):
        assert "icence" in readme or "terms of use" in readme or "CC BY" in readme
        assert "Nothing is downloaded" in readme


# PI-CAI


def write_study(root: Path, case_id="1_100", *, positive=True, label=HUMAN, folder="images"):
    raw = raw_case(case_id, positive=positive)
    for name, volume in raw.images.items():
        save(root / f"{folder}/1/{case_id}_{name}.mha", volume)
    if label:
        save(root / f"{label}/{case_id}.nii.gz", raw.label)
    return raw


def write_marksheet(root: Path, **row) -> None:
    path = root / "labels/clinical_information/marksheet.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"patient_id": "1", "study_id": "100", "case_csPCa": "YES", "center": "ZGT", **row}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)


@pytest.mark.parametrize(
    "folders",
    [
        ("human_expert/resampled", "human_expert/original", "human_expert/Pooch25", "AI/Bosma22a"),
        ("human_expert/original", "human_expert/Pooch25", "AI/Bosma22a"),
        ("human_expert/Pooch25", "AI/Bosma22a"),
        ("AI/Bosma22a",),
    ],
)
def test_picai_takes_the_best_label_there_is(tmp_path, folders):
    root = tmp_path / "picai"
    write_study(root, label=None)
    for folder in folders:
        save(root / LESIONS / folder / "1_100.nii.gz", raw_case().label)
    entry = open_builder(config_of("picai", root)).entries[0]
    assert entry.metadata["label_source"] == f"csPCa_lesion_delineations/{folders[0]}"
    assert entry.label == root / LESIONS / folders[0] / "1_100.nii.gz"


def test_picai_takes_no_other_label_for_one_that_is_not_fetched(tmp_path):
    root = tmp_path / "picai"
    write_study(root, label=f"{LESIONS}/AI/Bosma22a")
    (root / HUMAN).mkdir(parents=True)
    (root / HUMAN / "1_100.nii.gz").symlink_to("nowhere")
    problems = problems_of(config_of("picai", root))
    assert any("got a link that leads nowhere" in text for _, text in problems)


def test_picai_keeps_the_marksheet_and_the_published_fold(tmp_path):
    root = tmp_path / "picai"
    write_study(root, folder="public_images_fold3")
    write_marksheet(root, psa="7.7", lesion_ISUP="3", psad="")
    builder, _ = cases_of(config_of("picai", root))
    metadata = builder._stored_info()["cases"][0]["metadata"]
    assert metadata == {
        "center": "ZGT",
        "psa": "7.7",
        "lesion_ISUP": "3",
        "case_csPCa": "YES",
        "published_fold": "3",
        "label_source": "csPCa_lesion_delineations/human_expert/resampled",
    }
    (root / "labels/clinical_information/marksheet.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"columns patient_id and study_id; got a, b. Fetch"):
        open_builder(config_of("picai", root))


def test_a_corrected_marksheet_is_seen(tmp_path):
    root = tmp_path / "picai"
    write_study(root, positive=False, label=f"{LESIONS}/AI/Bosma22a")
    write_marksheet(root, case_csPCa="NO")
    config = config_of("picai", root)
    cases_of(config)
    write_marksheet(root, case_csPCa="YES")
    with pytest.raises(DataError, match="by an AI, which proves nothing"):
        open_builder(config).prepare()
    write_marksheet(root, case_csPCa="NO", center="RUMC")
    builder, _ = cases_of(config)
    assert builder.infos[0].metadata["center"] == "RUMC"


def test_picai_label_with_a_wrong_direction_is_put_on_the_t2w_grid(tmp_path):
    root = tmp_path / "picai"
    raw = write_study(root, label=None)
    wrong = np.diag([1.0, 1.0, 3.0, 1.0])  # no tilt, another origin
    save(root / HUMAN / "1_100.nii.gz", Volume(raw.label.array, wrong))
    config = config_of("picai", root)
    assert [(level, "must lie on its grid" in text) for level, text in problems_of(config)] == [
        ("warning", True)
    ]
    _, cases = cases_of(config)
    np.testing.assert_array_equal(cases["1_100"].original_truth, raw.label.array > 0)
    # An original label lies on a grid of its own, and is taken at its word.
    shutil.move(root / LESIONS / "human_expert/resampled", root / LESIONS / "human_expert/original")
    assert not any("must lie on its grid" in text for _, text in problems_of(config))


def test_labels_stored_in_another_way_are_left_alone():
    raw = raw_case()
    t2w, label = raw.images["t2w"], raw.label
    assert on_t2w_grid(label, t2w) is label
    flipped = Volume(label.array[:, ::-1], label.affine @ np.diag([1, -1, 1, 1]))
    flipped.affine[:3, 3] += label.affine[:3, 1] * 23
    assert on_t2w_grid(flipped, t2w) is flipped
    smaller = Volume(label.array[:, 2:], label.affine)
    assert on_t2w_grid(smaller, t2w) is smaller
    turned = Volume(label.array, np.diag([1.0, 1.0, 3.0, 1.0]))
    np.testing.assert_array_equal(on_t2w_grid(turned, t2w).affine, t2w.affine)


def test_picai_label_on_another_grid_is_resampled(tmp_path):
    root = tmp_path / "picai"
    raw = write_study(root, label=None)
    part = raw.label.affine.copy()
    part[:3, 3] += part[:3, :3] @ [2, 5, 1]
    save(root / HUMAN / "1_100.nii.gz", Volume(raw.label.array[1:7, 5:20, 2:22], part))
    _, cases = cases_of(config_of("picai", root))
    np.testing.assert_array_equal(cases["1_100"].original_truth, raw.label.array > 0)


@pytest.mark.parametrize(
    ("label", "positive", "recorded", "expected"),
    [
        (HUMAN, True, "YES", []),
        (HUMAN, False, "NO", []),
        (HUMAN, False, "YES", [("warning", "must have a lesion in its label; got an empty label")]),
        (
            f"{LESIONS}/AI/Bosma22a",
            False,
            "YES",
            [("error", "got an empty label by an AI, which proves nothing")],
        ),
        (HUMAN, True, "NO", [("warning", "should have an empty label; got a lesion")]),
    ],
)
def test_picai_label_against_the_marksheet(tmp_path, label, positive, recorded, expected):
    root = tmp_path / "picai"
    write_study(root, positive=positive, label=label)
    write_marksheet(root, case_csPCa=recorded)
    found = problems_of(config_of("picai", root))
    assert [level for level, _ in found] == [level for level, _ in expected]
    assert all(part in text for (_, part), (_, text) in zip(expected, found, strict=True))
    if expected and expected[0][0] == "error":
        with pytest.raises(DataError, match="by an AI, which proves nothing"):
            open_builder(config_of("picai", root)).prepare()


def test_picai_gland_on_a_wrong_structure_is_warned_of(tmp_path):
    root = tmp_path / "picai"
    raw = write_study(root, label=None)
    gland = np.zeros(raw.label.shape, np.uint8)
    gland[2:6, 3:9, 3:9] = 1
    zones = np.zeros_like(gland)
    zones[2:6, 12:20, 12:20] = 2
    save(root / GLAND / "1_100.nii.gz", Volume(gland, raw.label.affine))
    config = config_of("picai", root, target="gland")
    assert not any("another AI" in text for _, text in problems_of(config))
    save(root / ZONES / "1_100.nii.gz", Volume(zones, raw.label.affine))
    texts = [text for _, text in problems_of(config)]
    assert any("where another AI sees its zones; got a Dice of 0.00" in text for text in texts)
    save(root / ZONES / "1_100.nii.gz", Volume(gland * 2, raw.label.affine))
    assert not any("another AI" in text for _, text in problems_of(config))


def test_picai_crop_around_the_gland(tmp_path):
    root = tmp_path / "picai"
    raw = write_study(root)
    around = dataclasses.replace(SMALL, centre="gland")
    config = dataclasses.replace(config_of("picai", root), preprocess=around)
    with pytest.raises(DataError, match=r"mask of the gland in every case; got none, looked for"):
        open_builder(config).prepare()
    gland = np.zeros(raw.label.shape, np.uint8)
    gland[2:6, 8:16, 6:14] = 1
    save(root / GLAND / "1_100.nii.gz", Volume(gland, raw.label.affine))
    _, cases = cases_of(config)
    centre = cases["1_100"].affine @ [7.5, 7.5, 2.5, 1]
    np.testing.assert_allclose(centre, raw.label.affine @ [9.5, 11.5, 3.5, 1], atol=1e-4)
    with pytest.raises(DataError, match="placed by what is to be found"):
        open_builder(dataclasses.replace(config, target="gland"))


def test_published_picai_folds_part_no_patient(shared_data):
    path = shared_data / "splits/picai.json"
    ids = {
        case_id
        for fold in splits._fold_list(splits._read_json(path), path)
        for case_id in fold["val"]
    }
    infos = [CaseInfo(case_id, case_id.partition("_")[0], False) for case_id in sorted(ids)]
    folds = splits.load_published(path, infos)
    assert len(infos) == 1500
    assert [len(fold) for fold in folds.validation] == [300, 298, 302, 304, 296]


# Prostate158


def write_prostate158(root: Path, name="train/020", *, empty=False, readers=(1,)) -> None:
    raw = raw_case(name[-3:])
    anatomy = np.zeros(raw.label.shape, np.uint8)
    anatomy[2:6, 8:12, 8:16], anatomy[2:6, 12:16, 8:16] = 2, 1  # 12 to 16 lies anterior
    for stem, volume in (("t2", "t2w"), ("adc", "adc"), ("dwi", "hbv")):
        save(root / name / f"{stem}.nii.gz", raw.images[volume])
    save(root / name / "t2_anatomy_reader1.nii.gz", Volume(anatomy, raw.label.affine))
    if empty:
        save(root / name / "empty.nii.gz", Volume(anatomy * 0, raw.label.affine))
    for reader in readers:
        label = raw.label.array.copy()
        label[3, 10 + reader] = 0  # readers differ
        save(root / name / f"adc_tumor_reader{reader}.nii.gz", Volume(label, raw.label.affine))


def test_prostate158_cases_and_their_readers(tmp_path):
    root = tmp_path / "prostate158"
    write_prostate158(root, "train/020", readers=(1, 2))
    write_prostate158(root, "train/021", empty=True, readers=())
    (root / "train.csv").write_text("ID,t2\n20,train/020/t2.nii.gz\n", encoding="utf-8")
    config = config_of("prostate158", root)
    _, first = cases_of(config)
    _, second = cases_of(dataclasses.replace(config, prostate158=Prostate158Options(2)))
    assert list(first) == list(second) == ["020", "021"]
    assert first["020"].original_truth[3, 11].sum() == 0 < first["020"].original_truth[3, 12].sum()
    assert (
        second["020"].original_truth[3, 12].sum() == 0 < second["020"].original_truth[3, 11].sum()
    )
    assert not first["021"].positive
    save(root / "train/020/t2_tumor_reader1.nii.gz", raw_case().label)
    _, on_t2w = cases_of(config)
    np.testing.assert_array_equal(on_t2w["020"].original_truth, raw_case().label.array > 0)


def test_prostate158_zones_are_renumbered(tmp_path):
    root = tmp_path / "prostate158"
    write_prostate158(root)
    _, cases = cases_of(config_of("prostate158", root, target="zones"))
    truth = cases["020"].original_truth
    assert (truth[3, 9, 10], truth[3, 14, 10]) == (1, 2)  # peripheral behind, transition before
    _, cases = cases_of(config_of("prostate158", root, target="gland"))
    np.testing.assert_array_equal(cases["020"].original_truth, truth > 0)


def test_prostate158_without_a_tumour_file_is_no_negative(tmp_path):
    root = tmp_path / "prostate158"
    write_prostate158(root, readers=())
    config = config_of("prostate158", root)
    with pytest.raises(
        DataError, match=r"must have a label .* looked for t2_tumor_reader1.nii.gz, "
    ):
        open_builder(config).prepare()
    (root / "train").rename(root / "other")
    (root / "other/020").rename(root / "other/twenty")
    with pytest.raises(MissingDataError, match=r"a folder for each case, such as train/020; found"):
        open_builder(config)


# MSD Task05


def write_msd(root: Path, number="00") -> Volume:
    raw = raw_case(number)
    t2w = raw.images["t2w"]
    adc = Volume(
        np.random.default_rng(1).integers(500, 2500, t2w.shape).astype(np.int16), t2w.affine
    )
    zones = np.zeros(t2w.shape, np.uint8)
    zones[2:6, 8:12, 8:16], zones[2:6, 12:16, 8:16] = 1, 2
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    both = np.stack([t2w.array.T, adc.array.T], axis=-1)
    nib.save(nib.Nifti1Image(both, t2w.affine), root / f"imagesTr/prostate_{number}.nii.gz")
    save(root / f"labelsTr/prostate_{number}.nii.gz", Volume(zones, t2w.affine))
    (root / f"imagesTr/._prostate_{number}.nii.gz").write_bytes(b"of a Mac")
    return Volume(zones, t2w.affine)


def test_msd_channels_and_zones(tmp_path):
    root = tmp_path / "data"
    zones = write_msd(root / "Task05_Prostate")
    write_msd(root / "Task05_Prostate", "01")
    config = config_of("msd_prostate", root, target="zones", modalities=("adc", "t2w"))
    _, cases = cases_of(config)
    assert list(cases) == ["prostate_00", "prostate_01"]
    np.testing.assert_array_equal(cases["prostate_00"].original_truth, zones.array)
    _, swapped = cases_of(dataclasses.replace(config, modalities=("t2w", "adc")))
    np.testing.assert_array_equal(
        cases["prostate_00"].image, swapped["prostate_00"].image[..., ::-1]
    )
    moved = config_of("msd_prostate", root / "Task05_Prostate", target="gland", modalities=("t2w",))
    _, gland = cases_of(dataclasses.replace(moved, cache=tmp_path / "cache"))
    np.testing.assert_array_equal(gland["prostate_00"].original_truth, zones.array > 0)


def test_msd_says_what_it_does_not_have(tmp_path):
    root = tmp_path / "data"
    write_msd(root)
    with pytest.raises(DataError, match=r"the gland's zones only; got the target 'lesion'. Use"):
        open_builder(config_of("msd_prostate", root))
    with pytest.raises(
        DataError, match=r"t2w, adc; got hbv as well. Use --data.modalities t2w adc"
    ):
        open_builder(config_of("msd_prostate", root, target="zones"))
    (root / "labelsTr/prostate_00.nii.gz").unlink()
    config = config_of("msd_prostate", root, target="zones", modalities=("t2w", "adc"))
    with pytest.raises(DataError, match=r"must have a label for the target 'zones'"):
        open_builder(config).prepare()
    shutil.rmtree(root / "imagesTr")
    with pytest.raises(MissingDataError, match=r"imagesTr/prostate_<number>.nii.gz; found none in"):
        open_builder(config)
