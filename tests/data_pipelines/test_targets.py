"""Targets: built in, and of classes, regions and ignored values of the user's own."""

import json

import numpy as np
import pytest

from data_pipelines.building.builders import open_builder
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.preparing.labels import label_classes, predicted_values
from data_pipelines.reading.own_classes import with_own_classes
from data_pipelines.serving import loading
from data_pipelines.targets import IGNORED, foreground, target_of
from tests.data_pipelines.fabricate import raw_case, save

BRATS = ("whole=1+2+4", "core=1+4", "enhancing=4", "ignore=9")


@pytest.mark.parametrize(
    ("name", "classes", "lesion"),
    [("lesion", ("lesion",), "lesion"), ("gland", ("gland",), None), ("zones", ("pz", "tz"), None)],
)
def test_prostates_names_keep_their_meaning(name, classes, lesion):
    target = target_of(name)
    assert target.classes == target.part_names == classes
    assert target.parts == tuple((i + 1,) for i in range(len(classes)))
    assert target.lesion == lesion
    assert not target.has_regions
    mask = np.arange(3, dtype=np.uint8)
    assert target.to_file(mask) is mask


def test_regions_are_unions_of_parts():
    """Values 1, 2 and 4 belong to other classes each: three parts, by the least value."""
    target = target_of("glioma", BRATS, ("enhancing",))
    assert target.classes == ("whole", "core", "enhancing")
    assert target.values == ((1,), (2,), (4,))
    assert target.parts == ((1, 2, 3), (1, 3), (3,))
    assert target.part_names == ("whole.core", "whole", "whole.core.enhancing")
    assert target.has_regions
    assert target.lesion == "enhancing"
    stored = label_classes(np.array([0, 1, 2, 4, 9]), target)
    assert stored.tolist() == [0, 1, 2, 3, IGNORED]
    assert [target.mask_of(stored, i).tolist() for i in range(3)] == [
        [False, True, True, True, False],
        [False, True, False, True, False],
        [False, False, False, True, False],
    ]
    assert foreground(stored).tolist() == [False, True, True, True, False]
    probability = np.array([[0.1, 0.2, 0.3, 0.4]])
    assert target.probability_of(probability, 0) == pytest.approx(0.9)
    assert target.probability_of(probability, 1) == pytest.approx(0.6)
    assert target.to_file(np.array([0, 1, 2, 3])).tolist() == [0, 1, 2, 4]


def test_values_of_the_same_classes_are_one_part():
    target = target_of("organs", ("liver=1+3", "spleen=2"))
    assert target.num_parts == 2
    assert target.parts == ((1,), (2,))
    assert not target.has_regions
    assert label_classes(np.array([1.0, 2.0, 3.0]), target).tolist() == [1, 2, 1]


def test_one_class_of_ones_own_takes_its_value_alone():
    target = target_of("tumour", ("tumour=2",))
    assert label_classes(np.array([0, 2]), target).tolist() == [0, 1]
    with pytest.raises(DataError, match=r"of the classes of 'tumour', 0 and 2; got 1"):
        label_classes(np.array([0, 1]), target)
    assert predicted_values(np.array([0, 2]), target).tolist() == [0, 1]
    with pytest.raises(DataError, match=r"got 1\.5"):
        label_classes(np.array([1.5]), target)


@pytest.mark.parametrize(
    ("labels", "lesions", "said"),
    [
        ((), (), "have classes of its own; got 'mine' without any"),
        (("a",), (), "written name=value"),
        (("a=0",), (), "whole numbers from 1"),
        (("a=1", "A=2"), (), "each name once"),
        (("a=1", "ignore=1"), (), "one value that no class has; got ignore=1"),
        (("ignore=1",), (), "at least one class"),
        (("a=1", "b=2"), ("c",), "classes a, b"),
        (("a=1", "b=2"), ("a", "b"), "one class may be said to be a lesion"),
    ],
)
def test_faulty_lines_are_refused(labels, lesions, said):
    with pytest.raises(DataError, match=said):
        target_of("mine", labels, lesions)


def test_built_in_targets_take_no_classes_and_names_must_be_plain():
    with pytest.raises(DataError, match="need a target of another name than 'gland'"):
        target_of("gland", ("a=1",))
    with pytest.raises(DataError, match="named by letters"):
        target_of("../x", ("a=1",))
    with pytest.raises(DataError, match="labels of lesion, gland or zones alone; got the target"):
        open_builder(DataConfig(target="mine", labels=("a=1",)))


def write_dataset(root, labels: dict) -> None:
    """One case of nnU-Net's layout, with values 0 to 3 in its label."""
    raw = raw_case()
    t2w, label = raw.images["t2w"], raw.label
    assert label is not None
    values = np.zeros(label.shape, np.uint8)
    values[2:4, 4:8, 4:8] = 1
    values[2:4, 8:10, 4:8] = 2
    values[2:4, 4:8, 9:11] = 3
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    save(root / "imagesTr" / "c_0000.nii.gz", t2w)
    save(root / "labelsTr" / "c.nii.gz", type(label)(values, label.affine))
    description = {"channel_names": {"0": "T2W"}, "labels": labels, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


def test_classes_regions_and_ignore_of_dataset_json(tmp_path):
    named = {"background": 0, "whole organ": [1, 2], "tumour": 2, "ignore": 3}
    write_dataset(tmp_path / "data", named)
    data = DataConfig(
        name="nifti_folder", path=tmp_path / "data", target="organ", modalities=("t2w",),
        cache=tmp_path / "cache",
    )  # fmt: skip
    found = with_own_classes(data)
    assert found.labels == ("whole_organ=1+2", "tumour=2", "ignore=3")
    assert found.classes == ("whole_organ", "tumour")
    assert found.num_classes == 3
    source = loading.build(data)
    case = source[source.case_ids[0]]
    assert case.positive
    assert set(np.unique(case.truth)) == {0, 1, 2, IGNORED}
    voxels = source.foreground(case.case_id)
    assert set(np.unique(case.label.ravel()[voxels])) <= {1, 2}


def test_faulty_labels_of_dataset_json_name_the_file(tmp_path):
    write_dataset(tmp_path, {"background": 0, "ignore": 3})
    data = DataConfig(name="nifti_folder", path=tmp_path, target="organ")
    with pytest.raises(DataError, match=r"labels of .*dataset.json: a target must have at least"):
        with_own_classes(data)
