"""Damaged files end in an error that names them, at once and within bounds, never in a crash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.reading.volume_io import read_volume
from tests.data_pipelines.corruptions import KINDS, atomic_file, meant, outcome

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The corpus read in a process of its own: a crash or a hang would be seen."""
    folder = tmp_path_factory.mktemp("corpus")
    done = subprocess.run(
        [sys.executable, "-m", "tests.data_pipelines.corruptions", str(folder)],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_every_damaged_file_ends_in_an_error_that_names_it(watched):
    results = {name: result for name, result, _ in watched["results"]}
    assert len(results) >= 500
    expected = {name: "same" if name.startswith("same") else "error" for name in results}
    assert {n: r for n, r in results.items() if r != expected[n]} == {}


def test_no_damaged_file_costs_much(watched):
    slowest = max(watched["results"], key=lambda result: result[2])
    assert slowest[2] < 2, slowest
    assert watched["peak_mib"] < 1024


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, {kind: atomic_file(folder, kind) for kind in KINDS}


@settings(
    max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(KINDS),
    places=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    head=st.booleans(),
)
def test_any_damage_is_survived(whole, kind, places, cut, head):
    folder, contents = whole
    content = bytearray(contents[kind])
    reach = min(len(content), 400) if head else len(content)
    for place, change in places:
        content[int(place * reach)] ^= change
    if cut is not None:
        content = content[: int(cut * len(content))]
    path = folder / f"damaged.{kind}"
    path.write_bytes(content)
    result = outcome(path)
    if kind == "nii.gz":  # the one format whose checksum covers the header too
        assert result in ("error", "same")
    else:
        assert result in ("error", "same", "other")
    if result != "error":
        assert read_volume(path).array.size == meant().array.size


@settings(max_examples=100, deadline=2000)
@given(content=st.binary(max_size=2000), kind=st.sampled_from(KINDS))
def test_any_bytes_are_survived(tmp_path_factory, content, kind):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    path = folder / f"any.{kind}"
    path.write_bytes(content)
    assert outcome(path) == "error"
