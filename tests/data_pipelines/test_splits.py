import json

import pytest

from data_pipelines.case import CaseInfo
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.serving.splits import (
    Folds,
    check_folds,
    group_folds,
    load_published,
    make_folds,
)


def infos(count: int, *, positive_every: int = 4) -> list[CaseInfo]:
    return [CaseInfo(f"c{i:03d}", f"p{i:03d}", i % positive_every == 0) for i in range(count)]


def test_folds_balance_cases_and_positives():
    cases = infos(103)
    positive = {case.case_id for case in cases if case.positive}
    folds = make_folds(cases, num_folds=5)
    sizes = [len(ids) for ids in folds.validation]
    counts = [len(positive & set(ids)) for ids in folds.validation]
    assert sorted(sizes) == [20, 20, 21, 21, 21]
    assert sorted(counts) == [5, 5, 5, 5, 6]
    assert sorted(i for ids in folds.validation for i in ids) == [c.case_id for c in cases]
    assert set(folds.training(2)) == {c.case_id for c in cases} - set(folds.validation[2])


def test_a_patient_stays_in_one_fold():
    cases = [CaseInfo(f"c{i}", f"p{i // 3}", i % 2 == 0) for i in range(30)]
    folds = make_folds(cases, num_folds=4)
    check_folds(folds, cases, source="made")
    fold_of = {case_id: i for i, ids in enumerate(folds.validation) for case_id in ids}
    for patient in range(10):
        assert len({fold_of[f"c{3 * patient + i}"] for i in range(3)}) == 1


def test_folds_depend_on_seed_but_not_on_order():
    cases = infos(40)
    assert make_folds(cases) == make_folds(reversed(cases))
    assert make_folds(cases).sha256 == make_folds(cases).sha256
    assert make_folds(cases, seed=1) != make_folds(cases, seed=0)


def test_folds_come_back_from_their_file(tmp_path):
    folds = make_folds(infos(12), num_folds=3)
    path = tmp_path / "new" / "folds.json"
    folds.save(path)
    assert Folds.load(path) == folds
    assert load_published(path, infos(12)) == folds
    assert [p.name for p in path.parent.iterdir()] == ["folds.json"]


def test_names_of_folds_are_kept_outside_their_hash(tmp_path):
    plain = make_folds(infos(12), num_folds=3)
    named = Folds(plain.validation, ("A", "B", "C"))
    assert named.sha256 == plain.sha256
    path = tmp_path / "folds.json"
    plain.save(path)
    assert "names" not in json.loads(path.read_text("utf-8"))
    named.save(path)
    assert Folds.load(path) == load_published(path, infos(12)) == named


@pytest.mark.parametrize("names", [["A", "B"], [1, 2, 3], "ABC"])
def test_names_that_do_not_fit_the_folds_are_refused(tmp_path, names):
    path = tmp_path / "folds.json"
    make_folds(infos(12), num_folds=3).save(path)
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | {"names": names}), encoding="utf-8")
    message = r'as "names" one text for each of its 3 folds, or none at all; got .*. Correct the'
    with pytest.raises(DataError, match=message):
        Folds.load(path)
    with pytest.raises(DataError, match=message):
        load_published(path, infos(12))


def test_a_changed_fold_file_is_refused(tmp_path):
    path = tmp_path / "folds.json"
    make_folds(infos(12), num_folds=3).save(path)
    content = json.loads(path.read_text("utf-8"))
    content["folds"][0]["val"].pop()
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"must hold the folds that its sha256 was taken of"):
        Folds.load(path)
    path.write_text(json.dumps(content["folds"]), encoding="utf-8")
    with pytest.raises(DataError, match=r"must be a fold file written by this project"):
        Folds.load(path)


def test_impossible_folds_are_refused():
    with pytest.raises(DataError, match=r"got 4 patients and 5 folds. Use --num-folds=4 or fewer"):
        make_folds(infos(4), num_folds=5)
    with pytest.raises(DataError, match=r"at least 2 folds; got 1"):
        make_folds(infos(4), num_folds=1)
    with pytest.raises(DataError, match=r"case ids must be unique; got c000 twice"):
        make_folds([*infos(4), infos(1)[0]], num_folds=2)


def publish(path, *validation, train=None):
    everything = {i for ids in validation for i in ids}
    folds = [
        {"train": sorted(everything - set(ids)) if train is None else train, "val": list(ids)}
        for ids in validation
    ]
    path.write_text(json.dumps(folds), encoding="utf-8")
    return path


def test_published_folds_keep_the_cases_at_hand(tmp_path):
    path = publish(tmp_path / "f.json", ["c000", "c009"], ["c001", "c002"])
    assert load_published(path, infos(3)).validation == (("c000",), ("c001", "c002"))


def test_faulty_published_folds_are_refused(tmp_path):
    path = tmp_path / "f.json"
    with pytest.raises(MissingDataError, match=r"no fold file at .*f.json"):
        load_published(path, infos(3))
    with pytest.raises(DataError, match=r"a file that can be read; got: Is a directory. Check the"):
        load_published(tmp_path, infos(3))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"must be JSON"):
        load_published(path, infos(3))
    path.write_text('[{"train": [1], "val": []}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"must be a list of folds"):
        load_published(path, infos(3))
    publish(path, ["c000", "c001"], ["c001", "c002"])
    with pytest.raises(DataError, match=r"has c001 in folds 0 and 1"):
        load_published(path, infos(3))
    publish(path, ["c000", "c001", "c002"], ["other"])
    with pytest.raises(DataError, match=r"fold 1 of .* has none of this data set"):
        load_published(path, infos(3))
    publish(path, ["c000"], ["c001", "c002"], train=["c000"])
    with pytest.raises(
        DataError, match=r"may train and be validated in one fold; fold 0 of .*c000"
    ):
        load_published(path, infos(3))
    publish(path, ["c000"], ["c001", "c002"], train=["other"])
    with pytest.raises(DataError, match=r"must train on at least one case; fold 0 of .* has none"):
        load_published(path, infos(3))
    same_patient = [CaseInfo("c000", "p", True), CaseInfo("c001", "p", False)]
    publish(path, ["c000"], ["c001"])
    with pytest.raises(DataError, match=r"must share a fold; .* patient p in folds 0 and 1"):
        load_published(path, same_patient)


def test_one_split_and_fewer_training_cases_are_folds(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(json.dumps([{"train": ["c002", "c001"], "val": ["c000"]}]), encoding="utf-8")
    folds = load_published(path, infos(5))
    assert (folds.validation, folds.training(0)) == ((("c000",),), ("c001", "c002"))
    folds.save(tmp_path / "kept.json")
    assert Folds.load(tmp_path / "kept.json") == folds == load_published(path, infos(4))
    fewer = [{"train": ["c001"], "val": ["c000"]}, {"train": ["c000"], "val": ["c001"]}]
    path.write_text(json.dumps(fewer), encoding="utf-8")
    plain = load_published(path, infos(2))
    assert plain.trained == (), "each trains on all others"
    assert plain.sha256 == Folds(plain.validation).sha256
    fewer[0]["train"] = ["c001", "c002"]
    path.write_text(json.dumps(fewer), encoding="utf-8")
    assert load_published(path, infos(3)).sha256 != plain.sha256


def test_held_out_cases_train_and_validate_nowhere(tmp_path):
    path = tmp_path / "f.json"
    split = {"folds": [{"train": ["c001"], "val": ["c000"]}], "test": ["c002", "c009"]}
    path.write_text(json.dumps(split), encoding="utf-8")
    folds = load_published(path, infos(3))
    assert folds.test == ("c002",)
    folds.save(tmp_path / "kept.json")
    assert Folds.load(tmp_path / "kept.json") == folds
    split["test"] = ["c001"]
    path.write_text(json.dumps(split), encoding="utf-8")
    with pytest.raises(DataError, match=r"train and be held out as a test .* c001 and c001 of"):
        load_published(path, infos(3))
    split["test"] = "c001"
    path.write_text(json.dumps(split), encoding="utf-8")
    with pytest.raises(DataError, match=r'must give as "test" a list of case ids, or none; got'):
        load_published(path, infos(3))


@pytest.mark.parametrize("schema", [{}, {"schema": 2}])
def test_fold_files_of_older_versions_are_read(schema, tmp_path):
    folds = Folds((("a",), ("b", "c")))
    record = {
        **schema,
        "sha256": folds.sha256,
        "folds": [{"train": ["b", "c"], "val": ["a"]}, {"train": ["a"], "val": ["b", "c"]}],
    }
    (tmp_path / "f.json").write_text(json.dumps(record), encoding="utf-8")
    assert Folds.load(tmp_path / "f.json") == folds


def test_folds_of_another_data_set_are_refused():
    with pytest.raises(DataError, match=r"folds names the unknown case c003"):
        check_folds(make_folds(infos(4), num_folds=2), infos(3), source="folds")


def test_official_picai_folds_hold_no_leak(shared_data):
    path = shared_data / "splits" / "picai.json"
    ids = {i for fold in json.loads(path.read_text("utf-8")) for i in fold["val"]}
    cases = [CaseInfo(i, i.partition("_")[0], False) for i in sorted(ids)]
    folds = load_published(path, cases)
    assert len(cases) == 1500
    assert sorted(i for ids in folds.validation for i in ids) == sorted(ids)


def of_centre(case_id, centre, patient=None):
    facts = {"center": centre} if centre else {"other": "x"}
    return CaseInfo(case_id, patient or case_id, True, facts)


def test_each_centre_is_left_out_once():
    cases = [of_centre("d", "B"), of_centre("a", "A"), of_centre("c", "C"), of_centre("b", "B")]
    folds = group_folds(cases, group="center")
    assert folds.validation == (("a",), ("b", "d"), ("c",))
    assert folds.training(1) == ("a", "c")
    assert folds.names == ("A", "B", "C")


def test_groups_that_cannot_make_folds_are_refused():
    with pytest.raises(DataError, match=r"must have a 'center'.*; b have none.*: center, other"):
        group_folds([of_centre("a", "A"), of_centre("b", None)], group="center")
    with pytest.raises(DataError, match=r"at least 2 groups; got center = A alone"):
        group_folds([of_centre("a", "A"), of_centre("b", "A")], group="center")
    with pytest.raises(
        DataError,
        match=r"must have one 'center', as they share a fold; got 'A' and 'B' for patient p. "
        r"Correct these values, leave the patient out, or group by another fact.",
    ):
        group_folds([of_centre("a", "A", "p"), of_centre("b", "B", "p")], group="center")
    with pytest.raises(DataError, match=r"case ids must be unique; got a twice"):
        group_folds([of_centre("a", "A"), of_centre("a", "B")], group="center")
