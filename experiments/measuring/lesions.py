"""Lesion candidates and detection in the probability map of a case.

Detection goes through ``picai_eval``, the evaluation of the PI-CAI challenge (Saha et al., Lancet
Oncology 2024). Lesion candidates follow the published rules of ``report_guided_annotation`` (Bosma
et al., arXiv 2112.05151), which the challenge's baselines use: from the highest probability down,
the connected voxels above ``peak / 2.5`` become a candidate of the peak's confidence, at most five
of more than ten voxels each; candidates that touch an earlier one are dropped. A candidate matches
a lesion from an overlap (IoU) of 0.1 on. A case's confidence is that of its strongest candidate.
"""

import contextlib
import dataclasses
import io
from types import ModuleType

import numpy as np
import scipy

from experiments.measuring.rows import Bin, Detection, Match

VOXEL_BINS = 20
"""Bins of equal width over the probabilities of voxels from 0 to 1, for calibration."""

LEAST_PEAK = 0.01
"""Probability that a candidate reaches somewhere."""

_MOST_CANDIDATES = 5
_PEAK_TO_EDGE = 2.5
_TOO_SMALL = 10  # voxels
_NEIGHBOURS = np.ones((3, 3, 3), bool)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A part of an image that may be a lesion.

    Attributes:
        volume_ml: its volume.
        centre_mm: mean position of its voxels, x y z in RAS+.
        confidence: its highest probability.
        probability: that it is a lesion; None where the model has no operating point
            (``experiments.measuring.operating_point``).
        called: whether it should be called one, by that point.
    """

    volume_ml: float
    centre_mm: tuple[float, float, float]
    confidence: float
    probability: float | None = None
    called: bool | None = None


def candidates(probability: np.ndarray, affine: np.ndarray) -> tuple[Candidate, ...]:
    """The lesion candidates of ``detection_map``, the most confident first.

    Args:
        probability: of lesion, ``d h w``.
        affine: of the map, to RAS+ millimetres.
    """
    confidence = detection_map(probability)
    labels = np.zeros(confidence.shape, np.int32)
    scipy.ndimage.label(confidence > 0, _NEIGHBOURS, output=labels)  # no candidate touches another
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    found = []
    for number, box in enumerate(scipy.ndimage.find_objects(labels), 1):
        inside = labels[box] == number
        index = np.argwhere(inside) + [axis.start for axis in box]
        x, y, z = affine[:3, :3] @ index.mean(0)[::-1] + affine[:3, 3]
        found.append(
            Candidate(
                volume_ml=round(len(index) * voxel_ml, 4),
                centre_mm=(round(float(x), 2), round(float(y), 2), round(float(z), 2)),
                confidence=round(float(confidence[box][inside].max()), 6),
            )
        )
    return tuple(sorted(found, key=lambda candidate: -candidate.confidence))


def detection_map(probability: np.ndarray) -> np.ndarray:
    """Lesion candidates of a probability map ``d h w``: each with its confidence, elsewhere 0.

    The rules of the module's docstring, voxel for voxel those of ``report_guided_annotation`` under
    ``threshold="dynamic-v2"``, whose time grows with the number of connected components times that
    of voxels (8 s for a noisy map of 20 x 256 x 256; here 0.2 s).
    """
    found = np.zeros(probability.shape, np.float32)
    box = _box(probability >= LEAST_PEAK / _PEAK_TO_EDGE)
    if box is None:
        return found
    working, candidates = probability[box].astype(np.float32), found[box]  # a copy and a view
    count = 0
    while count < _MOST_CANDIDATES and (peak := working.max()) >= LEAST_PEAK:
        edge = peak / _PEAK_TO_EDGE
        labels = np.empty(working.shape, np.int32)
        scipy.ndimage.label(working >= edge, _NEIGHBOURS, output=labels)
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
        grown = np.asarray(scipy.ndimage.binary_dilation(region[around], _NEIGHBOURS), bool)
        if not (grown & (candidates[around] > 0)).any():
            candidates[region] = confidence
            count += 1
    return found


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Smallest box that holds all of ``mask``; None if it is empty."""
    labels = scipy.ndimage.find_objects(mask.astype(np.uint8))
    return labels[0] if labels else None


def detect(
    probability: np.ndarray, truth: np.ndarray, *, counted: np.ndarray | None = None
) -> Detection:
    """Lesions, case confidence and calibration counts of one case.

    Args:
        probability: floating point ``d h w``, of the foreground.
        truth: ``d h w``, foreground where above 0; its lesions are 26-connected.
        counted: voxels that count, None is all; elsewhere there is no candidate.
    """
    truth = truth > 0
    if counted is not None:
        probability = np.where(counted, probability, 0).astype(probability.dtype)
    found = detection_map(probability)
    results, confidence = [], 0.0
    box = _box(truth | (found > 0))  # picai_eval scans all that it gets for each lesion
    if box is not None:
        results, confidence, *_ = picai_eval().evaluate_case(
            found[box], truth[box].astype(np.int32)
        )
    return Detection(
        confidence=float(confidence),
        lesions=tuple(
            Match(int(target), float(score), float(overlap)) for target, score, overlap in results
        ),
        voxels=bins(
            probability.ravel() if counted is None else probability[counted],
            truth.ravel() if counted is None else truth[counted],
            VOXEL_BINS,
        ),
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a lesion candidate is, or a lesion without one.

    Attributes:
        match: what it is, as ``detect`` says.
        centre: mean index of its voxels, ``d h w``.
        num_voxels: of the candidate, or of the lesion without one.
    """

    match: Match
    centre: tuple[float, float, float]
    num_voxels: int


def locate(probability: np.ndarray, truth: np.ndarray) -> tuple[Place, ...]:
    """What ``detect`` counts, with its places; arguments as there."""
    candidates, found = _parts(detection_map(probability) > 0)
    lesions, true = _parts(truth > 0)
    common = np.zeros((len(true) + 1, len(found) + 1))
    np.add.at(common, (lesions.ravel(), candidates.ravel()), 1)
    common = common[1:, 1:]
    sizes = np.add.outer([len(part) for part in true], [len(part) for part in found])
    overlap = common / np.maximum(sizes - common, 1)
    weight = np.where(overlap >= _LEAST_OVERLAP, 1 + overlap, 0)
    pairs = zip(*scipy.optimize.linear_sum_assignment(weight, maximize=True), strict=True)
    lesion_of = {candidate: lesion for lesion, candidate in pairs if weight[lesion, candidate]}
    places = []
    for number, part in enumerate(found):
        confidence = float(probability[tuple(part.T)].max())
        if number in lesion_of:
            match = Match(1, confidence, float(overlap[lesion_of[number], number]))
        elif weight[:, number].any():
            continue  # a second candidate on a lesion is neither right nor wrong
        else:
            match = Match(0, confidence, 0.0)
        places.append(_place(match, part))
    missed = sorted({*range(len(true))} - {*lesion_of.values()})
    return (*places, *(_place(Match(1, 0.0, 0.0), true[number]) for number in missed))


_LEAST_OVERLAP = 0.1


def _parts(mask: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Numbers of the connected parts, from 1, and the indices ``n 3`` of the voxels of each."""
    labels = np.zeros(mask.shape, np.int32)
    scipy.ndimage.label(mask, _NEIGHBOURS, output=labels)
    return labels, [
        np.argwhere(labels[box] == number) + [axis.start for axis in box]
        for number, box in enumerate(scipy.ndimage.find_objects(labels), 1)
    ]


def _place(match: Match, voxels: np.ndarray) -> Place:
    d, h, w = voxels.mean(0)
    return Place(match, (float(d), float(h), float(w)), len(voxels))


def picai_eval() -> ModuleType:
    """Its evaluation; the package takes seconds to load, and prints a request for citation."""
    with contextlib.redirect_stdout(io.StringIO()):
        from picai_eval import eval
    return eval


def bins(probability: np.ndarray, positive: np.ndarray, num_bins: int) -> tuple[Bin, ...]:
    """The bins of equal width over the probabilities from 0 to 1."""
    place = np.minimum((probability * num_bins).astype(np.int32), num_bins - 1)
    count = np.bincount(place, minlength=num_bins)
    total = np.bincount(place, weights=probability.astype(np.float64), minlength=num_bins)
    hits = np.bincount(place[positive], minlength=num_bins)
    return tuple(
        Bin(*row) for row in zip(count.tolist(), total.tolist(), hits.tolist(), strict=True)
    )
