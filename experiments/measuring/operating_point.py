"""Where a model calls something a lesion, and what its confidence is worth, from other patients.

The confidence of a candidate is the highest probability in it, which says how sure the network is
of a voxel. How often such candidates are lesions, and from which confidence on they should be
called, is learnt from cases whose networks had not seen them: of a cross-validation, those of the
*other* folds, all of which are training patients of the fold that is judged. What is said of a fold
therefore rests on no label of its own cases. The weights themselves stay as they are.

Confidences are turned into probabilities by Platt's scaling (in: Advances in Large Margin
Classifiers, 1999): the logistic regression of being a lesion on the logit of the confidence, with
his targets, which keep it finite where both kinds are told apart without a fault.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy

from experiments.measuring.detection import PATIENT_BINS, reliability
from experiments.measuring.lesions import LEAST_PEAK, VOXEL_BINS, Candidate, bins
from experiments.measuring.rows import Detection

SENSITIVITY = 0.9
"""Share of the lesions that have a candidate which should be called."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """``sigmoid(slope * logit(confidence) + intercept)`` is a probability.

    Below the least confidence of a candidate all is one: there is none.
    """

    slope: float
    intercept: float

    def __call__(self, confidence: float) -> float:
        """The probability that belongs to a confidence; 0: of a case without a candidate."""
        return float(scipy.special.expit(self.slope * _logit(confidence) + self.intercept))


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """How a model's confidences are to be read.

    Attributes:
        least_confidence: from which on a candidate is called; the highest that finds the lesions
            asked for (``SENSITIVITY``), or as many as have a candidate.
        lesions: probability that a candidate lies on a lesion.
        cases: probability that a case holds a lesion, by its strongest candidate.
        threshold: above which voxels give the best mean Dice of positive cases; a multiple of one
            twentieth.
        num_cases, num_lesions: that it was learnt from.
    """

    least_confidence: float
    lesions: Scaling
    cases: Scaling
    threshold: float
    num_cases: int
    num_lesions: int

    def judge(self, candidate: Candidate) -> Candidate:
        """A candidate with its probability, and whether it is called."""
        return dataclasses.replace(
            candidate,
            probability=round(self.lesions(candidate.confidence), 6),
            called=candidate.confidence >= self.least_confidence,
        )


@dataclasses.dataclass(frozen=True)
class AtOperatingPoint:
    """What came of it on cases that it was not learnt from.

    Attributes:
        sensitivity: share of the lesions with a candidate that was called.
        num_false_positive_cases: negatives with a candidate that was called.
        num_negatives: of how many.
        expected_calibration_error: of the probabilities of cases.
        brier: mean squared error of these.
        dice: of positive cases, at the voxel threshold learnt; None without any.
    """

    sensitivity: float | None
    num_false_positive_cases: int
    num_negatives: int
    expected_calibration_error: float | None
    brier: float
    dice: float | None


@dataclasses.dataclass(frozen=True)
class Operation:
    """Operating points of a run.

    Attributes:
        point: learnt from all folds: what new cases are judged by.
        per_fold: learnt from the other folds; what the figures rest on.
        found: on the cases of each fold at its own point, taken together.
    """

    point: OperatingPoint
    per_fold: Mapping[int, OperatingPoint]
    found: AtOperatingPoint


def choose(detections: Sequence[Detection]) -> OperatingPoint | None:
    """Learn an operating point; None if the cases are of one kind, or no lesion is ever found."""
    positive = np.array([case.positive for case in detections], bool)
    matches = [match for case in detections for match in case.lesions]
    lesion = np.array([match.lesion for match in matches], bool)
    confidence = np.array([match.confidence for match in matches], np.float64)
    found = lesion & (confidence > 0)
    if positive.all() or not positive.any() or not found.any():
        return None
    wanted = int(np.ceil(SENSITIVITY * lesion.sum()))
    ranked = np.sort(confidence[found])[::-1]
    candidates = confidence > 0
    return OperatingPoint(
        least_confidence=float(ranked[min(wanted, len(ranked)) - 1]),
        lesions=_platt(confidence[candidates], lesion[candidates]),
        cases=_platt(np.array([case.confidence for case in detections]), positive),
        threshold=_best_threshold([case for case in detections if case.positive]),
        num_cases=len(detections),
        num_lesions=int(lesion.sum()),
    )


def operate(per_fold: Mapping[int, Sequence[Detection]]) -> Operation | None:
    """Operating points of a run, and what came of them; None where one cannot be learnt.

    Args:
        per_fold: the detections of each fold's validation cases; two folds or more.
    """
    points = {}
    for fold in per_fold:
        others = [case for other in per_fold if other != fold for case in per_fold[other]]
        points[fold] = choose(others) if others else None
    overall = choose([case for cases in per_fold.values() for case in cases])
    learnt = {fold: point for fold, point in points.items() if point is not None}
    if overall is None or len(learnt) < len(per_fold):
        return None
    judged = [(learnt[fold], case) for fold, cases in per_fold.items() for case in cases]
    return Operation(overall, learnt, _measure(judged))


def _measure(judged: Sequence[tuple[OperatingPoint, Detection]]) -> AtOperatingPoint:
    called = [
        (point.least_confidence <= match.confidence, match.lesion)
        for point, case in judged
        for match in case.lesions
    ]
    of_lesions = [was_called for was_called, lesion in called if lesion]
    negatives = [(point, case) for point, case in judged if not case.positive]
    probability = np.array([point.cases(case.confidence) for point, case in judged])
    positive = np.array([case.positive for _, case in judged], bool)
    of_bins = reliability(np.array(bins(probability, positive, PATIENT_BINS)))
    dice = [dice_at(case, point.threshold) for point, case in judged if case.positive]
    return AtOperatingPoint(
        sensitivity=float(np.mean(of_lesions)) if of_lesions else None,
        num_false_positive_cases=sum(
            any(match.confidence >= point.least_confidence for match in case.lesions)
            for point, case in negatives
        ),
        num_negatives=len(negatives),
        expected_calibration_error=of_bins.expected_calibration_error,
        brier=float(np.mean((probability - positive) ** 2)),
        dice=float(np.mean(dice)) if dice else None,
    )


def dice_at(case: Detection, threshold: float) -> float:
    """Dice of a positive case for a threshold on a bin's edge, from its bins of voxels."""
    size, _, positive = np.array(case.voxels).T
    first = round(threshold * VOXEL_BINS)
    return float(2 * positive[first:].sum() / (size[first:].sum() + positive.sum()))


def _best_threshold(positive: Sequence[Detection]) -> float:
    """Edge of the bins with the best mean Dice; of equal ones that nearest to a half."""
    edges = np.arange(1, VOXEL_BINS) / VOXEL_BINS
    dice = np.array([np.mean([dice_at(case, edge) for case in positive]) for edge in edges])
    best = edges[dice >= dice.max() - 1e-12]
    return float(best[np.abs(best - 0.5).argmin()])


def _platt(confidence: np.ndarray, positive: np.ndarray) -> Scaling:
    """Logistic regression on the logit, with Platt's targets; its slope is never negative.

    A negative slope would call the less confident the likelier; then all get the frequency of
    positives.
    """
    score = _logit(np.asarray(confidence, np.float64))
    hits, misses = positive.sum(), (~positive).sum()
    target = np.where(positive, (hits + 1) / (hits + 2), 1 / (misses + 2))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        line = weights[0] * score + weights[1]
        error = scipy.special.expit(line) - target
        value = np.sum(np.logaddexp(0, line) - target * line)
        return float(value), np.array([error @ score, error.sum()])

    fitted = scipy.optimize.minimize(
        loss, np.array([1.0, 0.0]), jac=True, bounds=[(0, None), (None, None)], method="L-BFGS-B"
    )
    return Scaling(float(fitted.x[0]), float(fitted.x[1]))


def _logit(confidence: float | np.ndarray) -> np.ndarray:
    return scipy.special.logit(np.clip(confidence, LEAST_PEAK, 1 - LEAST_PEAK**2))
