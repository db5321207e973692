"""Metrics of one predicted mask: overlap, volumes, and distances of surfaces.

Definitions, per class (``T`` truth, ``P`` prediction, ``|.|`` number of voxels, ``N`` all voxels):

=============================  ===============================================  ===============
metric                         value                                            undefined where
=============================  ===============================================  ===============
``dice``                       ``2 |T & P| / (|T| + |P|)``                      ``T`` is empty
``iou``                        ``|T & P| / |T or P|``                           ``T`` is empty
``sensitivity``                ``|T & P| / |T|``                                ``T`` is empty
``precision``                  ``|T & P| / |P|``                                either is empty
``specificity``                ``1 - |P outside T| / (N - |T|)``                ``T`` is all
``volume_difference_ml``       volume of ``P`` less that of ``T``               ``T`` is empty
``hd95_mm``                    see ``surface_metrics``                      either is empty
``hd95_penalised_mm``          the same; a miss counts as the image's diagonal  ``T`` is empty
``assd_mm``                    see ``surface_metrics``                      either is empty
``assd_penalised_mm``          the same; a miss counts as the image's diagonal  ``T`` is empty
``surface_dice_1mm``, ``_2mm`` see ``surface_metrics``; 0 for a miss        ``T`` is empty
``false_positive_volume_ml``   volume of ``P`` outside ``T``                    never
``volume_truth_ml``            volume of ``T``                                  never
``volume_predicted_ml``        volume of ``P``                                  never
=============================  ===============================================  ===============

Undefined is None in Python, ``null`` in JSON and an empty cell in CSV, and is left out of every
mean; no mean goes without the number of cases behind it. A positive case with an empty prediction
is a miss: it has overlap metrics of 0, is counted in ``num_missed``, and since its surface
distances do not exist and would otherwise vanish, the penalised ones put the diagonal of the whole
volume in their place. A negative case is judged by its false-positive volume and its specificity;
if nothing is predicted there, these are 0 and 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import surface_distance

from data_pipelines.faults import DataError

METRICS = (
    "dice",
    "iou",
    "sensitivity",
    "precision",
    "specificity",
    "volume_difference_ml",
    "hd95_mm",
    "hd95_penalised_mm",
    "assd_mm",
    "assd_penalised_mm",
    "surface_dice_1mm",
    "surface_dice_2mm",
    "false_positive_volume_ml",
    "volume_truth_ml",
    "volume_predicted_ml",
)
"""Names of the metrics of one class of one case, in the order of the tables."""

_ROUNDING = 1e-3
"""By how much a probability may leave 0..1, as resampled or half-precision ones do."""

Metrics = dict[str, float | None]
Row = Mapping[str, Any]
"""``{"case_id", "patient_id", "fold", "class", **Metrics}``: one class of one case."""


def case_metrics(
    probability_or_mask: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    classes: Sequence[str],
    threshold: float = 0.5,
) -> dict[str, Metrics]:
    """Metrics of one case, per class; the module docstring defines each.

    Args:
        probability_or_mask: ``d h w`` in the frame of ``truth``. Floating point: probability of
            the only class, foreground where it *exceeds* ``threshold``. Integer or bool: a mask
            in which class ``i`` is ``i + 1`` (required if there are several classes).
        truth: integer or bool ``d h w``, class ``i`` stored as ``i + 1``.
        spacing_mm: voxel size, ``d h w``.
        classes: names of the foreground classes in label order.
        threshold: for probabilities only; fixed before the run, never tuned on these cases.

    Returns:
        ``{class: {metric: value}}`` with every name of ``METRICS``; None where undefined.

    Raises:
        DataError: shapes differ, values are not finite or no probabilities, unexpected labels, or
            probabilities given for several classes.
    """
    if probability_or_mask.shape != truth.shape:
        raise DataError(
            "prediction and truth must have one shape; got "
            f"{probability_or_mask.shape} and {truth.shape}. "
            "Bring the prediction back onto the original T2W grid first."
        )
    mask = _as_mask(probability_or_mask, num_classes=len(classes), threshold=threshold)
    for name, labels in (("prediction", mask), ("truth", truth)):
        if labels.size and not 0 <= labels.min() <= labels.max() <= len(classes):
            raise DataError(
                f"values of the {name} must lie in 0..{len(classes)} for classes "
                f"{tuple(classes)}; got {labels.min()}..{labels.max()}. "
                "Map the labels to these classes, or choose another target."
            )
    shape = truth.shape
    box = _bounding_box((mask != 0) | (truth != 0))
    mask, truth = mask[box], truth[box]
    spacing = tuple(float(step) for step in spacing_mm)
    return {
        name: _mask_metrics(mask == label, truth == label, spacing, shape)
        for label, name in enumerate(classes, start=1)
    }


def surface_metrics(
    prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]
) -> dict[str, float]:
    """HD95, ASSD and surface Dice at 1 and 2 mm of two non-empty bool masks ``d h w``.

    The convention is that of DeepMind's ``surface-distance``: surfaces run through the voxel
    corners and each surface element is weighted by its area. HD95 is the larger of the two
    directed 95th percentiles; ASSD is the mean of the two directed average distances; surface Dice
    is the share of both surfaces that lies within the tolerance of the other one (Nikolov et al.,
    arXiv 1809.04430). MONAI and MedPy measure between voxel centres without areas and give other
    numbers for the same masks. Mirroring the grid or permuting its axes with the spacing changes
    nothing beyond rounding.
    """
    distances = surface_distance.compute_surface_distances(truth, prediction, spacing_mm)
    to_prediction, to_truth = surface_distance.compute_average_surface_distance(distances)
    return {
        "hd95_mm": float(surface_distance.compute_robust_hausdorff(distances, 95)),
        "assd_mm": float((to_prediction + to_truth) / 2),
        "surface_dice_1mm": _surface_dice(distances, 1.0),
        "surface_dice_2mm": _surface_dice(distances, 2.0),
    }


def _surface_dice(distances: dict[str, np.ndarray], tolerance_mm: float) -> float:
    return float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm))


def _as_mask(array: np.ndarray, *, num_classes: int, threshold: float) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        return array
    if num_classes > 1:
        raise DataError(
            f"several classes need an integer mask; got {array.dtype} for {num_classes} classes. "
            "Take the argmax over the class probabilities first."
        )
    if not np.isfinite(array).all():
        raise DataError(
            "probabilities must be finite; got NaN or infinity. Look for a diverged training run."
        )
    least, most = float(array.min(initial=0)), float(array.max(initial=0))
    if least < -_ROUNDING or most > 1 + _ROUNDING:
        raise DataError(
            f"probabilities must lie in 0..1; got {least:.4g}..{most:.4g}. Apply the sigmoid to "
            "logits, divide percentages by 100, or store a mask as whole numbers."
        )
    return array > threshold


def _bounding_box(foreground: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds all foreground; the first voxel where there is none."""
    box = []
    for axis in range(foreground.ndim):
        others = tuple(other for other in range(foreground.ndim) if other != axis)
        (used,) = np.nonzero(foreground.any(axis=others))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1))
    return tuple(box)


def _mask_metrics(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: tuple[float, ...],
    shape: Sequence[int],
) -> Metrics:
    """Metrics of two masks, cut to their foreground, of a volume of ``shape``."""
    voxel_ml = float(np.prod(spacing_mm)) / 1000.0
    num_truth, num_predicted = int(truth.sum()), int(prediction.sum())
    num_both = int((truth & prediction).sum())
    num_outside = math.prod(shape) - num_truth
    metrics: Metrics = dict.fromkeys(METRICS)
    metrics |= {
        "false_positive_volume_ml": (num_predicted - num_both) * voxel_ml,
        "volume_truth_ml": num_truth * voxel_ml,
        "volume_predicted_ml": num_predicted * voxel_ml,
    }
    if num_outside:
        metrics["specificity"] = 1 - (num_predicted - num_both) / num_outside
    if not num_truth:
        return metrics
    metrics |= {
        "dice": 2 * num_both / (num_truth + num_predicted),
        "iou": num_both / (num_truth + num_predicted - num_both),
        "sensitivity": num_both / num_truth,
        "volume_difference_ml": (num_predicted - num_truth) * voxel_ml,
    }
    if num_predicted:
        metrics |= {"precision": num_both / num_predicted}
        metrics |= surface_metrics(prediction, truth, spacing_mm)
        penalised = metrics["hd95_mm"], metrics["assd_mm"]
    else:
        metrics |= {"surface_dice_1mm": 0.0, "surface_dice_2mm": 0.0}
        diagonal = math.dist((0.0,) * len(shape), np.multiply(shape, spacing_mm).tolist())
        penalised = diagonal, diagonal
    metrics["hd95_penalised_mm"], metrics["assd_penalised_mm"] = penalised
    return metrics
