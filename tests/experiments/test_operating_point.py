"""Operating points: chosen on other patients, by hand and by property."""

import dataclasses
import json

import numpy as np
import pytest
import scipy

import cmsad_jax.export
from cmsad_jax.types import ConfigError
from experiments import predict
from experiments.exporting.artifact import describe
from experiments.measuring import lesions, summary
from experiments.measuring.masks import Masks
from experiments.measuring.metrics import METRICS, dice
from experiments.measuring.operating_point import OperatingPoint, Scaling, choose, dice_at, operate
from experiments.measuring.rows import Bin, Detection, Match, Row
from experiments.process.records import decode, encode
from tests.experiments.test_predict import case_of, config, load, quick, record_of, write_folder

__all__ = ["config", "quick"]  # fixtures

EMPTY = (Bin(0, 0.0, 0),) * lesions.VOXEL_BINS


ONE_VOXEL = (*EMPTY[1:], Bin(1, 1.0, 1))


def case(*matches, voxels=None):
    """A case of (lesion, confidence) pairs; a lesion has a voxel."""
    found = tuple(Match(lesion, confidence, 0.5 * lesion) for lesion, confidence in matches)
    strongest = max((match.confidence for match in found), default=0.0)
    default = ONE_VOXEL if any(match.lesion for match in found) else EMPTY
    return Detection(strongest, found, voxels or default)


def population(seed, count=40):
    rng = np.random.default_rng(seed)
    cases = []
    for index in range(count):
        matches = [(0, rng.beta(2, 4)) for _ in range(rng.integers(0, 3))]
        if index % 3 == 0:
            matches.append((1, rng.beta(5, 2)))
        cases.append(case(*matches))
    return cases


def test_the_least_confidence_is_the_highest_that_finds_nine_in_ten():
    found = [case((1, 0.05 + 0.09 * i)) for i in range(10)]
    negatives = [case((0, 0.3)), case()]
    point = choose([*found, *negatives])
    assert point.least_confidence == pytest.approx(0.14), "the weakest of ten may be left out"
    assert (point.num_cases, point.num_lesions) == (12, 10)


def test_where_fewer_lesions_have_a_candidate_all_of_these_are_called():
    point = choose([case((1, 0.8)), case((1, 0.4)), case((1, 0.0)), case((0, 0.9))])
    assert point.least_confidence == pytest.approx(0.4)


@pytest.mark.parametrize(
    "cases",
    [
        [case((1, 0.5)), case((1, 0.6))],
        [case((0, 0.5)), case()],
        [case((1, 0.0)), case((0, 0.6))],
    ],
)
def test_without_both_kinds_or_a_lesion_found_there_is_nothing_to_learn(cases):
    assert choose(cases) is None
    assert operate({0: cases, 1: cases}) is None


def test_a_single_fold_has_no_other_patients():
    assert operate({0: population(0)}) is None


def test_scaling_solves_the_equations_of_logistic_regression_with_platts_targets():
    cases = population(0)
    fitted = choose(cases).lesions
    matches = [match for case in cases for match in case.lesions if match.confidence > 0]
    lesion = np.array([match.lesion for match in matches], bool)
    score = scipy.special.logit([match.confidence for match in matches])
    hits, misses = lesion.sum(), (~lesion).sum()
    target = np.where(lesion, (hits + 1) / (hits + 2), 1 / (misses + 2))
    error = [fitted(match.confidence) for match in matches] - target
    assert fitted.slope > 0
    assert error.sum() == pytest.approx(0, abs=1e-3)
    assert error @ score == pytest.approx(0, abs=1e-3)


def test_confidence_that_says_nothing_gives_everyone_the_frequency():
    """Where the less confident are the likelier, the slope is 0, not negative."""
    cases = [case((1, 0.2))] * 5 + [case((0, 0.8))] * 15
    fitted = choose(cases).cases
    assert fitted.slope == 0
    assert fitted(0.1) == fitted(0.9) == pytest.approx((5 * 6 / 7 + 15 / 17) / 20, abs=1e-4)


def test_a_case_without_a_candidate_has_the_probability_of_the_least_one():
    fitted = Scaling(1.5, -0.5)
    assert fitted(0.0) == fitted(lesions.LEAST_PEAK) > 0
    assert fitted(1.0) < 1


def test_a_fold_is_judged_by_other_patients_alone():
    """Its own labels move neither its point nor the probabilities of its cases."""
    folds = {fold: population(fold) for fold in range(3)}
    before = operate(folds)
    turned = [case(*((1 - m.lesion, m.confidence) for m in one.lesions)) for one in folds[1]]
    after = operate(folds | {1: turned})
    assert after.per_fold[1] == before.per_fold[1]
    assert after.per_fold[0] != before.per_fold[0]


def test_what_comes_of_the_points_by_hand():
    """Both folds hold a lesion of 0.8; a false alarm of 0.9 is called, one of 0.3 is not."""
    fold = [case((1, 0.8)), case((0, 0.9)), case((0, 0.3)), case()]
    found = operate({0: fold, 1: fold}).found
    assert found.sensitivity == 1.0
    assert (found.num_false_positive_cases, found.num_negatives) == (2, 6)
    point = choose(fold)
    errors = [(point.cases(c.confidence) - c.positive) ** 2 for c in fold]
    assert found.brier == pytest.approx(np.mean(errors))


def test_calibration_error_falls_on_cases_that_were_not_learnt_from():
    folds = {fold: population(fold, 120) for fold in range(4)}
    before = summary.detection.calibration([case for cases in folds.values() for case in cases])
    after = operate(folds).found.expected_calibration_error
    assert after < 0.6 * before.cases.expected_calibration_error


def test_dice_from_bins_is_that_of_the_mask():
    rng = np.random.default_rng(0)
    probability = rng.uniform(size=(4, 8, 8)).astype(np.float32)
    truth = (probability + rng.normal(scale=0.3, size=probability.shape) > 0.7).astype(np.uint8)
    found = lesions.detect(probability, truth)
    for threshold in (0.25, 0.5, 0.75):
        masks = Masks(probability > threshold, truth > 0, (1.0, 1.0, 1.0), truth.shape)
        assert dice_at(found, threshold) == pytest.approx(dice(masks))


def test_the_voxel_threshold_is_the_edge_of_the_best_dice():
    bins = [Bin(10, 0.0, 10 if index >= 6 else 0) for index in range(lesions.VOXEL_BINS)]
    cases = [case((1, 0.9), voxels=tuple(bins)), case((0, 0.2))]
    assert choose(cases).threshold == pytest.approx(0.3)
    flat = tuple(Bin(10 * (index == 19), 0.0, 10 * (index == 19)) for index in range(20))
    assert choose([case((1, 0.9), voxels=flat), case()]).threshold == 0.5, "of equal ones"


def test_points_are_in_the_summary_of_folds_and_survive_json():
    metrics = dict.fromkeys(METRICS)
    rows = [
        Row(f"{fold}_{i}", f"{fold}_{i}", fold, "lesion", metrics, one)
        for fold in range(2)
        for i, one in enumerate(population(fold))
    ]
    found = summary.summarise(rows, folds=[0, 1])
    assert decode(type(found.operation), json.loads(json.dumps(encode(found.operation))))
    assert "operating points from the other folds" in summary.format_summary(found)
    alone = [dataclasses.replace(row, fold=None) for row in rows]
    assert summary.summarise(alone).operation is None, "no folds, no other patients"


POINT = OperatingPoint(0.6, Scaling(2.0, -1.0), Scaling(1.0, -2.0), 0.35, 80, 25)


def with_point(path, monkeypatch, **point):
    """The model of ``quick`` with an operating point."""
    model = predict.export.load(path)
    values = encode(POINT) | point
    description = dataclasses.replace(model.description, operating_point=values)
    monkeypatch.setattr(
        predict.export, "load", lambda _: dataclasses.replace(model, description=description)
    )


def test_prediction_says_probabilities_and_what_is_called(quick, tmp_path, monkeypatch):
    with_point(quick, monkeypatch)
    write_folder(tmp_path / "in", case_of("a"))
    arguments = ["--model", str(quick), "--input", str(tmp_path / "in")]
    predict.main([*arguments, "--output", str(tmp_path / "out"), "--threshold=learnt"])
    record = record_of(tmp_path / "out")
    (found,) = record["cases"]
    assert record["settings"]["threshold"] == 0.35
    probability = load(tmp_path / "out/probabilities/a.nii.gz")
    np.testing.assert_array_equal(load(tmp_path / "out/masks/a.nii.gz") > 0, probability > 0.35)
    assert found["candidates"]
    for candidate in found["candidates"]:
        expected = scipy.special.expit(2 * scipy.special.logit(candidate["confidence"]) - 1)
        assert candidate["probability"] == pytest.approx(expected, abs=1e-5)
        assert candidate["called"] == (candidate["confidence"] >= 0.6)
    strongest = found["candidates"][0]["confidence"]
    expected = scipy.special.expit(scipy.special.logit(strongest) - 2)
    assert found["lesion_probability"] == pytest.approx(expected, abs=1e-5)
    assert found["called"] == any(candidate["called"] for candidate in found["candidates"])


def test_without_a_point_nothing_is_said_of_it(quick, tmp_path):
    write_folder(tmp_path / "in", case_of("a"))
    arguments = ["--model", str(quick), "--input", str(tmp_path / "in")]
    predict.main([*arguments, "--output", str(tmp_path / "out")])
    (found,) = record_of(tmp_path / "out")["cases"]
    assert "lesion_probability" not in found
    assert "probability" not in found["candidates"][0]
    with pytest.raises(ConfigError, match="a threshold is learnt from two folds or more"):
        predict.main([*arguments, "--output", str(tmp_path / "other"), "--threshold=learnt"])


def test_an_odd_operating_point_is_refused_before_anything_is_read(quick, tmp_path, monkeypatch):
    with_point(quick, monkeypatch, least_confidence="high")
    write_folder(tmp_path / "in", case_of("a"))
    arguments = ["--model", str(quick), "--input", str(tmp_path / "in")]
    with pytest.raises(ConfigError, match="operating point of a model must be as it was exported"):
        predict.main([*arguments, "--output", str(tmp_path / "out")])


def test_an_exported_run_keeps_its_point(config):
    made = describe(
        config, members=["a"], provenance={}, metrics={}, license="", operating_point=encode(POINT)
    )
    assert decode(OperatingPoint, made.operating_point) == POINT
    assert isinstance(made, cmsad_jax.export.Description)
