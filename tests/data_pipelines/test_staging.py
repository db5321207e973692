"""Cases that are kept between examination and writing, and the processes that examine them."""

import os
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.building import staging
from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.preparing.examination import Examination, examine
from tests.data_pipelines.fabricate import SMALL, raw_case

CONFIG = DataConfig(preprocess=SMALL)


def examined(positive=True) -> Examination:
    raw = raw_case(positive=positive)
    raw.images["adc"].array[:] //= 100
    return examine(raw.case_id, raw, (), {"adc": Path("adc.nii.gz")}, CONFIG)


@pytest.mark.parametrize("positive", [True, False])
def test_what_is_kept_comes_back(tmp_path, positive):
    found = examined(positive)
    staging.save(tmp_path / "new" / "a.npz", found)
    kept = staging.load(tmp_path / "new" / "a.npz")
    assert (kept.case_id, kept.problems, kept.facts) == (found.case_id, found.problems, found.facts)
    assert [problem.file for problem in kept.problems] == [Path("adc.nii.gz")]
    for name, value in vars(found.case).items():
        np.testing.assert_array_equal(getattr(kept.case, name), value, err_msg=name)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]


def test_what_is_damaged_is_done_again(tmp_path):
    path = tmp_path / "a.npz"
    assert staging.load(path) is None
    staging.save(path, examined())
    content = path.read_bytes()
    end = content.rindex(b"PK\x01\x02")  # of the directory's last entry: method, then flags
    method = content[: end + 10] + b"\x63" + content[end + 11 :]
    encrypted = content[: end + 8] + b"\x01" + content[end + 9 :]
    for damaged in (content[: len(content) // 2], b"", b"no archive", method, encrypted):
        path.write_bytes(damaged)
        assert staging.load(path) is None


class Dying:
    """An examiner whose process is killed at the first case."""

    def examine_entry(self, entry):
        os._exit(9)


class Naming:
    """An examiner that tells the case and the process."""

    def examine_entry(self, entry):
        return Examination(entry, ())


def name_and_process(found: Examination) -> tuple[str, int]:
    return found.case_id, os.getpid()


def test_processes_keep_the_order_and_a_killed_one_is_told():
    names = [str(i) for i in range(7)]
    results = staging.examine_all(
        Naming(), names, num_workers=2, description="", keep=name_and_process
    )
    assert [name for name, _ in results] == names
    assert os.getpid() not in {process for _, process in results}
    with pytest.raises(
        DataError, match=r"one of 2 killed, .* data_pipelines.build --num-workers=1 with .* kept"
    ):
        staging.examine_all(Dying(), names, num_workers=2, description="", keep=name_and_process)


def test_small_data_sets_need_no_processes():
    assert staging.default_workers(50) == 1
    assert staging.default_workers(1500) == min(os.cpu_count() or 1, 8)
