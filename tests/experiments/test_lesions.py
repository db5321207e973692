import contextlib
import io
import json

import nibabel as nib
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from experiments.measuring import detection, lesions
from experiments.measuring.rows import Detection, Match

with contextlib.redirect_stdout(io.StringIO()):
    from report_guided_annotation import extract_lesion_candidates

SHAPE = (8, 40, 40)


def load(path):
    return np.asarray(nib.load(path).dataobj).T


def from_map(case_id, found, truth, patient=None):
    results, confidence, *_ = lesions.picai_eval().evaluate_case(found, truth.astype(np.int32))
    return detection.DetectedCase(
        case_id,
        patient or case_id,
        Detection(
            confidence=float(confidence),
            lesions=tuple(Match(int(target), float(p), float(iou)) for target, p, iou in results),
            voxels=lesions.bins(found.ravel(), truth.ravel() > 0, lesions.VOXEL_BINS),
        ),
    )


@pytest.fixture(scope="module")
def published(shared_data):
    folder = shared_data / "oracles/picai_eval"
    cases = [
        from_map(
            f"case-{i}",
            load(folder / f"case-{i}_detection_map.nii.gz").astype(np.float32),
            load(folder / f"case-{i}_label.nii.gz"),
        )
        for i in range(10)
    ]
    return cases, json.loads((folder / "metrics-expected.json").read_text("utf-8"))


def test_summary_equals_the_published_example(published):
    cases, expected = published
    summary = detection.summarise(cases, num_resamples=200)
    assert summary.average_precision == pytest.approx(expected["AP"], abs=1e-12)
    assert summary.average_precision == pytest.approx(0.27778, abs=1e-5)
    assert summary.auroc == expected["auroc"] == 0.75
    assert summary.picai_score == pytest.approx((0.75 + 0.2777777777777778) / 2)
    assert (summary.num_true_positive, summary.num_false_positive) == (5, 4)
    assert summary.num_false_negative == 5
    assert summary.num_lesions == expected["num_lesions"]
    low, high = summary.interval.average_precision
    assert low < summary.average_precision < high


def ball(centre, radius):
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return (((grid - centre) / (1, 2, 2)) ** 2).sum(-1) <= radius**2


def detected(case_id, probability, truth, patient=None):
    found = lesions.detect(probability, truth)
    return detection.DetectedCase(case_id, patient or case_id, found)


def test_candidates_of_a_map_by_hand():
    probability = np.zeros(SHAPE, np.float32)
    probability[ball((4, 10, 10), 3)] = 0.5  # below the strongest, apart: a second candidate
    probability[ball((4, 28, 28), 3)] = 0.3
    probability[ball((4, 28, 28), 1.5)] = 0.9  # 0.3 < 0.9 / 2.5: the core alone, its rim dropped
    probability[1, 38, 2:6] = 0.8  # four voxels: too small
    found = lesions.detection_map(probability)
    assert sorted(np.unique(found)) == pytest.approx([0, 0.5, 0.9])
    np.testing.assert_array_equal(found > 0.6, ball((4, 28, 28), 1.5))
    np.testing.assert_array_equal((found > 0) & (found < 0.6), ball((4, 10, 10), 3))


@pytest.mark.parametrize("seed", range(6))
def test_candidates_are_those_of_the_published_package(seed):
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=SHAPE)
    for axis in range(3):
        smooth = sum(np.roll(smooth, shift, axis) for shift in range(-1 - seed % 2, 2)) / 3
    probability = np.zeros(SHAPE, np.float32)
    probability[:, 5:30, 8:36] = np.clip(smooth * (0.5 + seed / 2), 0, 1)[:, 5:30, 8:36]
    if seed % 2:
        probability[0, 0, :5] = 1  # a peak too small to count hides nothing
    expected, _, _ = extract_lesion_candidates(probability, threshold="dynamic-v2")
    assert expected.any()
    np.testing.assert_array_equal(lesions.detection_map(probability), expected)


def test_a_hit_a_miss_and_a_false_alarm():
    first, second = ball((4, 10, 10), 3), ball((4, 28, 28), 3)
    both = detected("a", 0.9 * first, first | second)
    assert sorted(both.detection.lesions) == [(1, 0, 0), (1, pytest.approx(0.9), pytest.approx(1))]
    negative = detected("b", 0.4 * first, np.zeros(SHAPE))
    assert negative.detection.lesions == ((0, pytest.approx(0.4), 0.0),)
    silent = detected("c", np.zeros(SHAPE), np.zeros(SHAPE))
    assert silent.detection.lesions == ()
    assert silent.detection.confidence == 0
    summary = detection.summarise([both, negative, silent], num_resamples=200)
    assert summary.auroc == 1
    assert summary.average_precision == pytest.approx(0.5)
    assert summary.sensitivity_at == {"0.5": 0.5, "1": 0.5, "2": 0.5}
    assert summary.num_lesions == 2


def test_precision_is_0_without_a_sign_where_no_lesion_is_found():
    missed = detected("a", np.zeros(SHAPE), ball((4, 10, 10), 3))
    wrong = detected("b", 0.4 * ball((4, 28, 28), 3), np.zeros(SHAPE))
    assert str(detection.summarise([missed, wrong], num_resamples=200).average_precision) == "0.0"


def test_sensitivity_counts_the_weakest_hit_also_where_nothing_is_missed():
    truth = ball((4, 10, 10), 3)
    cases = [detected("a", 0.9 * truth, truth), detected("b", 0.2 * truth, truth)]
    summary = detection.summarise(cases, num_resamples=50)
    assert summary.sensitivity_at["0.5"] == 1
    assert summary.auroc is summary.picai_score is None  # no negative case
    assert summary.interval.auroc is None


def test_without_any_lesion_only_false_alarms_are_counted():
    cases = [detected(str(i), 0.5 * ball((4, 10, 10), 3), np.zeros(SHAPE)) for i in range(3)]
    summary = detection.summarise(cases, num_resamples=50)
    assert summary.average_precision is summary.froc is summary.roc is None
    assert summary.sensitivity_at == {"0.5": None, "1": None, "2": None}
    assert summary.num_false_positive == 3


def test_weighted_figures_equal_scikit_learn_on_copied_cases(published):
    rng = np.random.default_rng(5)
    weights = rng.integers(0, 4, (6, 12)).astype(float)
    positive, score = rng.random(12) < 0.5, rng.integers(1, 6, 12) / 6
    areas = detection.weighted_auroc(weights, positive, score)
    precisions, _ = detection.weighted_detection(weights, positive, score, num_cases=weights.sum(1))
    for row, area, precision in zip(weights, areas, precisions, strict=True):
        copies = {"sample_weight": row}
        assert area == pytest.approx(roc_auc_score(positive, score, **copies))
        assert precision == pytest.approx(average_precision_score(positive, score, **copies))
    cases, _ = published
    metrics = detection.picai_metrics(cases)
    rows = np.array([row for case in cases for row in case.detection.lesions])
    average_precision, sensitivity = detection.weighted_detection(
        np.ones((1, len(rows))), rows[:, 0] == 1, rows[:, 1], num_cases=np.array([10.0])
    )
    assert average_precision[0] == pytest.approx(metrics.AP)
    expected = [metrics.lesion_TPR_at_FPR(rate) for rate in detection.FALSE_POSITIVE_RATES]
    assert [value[0] for value in sensitivity] == pytest.approx(expected)


def test_interval_draws_the_cases_of_a_patient_together():
    rng = np.random.default_rng(1)
    truth = ball((4, 20, 20), 3)
    cases = [
        detected(str(i), rng.uniform(0.1, 0.9) * truth, truth if rng.random() < 0.6 else 0 * truth)
        for i in range(16)
    ]
    copies = [case._replace(case_id=f"{case.case_id}_{k}") for case in cases for k in range(3)]
    single, repeated = (
        detection.summarise(these, num_resamples=500).interval for these in (cases, copies)
    )
    assert repeated.auroc == pytest.approx(single.auroc)


def test_calibration_by_hand():
    probability = np.array([0.01, 0.03, 0.52, 0.54, 0.97, 0.99])
    truth = np.array([False, False, True, False, True, True])
    case = Detection(
        confidence=0.97,
        lesions=(Match(1, 0.97, 1.0),),
        voxels=lesions.bins(probability, truth, lesions.VOXEL_BINS),
    )
    voxels = detection.calibration([case, case]).voxels
    assert sum(voxels.count) == 12
    assert voxels.mean_probability[10] == pytest.approx(0.53)
    assert voxels.frequency[10] == 0.5
    assert voxels.frequency[5] is None
    gaps = (2 * 0.02 + 2 * 0.03 + 2 * 0.02) / 6
    assert voxels.expected_calibration_error == pytest.approx(gaps)
    above = (2 * 0.03 + 2 * 0.02) / 4
    assert voxels.expected_calibration_error_above_lowest_bin == pytest.approx(above)
    cases = detection.calibration([case, case]).cases
    assert cases.expected_calibration_error == pytest.approx(0.03)
    assert cases.count[-1] == 2


def test_perfectly_calibrated_voxels_have_no_error():
    rng = np.random.default_rng(2)
    probability = rng.random(200_000)
    bins = lesions.bins(probability, rng.random(probability.size) < probability, 20)
    assert detection.reliability(np.array(bins)).expected_calibration_error < 0.01
