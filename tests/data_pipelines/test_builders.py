"""The shared TFDS builder: what it stores, when it builds again, and what it refuses."""

import dataclasses
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.building import case_builder
from data_pipelines.building.builders import open_builder
from data_pipelines.building.records import decode, encode
from data_pipelines.case import Case, CaseInfo
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError, Problem
from data_pipelines.nifti_folder.nifti_folder_dataset_builder import Builder as FolderBuilder
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.preparing.examination import examine
from data_pipelines.preparing.preprocessing import preprocess_case
from data_pipelines.serving.splits import group_folds
from tests.data_pipelines.fabricate import SMALL, raw_case, save, write_folder


def assert_same(a: Case, b: Case) -> None:
    for field in dataclasses.fields(Case):
        left, right = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_array_equal(left, right, err_msg=field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name


def assert_nothing_built(config: DataConfig) -> None:
    """No data set is visible; finished cases may wait in a hidden folder."""
    left = {path.relative_to(config.cache).parts[1:2] for path in config.cache.rglob("*")}
    assert left <= {(), (".staging",)}


def build(config: DataConfig, builder=FolderBuilder):
    built = builder(config)
    built.prepare()
    return built, {case.case_id: case for case in map(decode, built.source())}


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_what_is_built_is_what_was_preprocessed(tmp_path, ending):
    raws = raw_case("b"), raw_case("a", seed=1, positive=False)
    config = write_folder(tmp_path / "data", *raws, ending=ending)
    built, cases = build(config)
    assert list(cases) == ["a", "b"]
    for raw in raws:
        expected = preprocess_case(dataclasses.replace(raw, patient_id=raw.case_id), config)
        case = cases[raw.case_id]
        np.testing.assert_allclose(case.image, expected.image, atol=1)  # float32 affine on disk
        np.testing.assert_array_equal(case.label, expected.label)
        np.testing.assert_array_equal(case.original_truth, expected.original_truth)
        np.testing.assert_allclose(case.original_affine, expected.original_affine, atol=1e-5)
        assert case.truth.shape == expected.truth.shape
    assert built.infos == (CaseInfo("a", "a", False), CaseInfo("b", "b", True))
    assert len(built.fingerprint) == 64


@pytest.mark.parametrize("voxels", [0, 1, 2, 5])
def test_records_hold_any_truth(tmp_path, voxels):
    raw = raw_case()
    raw.label.array[:] = 0
    raw.label.array[3, 10, 8 : 8 + voxels] = 1
    config = write_folder(tmp_path / "data", raw)
    built, cases = build(config)
    assert cases["a"].truth.size == voxels
    reader = built.read_case(built.entries[0])
    assert_same(cases["a"], preprocess_case(reader, config))
    assert_same(decode(encode(cases["a"])), cases["a"])


def test_a_built_data_set_is_used_again(tmp_path, monkeypatch):
    config = write_folder(tmp_path / "data", raw_case())
    first, _ = build(config)
    monkeypatch.setattr(FolderBuilder, "read_case", None)
    again, cases = build(config)
    assert again.data_dir == first.data_dir
    assert list(cases) == ["a"]
    assert pickle.loads(pickle.dumps(again)).infos == first.infos


def test_whatever_matters_makes_another_data_set(tmp_path):
    config = write_folder(tmp_path / "data", raw_case())
    folder = FolderBuilder(config).data_dir
    moved = tmp_path / "moved"
    shutil.copytree(config.path, moved)
    assert FolderBuilder(dataclasses.replace(config, path=moved)).data_dir == folder
    assert (
        FolderBuilder(dataclasses.replace(config, phantom=PhantomOptions(num_cases=7))).data_dir
        == folder
    )
    smaller = PreprocessConfig(spacing_mm=(3, 1, 1), size=(4, 16, 16))
    changed = [
        dataclasses.replace(config, preprocess=smaller),
        dataclasses.replace(config, modalities=("t2w", "adc")),
        dataclasses.replace(config, allow_missing=True),
    ]
    folders = {FolderBuilder(c).data_dir for c in changed}
    os.utime(config.path / "a" / "adc.nii.gz", (1, 1))
    folders.add(FolderBuilder(config).data_dir)
    (config.path / "patients.csv").write_text("case,patient\na,p1\n", encoding="utf-8")
    folders.add(FolderBuilder(config).data_dir)
    assert len(folders) == 5
    assert folder not in folders


def test_voxels_beside_a_header_matter(tmp_path):
    config = write_folder(tmp_path / "data", raw_case(), ending=".mhd")
    before = FolderBuilder(config).data_dir
    voxels = config.path / "a" / "lesion.raw"
    voxels.write_bytes(bytes(voxels.stat().st_size))
    os.utime(voxels, (1, 1))
    assert FolderBuilder(config).data_dir != before


def test_what_is_wrong_with_a_list_of_files_is_seen_after_a_build(tmp_path):
    config = write_folder(tmp_path / "data", raw_case())
    shutil.move(config.path / "a/t2w.nii.gz", config.path / "a/t2.nii.gz")
    build(config)
    save(config.path / "a/t2_tse.nii.gz", raw_case().images["t2w"])  # read no more than before
    with pytest.raises(DataError, match=r"one file for 't2w'; got t2\.nii\.gz, t2_tse\.nii"):
        FolderBuilder(config).prepare()


def test_a_faulty_case_is_not_stored_even_if_it_could_be_read():
    found = examine("a", raw_case(), (), {}, DataConfig(preprocess=SMALL))
    assert found.case is not None
    fault = Problem("a", None, "the label must fit the table; got none. Look at it.", "error")
    with pytest.raises(DataError, match="the label must fit the table"):
        case_builder._record(dataclasses.replace(found, problems=(fault,)))


def test_fingerprint_is_of_the_content(tmp_path):
    config = write_folder(tmp_path / "data", raw_case())
    first, _ = build(config)
    os.utime(config.path / "a" / "adc.nii.gz", (1, 1))
    touched, _ = build(config)
    assert touched.data_dir != first.data_dir
    assert touched.fingerprint == first.fingerprint
    save(config.path / "a" / "adc.nii.gz", raw_case(seed=5).images["adc"])
    changed, _ = build(config)
    assert changed.fingerprint != first.fingerprint


def test_a_mended_table_makes_another_data_set(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b"))
    table = config.path / "patients.csv"
    table.write_text("case,patient\na,p1\nb,p2\n", encoding="utf-8")
    built, _ = build(config)
    with pytest.raises(DataError, match=r"every case must have a 'group'.* add the column"):
        group_folds(built.infos, group="group")
    table.write_text("case,patient,group\na,p1,north\nb,p2,south\n", encoding="utf-8")
    mended, _ = build(config)
    assert group_folds(mended.infos, group="group").validation == (("a",), ("b",))


def test_duplicate_cases_are_refused(tmp_path):
    config = write_folder(tmp_path / "data", raw_case("a"))
    builder = FolderBuilder(config)
    builder.entries *= 2
    with pytest.raises(DataError, match=r"- a: a case id must be unique; got it 2 times"):
        builder.prepare()


def test_all_faults_of_all_cases_are_told_at_once(tmp_path):
    cases = [raw_case(name) for name in "abcdef"]
    cases[3].label.array[0, 0, 0] = 999
    config = write_folder(tmp_path / "data", *cases)
    (config.path / "a" / "hbv.nii.gz").unlink()
    (config.path / "b" / "lesion.nii.gz").unlink()
    (config.path / "c" / "t2w.nii.gz").write_bytes(b"junk")
    far = raw_case("e").images["adc"]
    far.affine[0, 3] += 500
    save(config.path / "e" / "adc.nii.gz", far)
    (config.path / "f").rename(config.path / "f 1")
    with pytest.raises(DataError) as caught:
        FolderBuilder(config).prepare()
    text = str(caught.value)
    assert "the data set cannot be built; faults: 6, cases: 6." in text
    assert "- d: label values must be whole numbers from 0 to 255" in text
    assert "- a: a case must have every modality; got no 'hbv', looked for hbv{.nii.gz" in text
    assert (
        "Remove the case, use --data.modalities t2w adc or pass --data.allow-missing True." in text
    )
    assert "- b: a case must have a label for the target 'lesion'; got none, looked for" in text
    assert "t2w.nii.gz must be a readable image" in text
    assert "- e: 'adc' must overlap the reference image" in text
    assert "- f 1: a case id must consist of at most 64 letters" in text
    assert_nothing_built(config)


def test_faults_in_voxels_are_told_at_once_and_nothing_is_built(tmp_path):
    cases = [raw_case(name) for name in "abc"]
    cases[1].label.array[0, 0, 0] = 999
    cases[2].images["hbv"].array[:] = 4
    nan = raw_case("d")
    nan.images["hbv"].array[0, 0, 0] = np.nan
    config = write_folder(tmp_path / "data", *cases, nan)
    with pytest.raises(DataError) as caught:
        FolderBuilder(config).prepare()
    text = str(caught.value)
    assert "faults: 3, cases: 4." in text
    assert "- b: label values must be whole numbers from 0 to 255" in text
    assert "- c: 'hbv' must vary within the crop; got the constant 4" in text
    assert "hbv.nii.gz must hold finite values; got 1 NaN or infinite voxels" in text
    assert_nothing_built(config)
    save(config.path / "b" / "lesion.nii.gz", raw_case().label)
    save(config.path / "c" / "hbv.nii.gz", raw_case().images["hbv"])
    shutil.rmtree(config.path / "d")
    _, built = build(config)
    assert list(built) == ["a", "b", "c"]


def test_an_interrupted_build_goes_on_where_it_was(tmp_path, monkeypatch):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b"), raw_case("c"))
    builder = FolderBuilder(config)
    read = FolderBuilder.read_available
    begun = []

    def interrupt(self, entry):
        begun.append(entry.case_id)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return read(self, entry)

    monkeypatch.setattr(FolderBuilder, "read_available", interrupt)
    with pytest.raises(KeyboardInterrupt):
        builder.prepare()
    assert not builder.is_prepared()
    assert_nothing_built(config)
    _, cases = build(config)
    assert begun == ["a", "b", "b", "c"]
    assert list(cases) == ["a", "b", "c"]
    expected = preprocess_case(builder.read_case(builder.entries[0]), config)
    assert_same(cases["a"], expected)
    assert not (config.cache / "nifti_folder" / ".staging").exists()


def test_repairing_one_case_does_not_repeat_the_others(tmp_path, monkeypatch):
    cases = [raw_case(name) for name in "ab"]
    cases[1].label.array[0, 0, 0] = 999
    config = write_folder(tmp_path / "data", *cases)
    with pytest.raises(DataError, match="faults: 1, cases: 2"):
        FolderBuilder(config).prepare()
    save(config.path / "b" / "lesion.nii.gz", raw_case().label)
    read, begun = FolderBuilder.read_available, []

    def counted(self, entry):
        begun.append(entry.case_id)
        return read(self, entry)

    monkeypatch.setattr(FolderBuilder, "read_available", counted)
    _, built = build(config)
    assert begun == ["b"]
    assert list(built) == ["a", "b"]


def test_a_killed_write_leaves_no_data_set_and_is_made_good(tmp_path, monkeypatch):
    config = write_folder(tmp_path / "data", raw_case("a"), raw_case("b"))
    monkeypatch.setattr(FolderBuilder, "_write_info", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        FolderBuilder(config).prepare()
    monkeypatch.undo()
    builder = FolderBuilder(config)
    assert not builder.is_prepared()
    _, cases = build(config)
    assert list(cases) == ["a", "b"]


@pytest.mark.slow
def test_several_processes_give_the_same_data_set(tmp_path):
    raws = [raw_case(name, seed=i, positive=i % 2 == 0) for i, name in enumerate("abcde")]
    config = write_folder(tmp_path / "data", *raws)
    alone, _ = build(config)
    pooled = FolderBuilder(dataclasses.replace(config, cache=tmp_path / "other"))
    pooled.prepare(num_workers=2)
    assert pooled.fingerprint == alone.fingerprint
    assert pooled.infos == alone.infos
    with pytest.raises(DataError, match=r"at least one worker; got 0. Use --num-workers=1"):
        FolderBuilder(dataclasses.replace(config, cache=tmp_path / "third")).prepare(num_workers=0)


def test_a_slower_process_takes_the_result_of_a_faster_one(tmp_path):
    config = write_folder(tmp_path / "data", raw_case())
    slow = FolderBuilder(config)
    read = slow.read_available

    def overtaken(entry):
        FolderBuilder(config).prepare()
        return read(entry)

    slow.read_available = overtaken
    slow.prepare()
    assert [decode(record).case_id for record in slow.source()] == ["a"]


def test_what_was_preprocessed_with_is_kept_with_the_data_set(tmp_path):
    built, _ = build(write_folder(tmp_path / "data", raw_case()))
    stored = json.loads((built.data_path / "cases.json").read_text("utf-8"))
    assert stored["preprocess"] == json.loads(json.dumps(dataclasses.asdict(SMALL)))


def run_build(config: DataConfig, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipelines.build", f"--data.name={config.name}"]
    command += [f"--data.path={config.path}", f"--data.cache={config.cache}"]
    command += ["--data.preprocess.size", "6", "16", "16"]
    command += ["--data.preprocess.spacing-mm", "3", "1", "1", *options]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=Path(__file__).parents[2]
    )


@pytest.mark.slow
def test_build_from_the_command_line(tmp_path):
    config = write_folder(
        tmp_path / "data", *(raw_case(name, seed=i) for i, name in enumerate("ab"))
    )
    done = run_build(config, "--num-workers=2")
    assert done.returncode == 0, done.stderr
    assert "2 cases, 2 with lesion: " in done.stdout
    assert FolderBuilder(config).is_prepared()
    (config.path / "a/adc.nii.gz").unlink()
    done = run_build(config)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: the data set cannot be built; cases: 2, errors: 1")


def test_beam_is_asked_for_by_name(tmp_path):
    config = write_folder(tmp_path / "data", raw_case())
    if importlib.util.find_spec("apache_beam") is None:
        with pytest.raises(DataError, match=r"needs Apache Beam; got --beam.runner=DirectRunner"):
            FolderBuilder(config).prepare(beam_runner="DirectRunner")
    else:
        with pytest.raises(DataError, match=r"one that Beam knows; got 'NoRunner'"):
            FolderBuilder(config).prepare(beam_runner="NoRunner")
    assert_nothing_built(config)


def test_beam_builds_the_same_data_set(tmp_path):
    pytest.importorskip("apache_beam", reason="the extra [beam] is not installed")
    raws = [raw_case(name, seed=i, positive=i % 2 == 0) for i, name in enumerate("abc")]
    config = write_folder(tmp_path / "data", *raws)
    alone, cases = build(config)
    beamed = FolderBuilder(dataclasses.replace(config, cache=tmp_path / "other"))
    beamed.prepare(beam_runner="DirectRunner")
    assert beamed.fingerprint == alone.fingerprint
    assert {info.case_id for info in beamed.infos} == {info.case_id for info in alone.infos}
    for record in beamed.source():
        assert_same(decode(record), cases[decode(record).case_id])


def test_a_folder_for_a_data_set_that_reads_none_is_refused(tmp_path):
    for name in ("phantom", "phantom2"):
        with pytest.raises(
            DataError, match=rf"is drawn reads no folder; got --data.name={name} and"
        ):
            open_builder(DataConfig(name=name, path=tmp_path, cache=tmp_path))
