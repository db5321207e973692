"""False candidates in the gland and outside of it: counted by hand, and in runs that say so."""

import dataclasses
import json

import numpy as np
import pytest
import scipy

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.serving import loading
from experiments import false_positives
from experiments.false_positives import FalsePositivesConfig, Located, count, format_table
from experiments.process.records import write_record
from experiments.run_folder import SCHEMA, RunFolder, RunRecord
from experiments.settings.stored import to_json
from tests.experiments.probable_run import phantom_source, probable_run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return phantom_source(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def glands(source):
    config, _ = source
    return loading.build(dataclasses.replace(config.data, target="gland"))


@pytest.fixture(scope="module")
def fold_of(source):
    return {info.case_id: number % 2 for number, info in enumerate(source[1].info)}


LOCATED = Located(
    true=[0.9, 0.5, 0.7],
    inside=[0.95, 0.6, 0.1],
    outside=[0.8, 0.7, 0.2],
    num_lesions=4,
    num_cases=9,
)


@pytest.mark.parametrize(
    ("sensitivity", "found", "confidence", "inside", "outside"),
    [
        (0.25, 1, 0.9, 1, 0),
        (0.3, 2, 0.7, 1, 2),  # the fewest lesions that make the share; equal confidences count
        (0.5, 2, 0.7, 1, 2),
        (0.75, 3, 0.5, 2, 2),
        (1.0, 4, None, None, None),  # one lesion has no candidate
    ],
)
def test_counts_from_the_confidence_on_that_finds_the_share(
    sensitivity, found, confidence, inside, outside
):
    row = count("a", LOCATED, sensitivity)
    assert (row.num_found, row.confidence) == (found, confidence)
    assert (row.inside, row.outside) == (inside, outside)
    assert (row.num_cases, row.num_lesions) == (9, 4)


def test_a_share_that_is_whole_in_exact_numbers_asks_for_no_lesion_more():
    located = Located([0.5] * 10, [], [], num_lesions=10, num_cases=10)
    assert [count("a", located, share / 10).num_found for share in range(1, 11)] == [*range(1, 11)]


def test_the_table_says_what_was_never_found():
    table = format_table([count("runs/a", LOCATED, share) for share in (0.5, 1.0)], "gland")
    assert "| runs/a | 9 | 2 of 4 (50%) | 0.700 | 1 | 2 |" in table
    assert "| runs/a | 9 | 4 of 4 (100%) | never |  |  |" in table


def blob(free: np.ndarray) -> tuple[slice, ...]:
    """27 voxels around the place farthest from where it must not be."""
    depth = scipy.ndimage.distance_transform_edt(np.pad(free, 1))[1:-1, 1:-1, 1:-1]
    middle = np.unravel_index(depth.argmax(), free.shape)
    assert depth[middle] > 3
    return tuple(slice(n - 1, n + 2) for n in middle)


def test_runs_are_counted_by_where_their_candidates_lie(source, glands, fold_of, tmp_path, capsys):
    """One lesion at 0.9, the others at 0.5; false ones beside them, of which 0.4 is too faint."""
    _, cases = source
    order = [info.case_id for info in cases.info]
    first = next(info.case_id for info in cases.info if info.positive)
    strength = dict(zip(order, [0.7, 0.6, 0.4] + [0.0] * len(order), strict=False))
    number = 0

    def said(case, *, beyond):
        nonlocal number
        lesion, gland = case.original_truth > 0, glands[case.case_id].original_truth > 0
        probability = np.where(lesion, 0.9 if case.case_id == first else 0.5, 0.0)
        number += scipy.ndimage.label(lesion, np.ones((3, 3, 3)))[1]
        probability[blob(~gland & ~lesion if beyond else gland & ~lesion)] = strength[case.case_id]
        return probability

    runs = [
        probable_run(
            tmp_path / name, *source, fold_of, lambda case, beyond=beyond: said(case, beyond=beyond)
        )
        for name, beyond in (("in", False), ("out", True))
    ]
    rows = false_positives.run(
        FalsePositivesConfig(tuple(runs), sensitivities=(1e-6, 1.0), json=tmp_path / "rows.json")
    )
    lesions = number // 2
    assert lesions > 1
    assert [(row.num_found, row.num_lesions, row.num_cases) for row in rows] == [
        (1, lesions, 8), (lesions, lesions, 8)
    ] * 2  # fmt: skip
    assert [row.confidence for row in rows] == pytest.approx([0.9, 0.5] * 2)
    assert [(row.inside, row.outside) for row in rows] == [(0, 0), (2, 0), (0, 0), (0, 2)]
    assert f"| {runs[1]} | 8 | {lesions} of {lesions} (100%) | 0.500 | 0 | 2 |" in (
        capsys.readouterr().out
    )
    stored = json.loads((tmp_path / "rows.json").read_text("utf-8"))["false_positives"]
    assert [row["outside"] for row in stored] == [0, 0, 0, 2]


@pytest.fixture(scope="module")
def silent(source, fold_of, tmp_path_factory):
    """A run that finds nothing."""
    folder = tmp_path_factory.mktemp("runs") / "silent"
    return probable_run(folder, *source, fold_of, lambda case: np.zeros(case.original_shape))


def test_a_run_that_finds_nothing_never_does(silent):
    (row,) = false_positives.run(FalsePositivesConfig((silent,), sensitivities=(0.5,)))
    assert (row.confidence, row.inside, row.outside) == (None, None, None)


def test_a_run_of_other_targets_than_lesions_is_refused(source, fold_of, tmp_path):
    config, _ = source
    gland = dataclasses.replace(config, data=dataclasses.replace(config.data, target="gland"))
    write_record(
        RunFolder(tmp_path).config, RunRecord(to_json(gland), "fingerprint"), schema=SCHEMA
    )
    with pytest.raises(ConfigError, match=r"candidates are of lesions; got .*, whose target is"):
        false_positives.gather(tmp_path, "gland")


def test_cases_without_a_gland_are_named(silent, glands, monkeypatch):
    others = loading.CaseSource([], glands.info[1:], glands.fingerprint)
    built = loading.build
    monkeypatch.setattr(
        loading, "build", lambda data: others if data.target == "gland" else built(data)
    )
    first = glands.info[0].case_id
    with pytest.raises(DataError, match=f"1 of 8 have none, the first {first}. Name another --wi"):
        false_positives.gather(silent, "gland")


def test_a_run_without_any_lesion_is_refused(silent, source, monkeypatch):
    _, cases = source
    healthy = cases.changed(
        lambda case: dataclasses.replace(case, truth=0 * case.truth), cases.fingerprint
    )
    monkeypatch.setattr(false_positives, "source_of", lambda folder, config: healthy)
    with pytest.raises(DataError, match=r"at least one case must have a lesion; .*silent has none"):
        false_positives.gather(silent, "gland")


def test_no_run_is_refused():
    with pytest.raises(ConfigError, match="at least one run must be given; got none"):
        false_positives.main([])


@pytest.mark.parametrize("shares", [(0.0,), (1.1, 0.5), (), (float("nan"),)])
def test_shares_that_cannot_be_are_refused(shares):
    with pytest.raises(ConfigError, match="sensitivities must be shares of all lesions, above 0"):
        FalsePositivesConfig(sensitivities=shares)
