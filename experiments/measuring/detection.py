"""Lesion detection over the cases of a run, with intervals, and the calibration of probabilities.

Detection goes through ``picai_eval``; what it counts are the candidates of
``experiments.measuring.lesions``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.measuring import statistics
from experiments.measuring.lesions import bins, picai_eval
from experiments.measuring.rows import Detection, Ends

if TYPE_CHECKING:
    from picai_eval.metrics import Metrics

FALSE_POSITIVE_RATES = (0.5, 1.0, 2.0)
"""False positives for each case at which the lesion sensitivity is read (FROC)."""

PATIENT_BINS = 10
"""Bins of equal width over the confidences of cases from 0 to 1, for calibration."""


class DetectedCase(NamedTuple):
    """A case, its patient, and what was detected."""

    case_id: str
    patient_id: str
    detection: Detection


def picai_metrics(cases: Sequence[DetectedCase]) -> "Metrics":
    """The cases as ``picai_eval`` summarises them."""
    confidences = {m.confidence for case in cases for m in case.detection.lesions}
    return picai_eval().Metrics(
        lesion_results={case.case_id: [*case.detection.lesions] for case in cases},
        case_target={case.case_id: int(case.detection.positive) for case in cases},
        case_pred={case.case_id: case.detection.confidence for case in cases},
        # picai_eval takes the least threshold for that of missed lesions and drops it. Without a
        # missed lesion it would drop a candidate's: name 0 as the least.
        thresholds=np.array(sorted(confidences | {0.0})[::-1]),
    )


@dataclasses.dataclass(frozen=True)
class DetectionIntervals:
    """Ends of the 95 % interval of each figure; None where there is none."""

    average_precision: Ends | None
    auroc: Ends | None
    picai_score: Ends | None
    sensitivity_at: Mapping[str, Ends | None]


@dataclasses.dataclass(frozen=True)
class Froc:
    """Sensitivity for lesions against false positives a case."""

    false_positives_per_case: tuple[float, ...]
    sensitivity: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Roc:
    """True against false positives among cases."""

    false_positive_rate: tuple[float, ...]
    true_positive_rate: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """Precision against recall of lesions."""

    precision: tuple[float, ...]
    recall: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Bins of probability, and how far their frequencies of positives lie from it.

    Attributes:
        count: what each bin holds.
        mean_probability: of each bin; None where it is empty.
        frequency: of positives in each bin; likewise.
        expected_calibration_error: the mean gap between the two, weighted by the bins' sizes.
        expected_calibration_error_above_lowest_bin: without the lowest bin.
    """

    count: tuple[int, ...]
    mean_probability: tuple[float | None, ...]
    frequency: tuple[float | None, ...]
    expected_calibration_error: float | None
    expected_calibration_error_above_lowest_bin: float | None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Reliability of the voxels, and of the cases by their confidence."""

    voxels: Reliability
    cases: Reliability


@dataclasses.dataclass(frozen=True)
class DetectionSummary:
    """Detection and calibration over cases.

    Attributes:
        average_precision: of lesions; None where there is no lesion.
        auroc: of cases; None where all are positive, or all negative.
        picai_score: their mean; None where either is.
        sensitivity_at: lesion sensitivity at each of ``FALSE_POSITIVE_RATES`` a case; None where
            there is no lesion.
        interval: of each of these, by ``experiments.measuring.statistics.bca_interval``.
        num_cases, num_patients, num_positive: cases, their patients, those with a lesion.
        num_lesions: of all cases.
        num_true_positive, num_false_positive, num_false_negative: over all candidates, whatever
            their confidence.
        froc, roc, precision_recall: the points of the curves, where they are defined.
        calibration: see ``calibration``.
    """

    average_precision: float | None
    auroc: float | None
    picai_score: float | None
    sensitivity_at: Mapping[str, float | None]
    interval: DetectionIntervals
    num_cases: int
    num_patients: int
    num_positive: int
    num_lesions: int
    num_true_positive: int
    num_false_positive: int
    num_false_negative: int
    froc: Froc | None
    roc: Roc | None
    precision_recall: PrecisionRecall | None
    calibration: Calibration


def summarise(cases: Sequence[DetectedCase], *, num_resamples: int = 2_000) -> DetectionSummary:
    """Detection and calibration over cases, with 95 % intervals over patients."""
    metrics = picai_metrics(cases)
    matches = [match for case in cases for match in case.detection.lesions]
    num_positive = sum(case.detection.positive for case in cases)
    num_lesions = sum(match.lesion for match in matches)
    has_lesions, has_both = num_lesions > 0, 0 < num_positive < len(cases)
    ap = float(metrics.AP) + 0.0 if has_lesions else None  # -0.0, where nothing is found, is 0.0
    auroc = float(metrics.auroc) if has_both else None
    return DetectionSummary(
        average_precision=ap,
        auroc=auroc,
        picai_score=None if ap is None or auroc is None else (ap + auroc) / 2,
        sensitivity_at={
            f"{rate:g}": float(metrics.lesion_TPR_at_FPR(rate)) if has_lesions else None
            for rate in FALSE_POSITIVE_RATES
        },
        interval=_intervals(
            cases, num_resamples=num_resamples, has_lesions=has_lesions, has_both=has_both
        ),
        num_cases=len(cases),
        num_patients=len({case.patient_id for case in cases}),
        num_positive=num_positive,
        num_lesions=num_lesions,
        num_true_positive=sum(m.lesion == 1 and m.confidence > 0 for m in matches),
        num_false_positive=sum(m.lesion == 0 for m in matches),
        num_false_negative=sum(m.lesion == 1 and m.confidence == 0 for m in matches),
        froc=_froc(metrics) if has_lesions else None,
        roc=_roc(metrics) if has_both else None,
        precision_recall=_precision_recall(metrics) if has_lesions else None,
        calibration=calibration([case.detection for case in cases]),
    )


def _froc(metrics: "Metrics") -> Froc:
    rate, sensitivity = metrics.lesion_FPR, metrics.lesion_TPR
    inside = np.isfinite(rate)
    return Froc((0.0, *rate[inside].tolist()), (0.0, *sensitivity[inside].tolist()))


def _roc(metrics: "Metrics") -> Roc:
    curve = metrics.calculate_ROC()
    return Roc(tuple(curve["FPR"].tolist()), tuple(curve["TPR"].tolist()))


def _precision_recall(metrics: "Metrics") -> PrecisionRecall:
    curve = metrics.calculate_precision_recall()
    return PrecisionRecall(tuple(curve["precision"].tolist()), tuple(curve["recall"].tolist()))


# Intervals: the same figures under weights of the patients, for all resamples at once -----------


def _intervals(
    cases: Sequence[DetectedCase], *, num_resamples: int, has_lesions: bool, has_both: bool
) -> DetectionIntervals:
    names, owner = np.unique([case.patient_id for case in cases], return_inverse=True)
    lesions = [
        (index, match.lesion, match.confidence)
        for index, case in zip(owner, cases, strict=True)
        for match in case.detection.lesions
    ]
    of_lesion, target, score = (np.array([row[k] for row in lesions]) for k in range(3))
    confidence = np.array([case.detection.confidence for case in cases])
    positive = np.array([case.detection.positive for case in cases])

    def statistic(weights: np.ndarray) -> np.ndarray:
        of_cases = weights[:, owner]
        columns = [np.full(len(weights), np.nan)] * 2
        sensitivity = [columns[0]] * len(FALSE_POSITIVE_RATES)
        if has_lesions:
            columns[0], sensitivity = weighted_detection(
                weights[:, of_lesion], target == 1, score, num_cases=of_cases.sum(1)
            )
        if has_both:
            columns[1] = weighted_auroc(of_cases, positive, confidence)
        return np.stack([*columns, (columns[0] + columns[1]) / 2, *sensitivity], -1)

    interval = statistics.bca_interval(statistic, len(names), num_resamples=num_resamples)

    def ends(column: int) -> Ends | None:
        if interval is None or not np.isfinite(interval[:, column]).all():
            return None
        low, high = interval[:, column].tolist()
        return low, high

    return DetectionIntervals(
        average_precision=ends(0),
        auroc=ends(1),
        picai_score=ends(2),
        sensitivity_at={
            f"{rate:g}": ends(3 + column) for column, rate in enumerate(FALSE_POSITIVE_RATES)
        },
    )


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


def calibration(detections: Sequence[Detection]) -> Calibration:
    """Do things of probability p happen with frequency p? Voxels, and cases by their confidence.

    The expected calibration error is the mean gap between a bin's mean probability and its
    frequency of positives, weighted by its size (Guo et al., ICML 2017). Nearly all voxels are
    background of probability 0 and hide the rest, hence also that above the lowest bin.
    """
    cases = bins(
        np.array([case.confidence for case in detections]),
        np.array([case.positive for case in detections]),
        PATIENT_BINS,
    )
    return Calibration(
        voxels=reliability(np.sum([np.array(case.voxels) for case in detections], axis=0)),
        cases=reliability(np.array(cases)),
    )


def reliability(of_bins: np.ndarray) -> Reliability:
    """How far the bins, rows of size, sum of probabilities and positives, lie from their means."""
    count, total, hits = of_bins.T

    def error(first: int) -> float | None:
        size = count[first:].sum()
        return float(np.abs(total - hits)[first:].sum() / size) if size else None

    def share(of: np.ndarray) -> tuple[float | None, ...]:
        shares = of / np.maximum(count, 1)
        return tuple(float(p) if n else None for p, n in zip(shares, count, strict=True))

    return Reliability(
        count=tuple(int(n) for n in count),
        mean_probability=share(total),
        frequency=share(hits),
        expected_calibration_error=error(0),
        expected_calibration_error_above_lowest_bin=error(1),
    )
