"""Loading on synthetic records, and once through a stored data set."""

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.building import builders
from data_pipelines.building.records import encode
from data_pipelines.case import STORED_UNIT, Case, CaseInfo
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.serving.loading import (
    CaseSource,
    build,
    eval_cases,
    sampling_plan,
    train_batches,
    train_plans,
)
from data_pipelines.serving.sampling import Sampling

SHAPE = (4, 12, 10)
CROP = (2, 8, 6)
CASE_BYTES = 4 * 12 * 10 * (2 * 2 + 1) + 2


class Records(list):
    """Stored records that count how often each is read."""

    def __init__(self, records):
        super().__init__(records)
        self.num_reads = [0] * len(records)

    def __getitem__(self, index):
        self.num_reads[index] += 1
        return super().__getitem__(index)


def make_case(index: int) -> Case:
    """The label is where the first modality is a multiple of 97; every third case has one."""
    image = np.random.default_rng(index).integers(1, 5000, (*SHAPE, 2)).astype(np.int16)
    if index % 3 == 0:
        image[1, 2:5, 3:6, 0] = 97 * np.arange(1, 10).reshape(3, 3)
    else:
        image[..., 0] += image[..., 0] % 97 == 0
    label = (image[..., 0] % 97 == 0).astype(np.uint8)
    return Case(
        case_id=f"case{index}",
        patient_id=f"patient{index}",
        image=image,
        label=label,
        present=np.array([True, index != 1]),
        affine=np.diag([1.0, 1.0, 3.0, 1.0]),
        original_shape=SHAPE,
        original_affine=np.diag([1.0, 1.0, 3.0, 1.0]),
        truth=label,
        truth_offset=(0, 0, 0),
    )


def make_source(num_cases=5, **options) -> CaseSource:
    cases = [make_case(i) for i in range(num_cases)]
    info = [CaseInfo(case.case_id, case.patient_id, case.positive) for case in cases]
    return CaseSource(Records([encode(case) for case in cases]), info, "abc", **options)


def batches(source=None, case_ids=None, **options):
    source = source or make_source()
    case_ids = source.case_ids if case_ids is None else case_ids
    return list(train_batches(source, case_ids, sampling(**options)))


def sampling(**options) -> Sampling:
    return Sampling(**{"crop": CROP, "batch_size": 2, "seed": 1, "num_steps": 9, **options})


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_batch_has_the_documented_arrays():
    batch = batches()[0]
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "image": ((2, *CROP, 2), "float32"),
        "label": ((2, *CROP), "int32"),
        "present": ((2, 2), "bool"),
        "key": ((2, 2), "uint32"),
        "case_index": ((2,), "int32"),
    }


def test_batches_hold_the_planned_crops_of_image_and_label():
    source = make_source()
    plan = sampling_plan(source, source.case_ids, sampling())
    drawn = joined(batches(source))
    for i in range(18):
        case, crop = make_case(plan[i].case_index), plan[i]
        window = tuple(slice(o, o + s) for o, s in zip(crop.offset, CROP, strict=True))
        np.testing.assert_array_equal(drawn["image"][i], case.image[window] * STORED_UNIT)
        np.testing.assert_array_equal(drawn["label"][i], case.label[window])
        np.testing.assert_array_equal(drawn["present"][i], case.present)
        np.testing.assert_array_equal(drawn["key"][i], crop.key)
        assert drawn["case_index"][i] == crop.case_index
        assert drawn["label"][i].any() or not crop.foreground


def test_labels_follow_the_image():
    drawn = joined(batches(num_steps=30))
    first = np.rint(drawn["image"][..., 0] / STORED_UNIT).astype(int)
    np.testing.assert_array_equal(drawn["label"], first % 97 == 0)
    assert drawn["label"].any(axis=(1, 2, 3)).sum() >= 20  # a third of 60 at least


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_number_of_threads_changes_nothing(num_threads):
    assert_equal(joined(batches(num_threads=num_threads)), joined(batches()))


def test_batch_size_only_cuts_the_sequence_elsewhere():
    assert_equal(joined(batches(batch_size=3, num_steps=6)), joined(batches()))


def test_resumed_run_goes_on_with_the_same_batches():
    resumed = batches(start_step=5)
    assert len(resumed) == 4
    assert_equal(joined(resumed), joined(batches()[5:]))
    assert batches(start_step=9) == []


def test_other_seed_gives_other_batches():
    assert (joined(batches(seed=2))["key"] != joined(batches())["key"]).any()


def test_an_epoch_covers_every_case():
    drawn = joined(batches(foreground_share=0, batch_size=5, num_steps=3))["case_index"]
    assert np.sort(drawn.reshape(3, 5)).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_only_the_given_cases_are_drawn_and_read():
    source = make_source()
    drawn = joined(batches(source, case_ids=("case3", "case1")))
    assert set(drawn["case_index"]) == {0, 1}
    assert drawn["present"][:, 1].tolist() == (drawn["case_index"] == 0).tolist()
    assert source._records.num_reads[2] == source._records.num_reads[4] == 0


@pytest.mark.parametrize("num_kept", [0, 2, 5])
def test_memory_bound_changes_what_is_read_but_not_the_batches(num_kept):
    source = make_source(memory_bytes=num_kept * CASE_BYTES)
    assert_equal(joined(batches(source)), joined(batches()))
    for case_id in source.case_ids:
        source.arrays(case_id)
    before = sum(source._records.num_reads)
    for case_id in source.case_ids:
        source.arrays(case_id)
    assert sum(source._records.num_reads) - before == 5 - num_kept


def test_crops_may_be_single_slices():
    assert batches(crop=(1, 12, 10))[0]["image"].shape == (2, 1, 12, 10, 2)


def test_stored_arrays_stay_as_they_are():
    source = make_source()
    for batch in batches(source):
        batch["image"] += 1
        batch["label"] += 1
    np.testing.assert_array_equal(source["case0"].image, make_case(0).image)
    np.testing.assert_array_equal(source["case0"].label, make_case(0).label)


def test_evaluation_gives_whole_cases_in_order():
    source = make_source()
    order = ("case4", "case0", "case2")
    cases = list(eval_cases(source, order))
    assert tuple(case.case_id for case in cases) == order
    np.testing.assert_array_equal(cases[1].image, make_case(0).image)
    assert list(eval_cases(source, ())) == []


def test_source_says_what_it_holds():
    source = make_source()
    assert len(source) == 5
    assert source.shape == SHAPE
    assert source.case_ids == tuple(f"case{i}" for i in range(5))
    assert [info.positive for info in source.info] == [True, False, False, True, False]
    assert source.fingerprint == "abc"


def test_foreground_indices_are_those_of_the_label():
    source = make_source()
    expected = np.flatnonzero(make_case(3).label)
    np.testing.assert_array_equal(source.foreground("case3"), expected)
    assert source.foreground("case3").dtype == np.int32
    assert source.foreground("case1").size == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"crop": (6, 12, 10)},
            r"crop must fit into the volume; got crop \(6, 12, 10\) and volume \(4, 12, 10\)",
        ),
        ({"batch_size": 0}, "batch size must be 1 or more; got 0. Use --train.batch-size 2"),
        ({"case_ids": ()}, "there must be a case to train on; got none"),
        (
            {"case_ids": ("case1", "case2")},
            "foreground crops need a training case with foreground; got 2 cases without any",
        ),
        ({"case_ids": ("case9",)}, "cases must be of the data set; got 'case9'"),
        (
            {"part": (0, 3)},
            "batch size must be divisible by the number of processes that read it; got 2 and 3. "
            "Use --train.batch-size 6",
        ),
    ],
)
def test_impossible_requests_fail_before_the_first_batch(options, message):
    source = make_source()
    case_ids = options.pop("case_ids", source.case_ids)
    with pytest.raises(DataError, match=message):
        train_batches(source, case_ids, sampling(**options))


@pytest.mark.parametrize("start_step", [0, 3])
def test_processes_read_equal_parts_that_make_the_batch(start_step):
    options = {"batch_size": 4, "num_steps": 5, "start_step": start_step}
    whole = batches(**options)
    halves = [batches(**options, part=(i, 2)) for i in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert_equal(joined(parts), batch)
    source = make_source()
    plans = [
        list(train_plans(source, source.case_ids, sampling(**options, part=(i, 2))))
        for i in range(2)
    ]
    for batch, *parts in zip(whole, *plans, strict=True):
        np.testing.assert_array_equal(joined(parts)["key"], batch["key"])


def test_unknown_data_set_is_refused_by_name(tmp_path):
    message = (
        r"data set must be one of .*nifti_folder.*; got 'brats'. Use one of these with --data.name"
    )
    with pytest.raises(DataError, match=message):
        build(DataConfig(name="brats", cache=tmp_path))


def test_every_builder_is_found():
    assert {"nifti_folder", "phantom", "picai"} <= set(builders.builder_names())


def test_a_built_data_set_gives_batches_and_is_not_built_again(tmp_path):
    config = DataConfig(name="phantom", phantom=PhantomOptions(num_cases=4), cache=tmp_path)
    source = build(config)
    assert len(source) == 4
    share = 1 / 3 if any(info.positive for info in source.info) else 0
    drawn = sampling(crop=(8, 32, 32), num_steps=3, foreground_share=share)
    first = joined(list(train_batches(source, source.case_ids, drawn)))
    assert first["image"].shape == (6, 8, 32, 32, 3)
    assert np.isfinite(first["image"]).all()
    assert first["image"].std() > 0
    again = build(config)
    assert again.fingerprint == source.fingerprint
    assert_equal(joined(list(train_batches(again, again.case_ids, drawn))), first)
    pairs = itertools.zip_longest(eval_cases(source, source.case_ids), source.info)
    for case, info in pairs:
        assert (case.case_id, case.positive) == (info.case_id, info.positive)


def damage(kind: str, file: Path) -> None:
    if kind == "gone":
        file.unlink()
    elif kind == "emptied":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:70_000])
    else:
        content = bytearray(file.read_bytes())
        content[file.stat().st_size // 3] ^= 1
        file.write_bytes(content)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A data set that was built, to be copied."""
    config = DataConfig(
        name="phantom", phantom=PhantomOptions(num_cases=4), cache=tmp_path_factory.mktemp("stored")
    )
    build(config)
    return config


@pytest.mark.parametrize("kind", ["gone", "emptied", "cut", "flipped", "information gone"])
def test_built_files_that_are_damaged_or_gone_are_named(stored, tmp_path, kind):
    cache = tmp_path / "cache"
    shutil.copytree(stored.cache, cache)
    config = dataclasses.replace(stored, cache=cache)
    (file,) = cache.rglob("*.array_record-*")
    if kind == "information gone":
        (file.parent / "dataset_info.json").unlink()
    else:
        damage(kind, file)

    def read_all():
        source = build(config)
        return list(eval_cases(source, source.case_ids))

    with pytest.raises(DataError) as error:
        read_all()
    said = str(error.value)
    assert said.startswith("a built data set must stay as it was written; cannot read ")
    assert str(file.parent) in said
    assert said.endswith("run the same command again: what was finished before is intact.")
    shutil.rmtree(file.parent)  # the remedy
    assert build(config).fingerprint == build(stored).fingerprint


def test_file_lost_while_it_is_read_is_named_with_the_case(stored, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(stored.cache, cache)
    source = build(dataclasses.replace(stored, cache=cache))
    first, second, *_ = source.case_ids
    assert source[first].case_id == first
    (file,) = cache.rglob("*.array_record-*")
    content = file.read_bytes()
    os.truncate(file, 0)
    drawn = sampling(crop=(8, 32, 32), num_steps=3, foreground_share=0)
    with pytest.raises(DataError, match=f"cannot read case {second} in {file.parent}"):
        source[second]
    with pytest.raises(DataError, match="cannot read case"):
        list(train_batches(source, source.case_ids, drawn))
    file.write_bytes(content)
    assert source[second].case_id == second
