"""Metrics of one predicted mask: overlap, volumes, and distances of surfaces.

``METRICS`` defines each, and everything that shows, stores or sums up metrics goes by it: a further
one is a ``Metric`` (in a file of its own, or here) and its name in that list.

Undefined is None in Python, ``null`` in JSON and an empty cell in CSV, and is left out of every
mean; no mean goes without the number of cases behind it. A positive case with an empty prediction
is a miss: it has overlap metrics of 0, is counted in ``num_missed``, and since its surface
distances do not exist and would otherwise vanish, the penalised ones put the diagonal of the whole
volume in their place. A negative case is judged by its false-positive volume and its specificity;
if nothing is predicted there, these are 0 and 1.
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines.faults import DataError
from data_pipelines.targets import IGNORED, Target
from experiments.measuring.masks import Masks, Metric

_ROUNDING = 1e-3
"""By how much a probability may leave 0..1, as resampled or half-precision ones do."""

Values = dict[str, float | None]
"""``{metric: value}`` of one class of one case."""


def to_mask(probability: np.ndarray, threshold: float) -> np.ndarray:
    """uint8 classes of ``... k`` probabilities: above the threshold, or the largest of several."""
    if probability.shape[-1] == 1:
        return (probability[..., 0] > threshold).astype(np.uint8)
    return probability.argmax(-1).astype(np.uint8)


def case_metrics(
    probability_or_mask: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    classes: Sequence[str],
    threshold: float = 0.5,
    *,
    target: Target | None = None,
) -> dict[str, Values]:
    """Metrics of one case, per class.

    Args:
        probability_or_mask: ``d h w`` in the frame of ``truth``. Floating point: probability of
            the only class, foreground where it *exceeds* ``threshold``. Integer or bool: a mask
            in which class ``i`` is ``i + 1`` (required if there are several classes).
        truth: integer or bool ``d h w``, class ``i`` stored as ``i + 1``.
        spacing_mm: voxel size, ``d h w``.
        classes: names of the foreground classes in label order.
        threshold: for probabilities only; fixed before the run, never tuned on these cases.
        target: says which stored values make each class, and whether some are ignored: those
            voxels are in no mask, and no background.

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
    highest = len(classes) if target is None else target.num_parts
    mask = _as_mask(probability_or_mask, num_classes=highest, threshold=threshold)
    num_ignored = 0
    if target is not None and target.ignore is not None:
        ignored = truth == IGNORED
        num_ignored = int(ignored.sum())
        mask, truth = (np.where(ignored, 0, labels) for labels in (mask, truth))
    for name, labels in (("prediction", mask), ("truth", truth)):
        if labels.size and not 0 <= labels.min() <= labels.max() <= highest:
            raise DataError(
                f"values of the {name} must lie in 0..{highest} for classes "
                f"{tuple(classes)}; got {labels.min()}..{labels.max()}. "
                "Map the labels to these classes, or choose another target."
            )
    shape = truth.shape
    box = _bounding_box((mask != 0) | (truth != 0))
    mask, truth = mask[box], truth[box]
    spacing = tuple(float(step) for step in spacing_mm)
    found = {}
    for index, name in enumerate(classes):
        predicted, true = (
            labels == index + 1 if target is None else target.mask_of(labels, index)
            for labels in (mask, truth)
        )
        masks = Masks(predicted, true, spacing, shape, num_ignored)
        found[name] = {metric.name: metric.measure(masks) for metric in METRICS.values()}
    return found


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
    return to_mask(array[..., None], threshold)


def _bounding_box(foreground: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds all foreground; the first voxel where there is none."""
    box = []
    for axis in range(foreground.ndim):
        others = tuple(other for other in range(foreground.ndim) if other != axis)
        (used,) = np.nonzero(foreground.any(axis=others))
        box.append(slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1))
    return tuple(box)


# What the metrics measure ------------------------------------------------------------------------


def dice(masks: Masks) -> float | None:
    """Overlap of both."""
    if not masks.num_truth:
        return None
    return 2 * masks.num_both / (masks.num_truth + masks.num_predicted)


def iou(masks: Masks) -> float | None:
    """Intersection over union."""
    if not masks.num_truth:
        return None
    return masks.num_both / (masks.num_truth + masks.num_predicted - masks.num_both)


def sensitivity(masks: Masks) -> float | None:
    """Share of the truth that is found."""
    return masks.num_both / masks.num_truth if masks.num_truth else None


def precision(masks: Masks) -> float | None:
    """Share of the prediction that is true."""
    if not masks.num_truth or not masks.num_predicted:
        return None
    return masks.num_both / masks.num_predicted


def specificity(masks: Masks) -> float | None:
    """Share of the background that is left alone."""
    if not masks.num_background:
        return None
    return 1 - (masks.num_predicted - masks.num_both) / masks.num_background


def volume_difference_ml(masks: Masks) -> float | None:
    """Predicted less true volume."""
    if not masks.num_truth:
        return None
    return (masks.num_predicted - masks.num_truth) * masks.voxel_ml


def hd95_mm(masks: Masks) -> float | None:
    """The larger of the two directed 95th percentiles of the surface distances."""
    if not masks.num_truth or not masks.num_predicted:
        return None
    import surface_distance

    return float(surface_distance.compute_robust_hausdorff(masks.surface_distances, 95))


def assd_mm(masks: Masks) -> float | None:
    """Mean of the two directed average surface distances."""
    if not masks.num_truth or not masks.num_predicted:
        return None
    import surface_distance

    there, back = surface_distance.compute_average_surface_distance(masks.surface_distances)
    return float((there + back) / 2)


def hd95_penalised_mm(masks: Masks) -> float | None:
    """HD95, where a miss counts as the diagonal of the volume."""
    return masks.diagonal_mm if _is_missed(masks) else hd95_mm(masks)


def assd_penalised_mm(masks: Masks) -> float | None:
    """ASSD, where a miss counts as the diagonal of the volume."""
    return masks.diagonal_mm if _is_missed(masks) else assd_mm(masks)


def surface_dice_1mm(masks: Masks) -> float | None:
    """Share of both surfaces within 1 mm of the other one."""
    return _surface_dice(masks, 1.0)


def surface_dice_2mm(masks: Masks) -> float | None:
    """Share of both surfaces within 2 mm of the other one."""
    return _surface_dice(masks, 2.0)


def _surface_dice(masks: Masks, tolerance_mm: float) -> float | None:
    """Nikolov et al., arXiv 1809.04430; 0 for a miss."""
    if not masks.num_truth or not masks.num_predicted:
        return 0.0 if _is_missed(masks) else None
    import surface_distance

    return float(
        surface_distance.compute_surface_dice_at_tolerance(masks.surface_distances, tolerance_mm)
    )


def _is_missed(masks: Masks) -> bool:
    return masks.num_truth > 0 and masks.num_predicted == 0


def false_positive_volume_ml(masks: Masks) -> float:
    """Predicted volume outside the truth."""
    return (masks.num_predicted - masks.num_both) * masks.voxel_ml


def volume_truth_ml(masks: Masks) -> float:
    """Volume of the truth."""
    return masks.num_truth * masks.voxel_ml


def volume_predicted_ml(masks: Masks) -> float:
    """Volume of the prediction."""
    return masks.num_predicted * masks.voxel_ml


_NO_TRUTH, _ONE_EMPTY = "T is empty", "either is empty"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("dice", "Dice", dice, "2 |T and P| / (|T| + |P|)", _NO_TRUTH,
               per_fold=True, headline=True),
        Metric("iou", "IoU", iou, "|T and P| / |T or P|", _NO_TRUTH),
        Metric("sensitivity", "Sensitivity", sensitivity, "|T and P| / |T|", _NO_TRUTH,
               per_fold=True),
        Metric("precision", "Precision", precision, "|T and P| / |P|", _ONE_EMPTY, per_fold=True),
        Metric("specificity", "Specificity", specificity, "1 - |P outside T| / (N - |T|)",
               "T is all", decimals=5),
        Metric("volume_difference_ml", "Volume difference", volume_difference_ml,
               "volume of P less that of T", _NO_TRUTH, "Difference", "ml", 2),
        Metric("hd95_mm", "HD95", hd95_mm,
               "the larger of the 95th percentiles of the surface distances in either direction",
               _ONE_EMPTY, unit="mm", decimals=2, per_fold=True),
        Metric("hd95_penalised_mm", "HD95, misses penalised", hd95_penalised_mm,
               "the same; a miss counts as the diagonal of the image", _NO_TRUTH,
               "HD95 pen.", "mm", 2),
        Metric("assd_mm", "ASSD", assd_mm,
               "mean of the average surface distances in either direction",
               _ONE_EMPTY, unit="mm", decimals=2, per_fold=True),
        Metric("assd_penalised_mm", "ASSD, misses penalised", assd_penalised_mm,
               "the same; a miss counts as the diagonal of the image", _NO_TRUTH,
               "ASSD pen.", "mm", 2),
        Metric("surface_dice_1mm", "Surface Dice at 1 mm", surface_dice_1mm,
               "share of both surfaces within 1 mm of the other; 0 for a miss", _NO_TRUTH,
               "Surf. Dice 1 mm"),
        Metric("surface_dice_2mm", "Surface Dice at 2 mm", surface_dice_2mm,
               "share of both surfaces within 2 mm of the other; 0 for a miss", _NO_TRUTH,
               "Surf. Dice 2 mm"),
        Metric("false_positive_volume_ml", "False-positive volume", false_positive_volume_ml,
               "volume of P outside T", "never", "False pos.", "ml", 2, per_fold=True),
        Metric("volume_truth_ml", "True volume", volume_truth_ml, "volume of T", "never",
               "Truth", "ml", 2),
        Metric("volume_predicted_ml", "Predicted volume", volume_predicted_ml, "volume of P",
               "never", "Predicted", "ml", 2),
    )
}  # fmt: skip
"""Every metric by its name, in the order of the tables."""
