"""Lesion detection and calibration from the probability maps of lesions.

Detection goes through ``picai_eval``, the evaluation of the PI-CAI challenge (Saha et al., Lancet
Oncology 2024). Lesion candidates follow the published rules of ``report_guided_annotation`` (Bosma
et al., arXiv 2112.05151), which the challenge's baselines use: from the highest probability down,
the connected voxels above ``peak / 2.5`` become a candidate of the peak's confidence, at most five
of more than ten voxels each; candidates that touch an earlier one are dropped. A candidate matches
a lesion from an overlap (IoU) of 0.1 on. A case's confidence is that of its strongest candidate.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from experiments.measuring import statistics

with contextlib.redirect_stdout(io.StringIO()):  # it prints a request for citation
    from picai_eval.eval import evaluate_case
    from picai_eval.metrics import Metrics

TARGET = "lesion"
"""The target of ``data_pipelines.case.DataConfig`` that is detected: a gland is always there,
and what this module measures would say nothing of it."""

FALSE_POSITIVE_RATES = (0.5, 1.0, 2.0)
"""False positives for each case at which the lesion sensitivity is read (FROC)."""

VOXEL_BINS = 20
PATIENT_BINS = 10
"""Bins of equal width over the probabilities from 0 to 1, for calibration."""

_MOST_CANDIDATES = 5
_LEAST_PEAK = 0.01
_PEAK_TO_EDGE = 2.5
_TOO_SMALL = 10  # voxels
_NEIGHBOURS = np.ones((3, 3, 3), bool)

Detection = Mapping[str, Any]
"""``{"case_id", "patient_id", "confidence", "lesions", "voxels"}`` of one case."""


def detection_map(probability: np.ndarray) -> np.ndarray:
    """Lesion candidates of a probability map ``d h w``: each with its confidence, elsewhere 0.

    The rules of the module's docstring, voxel for voxel those of ``report_guided_annotation`` under
    ``threshold="dynamic-v2"``, whose time grows with the number of connected components times that
    of voxels (8 s for a noisy map of 20 x 256 x 256; here 0.2 s).
    """
    found = np.zeros(probability.shape, np.float32)
    box = _box(probability >= _LEAST_PEAK / _PEAK_TO_EDGE)
    if box is None:
        return found
    working, candidates = probability[box].astype(np.float32), found[box]  # a copy and a view
    count = 0
    while count < _MOST_CANDIDATES and (peak := working.max()) >= _LEAST_PEAK:
        edge = peak / _PEAK_TO_EDGE
        labels = np.empty(working.shape, np.int32)
        ndimage.label(working >= edge, _NEIGHBOURS, output=labels)
        large = np.bincount(labels.ravel()) > _TOO_SMALL
        large[0] = False
        if not large.any():
            working[working > edge] = 0
            continue
        eligible = np.where(large[labels], working, 0)
        confidence = eligible.max()
        region = labels == labels[eligible == confidence].min()  # of equal ones the first
        working[region] = 0
        inner = _box(region)
        assert inner is not None
        around = tuple(slice(max(axis.start - 1, 0), axis.stop + 1) for axis in inner)
        grown = np.asarray(ndimage.binary_dilation(region[around], _NEIGHBOURS), bool)
        if not (grown & (candidates[around] > 0)).any():
            candidates[region] = confidence
            count += 1
    return found


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Smallest box that holds all of ``mask``; None if it is empty."""
    labels = ndimage.find_objects(mask.astype(np.uint8))
    return labels[0] if labels else None


def detect(probability: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Lesions, case confidence and calibration counts of one case, ready for JSON.

    Args:
        probability: floating point ``d h w``, of the foreground.
        truth: ``d h w``, foreground where above 0; its lesions are 26-connected.

    Returns:
        * ``lesions``: ``[is a lesion (0 or 1), confidence, IoU]`` of each candidate, and of each
          lesion without one, at confidence 0.
        * ``confidence``: of the strongest candidate.
        * ``voxels``: for ``VOXEL_BINS`` bins of probability, the number of voxels, the sum of their
          probabilities, and how many are foreground.
    """
    truth = truth > 0
    candidates = detection_map(probability)
    results, confidence = [], 0.0
    box = _box(truth | (candidates > 0))  # picai_eval scans all that it gets for each lesion
    if box is not None:
        results, confidence, *_ = evaluate_case(candidates[box], truth[box].astype(np.int32))
    return {
        "confidence": float(confidence),
        "lesions": [
            [int(target), float(score), float(overlap)] for target, score, overlap in results
        ],
        "voxels": _bins(probability.ravel(), truth.ravel(), VOXEL_BINS),
    }


def picai_metrics(detections: Sequence[Detection]) -> Metrics:
    """The cases as ``picai_eval`` summarises them."""
    return Metrics(
        lesion_results={case["case_id"]: case["lesions"] for case in detections},
        case_target={case["case_id"]: int(_positive(case)) for case in detections},
        case_pred={case["case_id"]: case["confidence"] for case in detections},
        # picai_eval takes the least threshold for that of missed lesions and drops it. Without a
        # missed lesion it would drop a candidate's: name 0 as the least.
        thresholds=np.array(
            sorted({score for case in detections for _, score, _ in case["lesions"]} | {0.0})[::-1]
        ),
    )


def summarise(detections: Sequence[Detection], *, num_resamples: int = 2_000) -> dict[str, Any]:
    """Detection and calibration over cases, with 95 % intervals over patients.

    Returns:
        * ``average_precision`` of lesions, ``auroc`` of cases, ``picai_score`` (their mean), and
          ``sensitivity_at``: lesion sensitivity at each of ``FALSE_POSITIVE_RATES`` a case. None
          where there is no lesion, or for AUROC where all cases are positive or all negative.
        * ``interval``: of each of these, by ``experiments.measuring.statistics.bca_interval``.
        * ``num_cases``, ``num_positive``, ``num_lesions``, and over all candidates whatever their
          confidence ``num_true_positive``, ``num_false_positive`` and ``num_false_negative``.
        * ``froc``, ``roc``, ``precision_recall``: the points of the curves.
        * ``calibration``: see ``calibration``.
    """
    metrics = picai_metrics(detections)
    results = [lesion for case in detections for lesion in case["lesions"]]
    positive = [_positive(case) for case in detections]
    num_lesions = sum(target for target, _, _ in results)
    has_lesions, has_both = num_lesions > 0, 0 < sum(positive) < len(detections)
    ap = float(metrics.AP) + 0.0 if has_lesions else None  # -0.0, where nothing is found, is 0.0
    auroc = float(metrics.auroc) if has_both else None
    values = {
        "average_precision": ap,
        "auroc": auroc,
        "picai_score": None if ap is None or auroc is None else (ap + auroc) / 2,
        "sensitivity_at": {
            f"{rate:g}": float(metrics.lesion_TPR_at_FPR(rate)) if has_lesions else None
            for rate in FALSE_POSITIVE_RATES
        },
    }
    return {
        **values,
        "interval": _intervals(detections, values, num_resamples),
        "num_cases": len(detections),
        "num_patients": len({case["patient_id"] for case in detections}),
        "num_positive": sum(positive),
        "num_lesions": num_lesions,
        "num_true_positive": sum(target == 1 and score > 0 for target, score, _ in results),
        "num_false_positive": sum(target == 0 for target, _, _ in results),
        "num_false_negative": sum(target == 1 and score == 0 for target, score, _ in results),
        **_curves(metrics, has_lesions=has_lesions, has_both=has_both),
        "calibration": calibration(detections),
    }


def _positive(case: Detection) -> bool:
    return any(target for target, _, _ in case["lesions"])


def _curves(metrics: Metrics, *, has_lesions: bool, has_both: bool) -> dict[str, Any]:
    froc, roc, precision_recall = None, None, None
    if has_lesions:
        rate, sensitivity = metrics.lesion_FPR, metrics.lesion_TPR
        inside = np.isfinite(rate)
        froc = {
            "false_positives_per_case": [0.0, *rate[inside].tolist()],
            "sensitivity": [0.0, *sensitivity[inside].tolist()],
        }
        curve = metrics.calculate_precision_recall()
        precision_recall = {name: curve[name].tolist() for name in ("precision", "recall")}
    if has_both:
        curve = metrics.calculate_ROC()
        roc = {
            "false_positive_rate": curve["FPR"].tolist(),
            "true_positive_rate": curve["TPR"].tolist(),
        }
    return {"froc": froc, "roc": roc, "precision_recall": precision_recall}


# Intervals: the same figures under weights of the patients, for all resamples at once -----------


def _intervals(
    detections: Sequence[Detection], values: Mapping[str, Any], num_resamples: int
) -> dict[str, Any]:
    names, owner = np.unique([case["patient_id"] for case in detections], return_inverse=True)
    lesions = [
        (index, *lesion)
        for index, case in zip(owner, detections, strict=True)
        for lesion in case["lesions"]
    ]
    of_lesion, target, score = (np.array([row[k] for row in lesions]) for k in range(3))
    confidence = np.array([case["confidence"] for case in detections])
    positive = np.array([_positive(case) for case in detections])

    def statistic(weights: np.ndarray) -> np.ndarray:
        cases = weights[:, owner]
        columns = [np.full(len(weights), np.nan)] * 2
        sensitivity = [columns[0]] * len(FALSE_POSITIVE_RATES)
        if values["average_precision"] is not None:
            columns[0], sensitivity = weighted_detection(
                weights[:, of_lesion], target == 1, score, num_cases=cases.sum(1)
            )
        if values["auroc"] is not None:
            columns[1] = weighted_auroc(cases, positive, confidence)
        return np.stack([*columns, (columns[0] + columns[1]) / 2, *sensitivity], -1)

    interval = statistics.bca_interval(statistic, len(names), num_resamples=num_resamples)
    keys = ["average_precision", "auroc", "picai_score"]
    rates = [f"{rate:g}" for rate in FALSE_POSITIVE_RATES]

    def ends(column: int) -> list[float] | None:
        if interval is None or not np.isfinite(interval[:, column]).all():
            return None
        return interval[:, column].tolist()

    return {
        **{key: ends(column) for column, key in enumerate(keys)},
        "sensitivity_at": {key: ends(len(keys) + column) for column, key in enumerate(rates)},
    }


def weighted_auroc(weights: np.ndarray, positive: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Area under the ROC of cases for each row of ``weights`` (``r n``); NaN with one kind only."""
    levels, place = np.unique(score, return_inverse=True)
    of_level = np.eye(len(levels))[place]
    positives, negatives = (weights * positive) @ of_level, (weights * ~positive) @ of_level
    below = np.cumsum(negatives, 1) - negatives
    won = (positives * (below + negatives / 2)).sum(1)
    total = positives.sum(1) * negatives.sum(1)
    return np.where(total > 0, won / np.where(total > 0, total, 1), np.nan)


def weighted_detection(
    weights: np.ndarray, lesion: np.ndarray, score: np.ndarray, *, num_cases: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Average precision, and sensitivity at ``FALSE_POSITIVE_RATES``, for each row of ``weights``.

    Args:
        weights: of the candidates and missed lesions, ``r l``.
        lesion: whether each is (on) a lesion.
        score: confidence; 0 for a missed lesion.
        num_cases: weight of all cases, ``r``.
    """
    levels, place = np.unique(-score, return_inverse=True)  # most confident first
    of_level = np.eye(len(levels))[place]
    hits, alarms = (weights * lesion) @ of_level, (weights * ~lesion) @ of_level
    total = hits.sum(1, keepdims=True)
    found = levels < 0
    hits, alarms = hits[:, found], np.cumsum(alarms[:, found], 1)
    detected = np.cumsum(hits, 1)
    precision = detected / np.maximum(detected + alarms, 1e-300)
    with np.errstate(invalid="ignore"):
        average_precision = (hits * precision).sum(1) / total[:, 0]
        sensitivity = detected / total
    per_case = alarms / num_cases[:, None]
    at_rates = [
        np.where(per_case <= rate, sensitivity, 0).max(1, initial=0)
        + np.where(total[:, 0] > 0, 0, np.nan)
        for rate in FALSE_POSITIVE_RATES
    ]
    return average_precision, at_rates


# Calibration -----------------------------------------------------------------------------------


def _bins(probability: np.ndarray, positive: np.ndarray, num_bins: int) -> list[list[float]]:
    """``[count, sum of probabilities, positives]`` of each bin."""
    place = np.minimum((probability * num_bins).astype(np.int32), num_bins - 1)
    count = np.bincount(place, minlength=num_bins)
    total = np.bincount(place, weights=probability.astype(np.float64), minlength=num_bins)
    hits = np.bincount(place[positive], minlength=num_bins)
    return [list(row) for row in zip(count.tolist(), total.tolist(), hits.tolist(), strict=True)]


def calibration(detections: Sequence[Detection]) -> dict[str, Any]:
    """Do things of probability p happen with frequency p? Voxels, and cases by their confidence.

    ``expected_calibration_error`` is the mean gap between a bin's mean probability and its
    frequency of positives, weighted by its size (Guo et al., ICML 2017). Nearly all voxels are
    background of probability 0 and hide the rest, hence also ``..._above_lowest_bin``.
    """
    voxels = np.sum([case["voxels"] for case in detections], axis=0)
    cases = _bins(
        np.array([case["confidence"] for case in detections]),
        np.array([_positive(case) for case in detections]),
        PATIENT_BINS,
    )
    return {"voxels": _reliability(voxels), "cases": _reliability(np.array(cases))}


def _reliability(bins: np.ndarray) -> dict[str, Any]:
    count, total, hits = bins.T

    def error(first: int) -> float | None:
        size = count[first:].sum()
        return float(np.abs(total - hits)[first:].sum() / size) if size else None

    used = np.maximum(count, 1)
    return {
        "count": [int(n) for n in count],
        "mean_probability": [
            float(p) if n else None for p, n in zip(total / used, count, strict=True)
        ],
        "frequency": [float(p) if n else None for p, n in zip(hits / used, count, strict=True)],
        "expected_calibration_error": error(0),
        "expected_calibration_error_above_lowest_bin": error(1),
    }
