"""What the values of a label mean, for training and for evaluation alike."""

import numpy as np

from data_pipelines.case import Volume
from data_pipelines.faults import DataError
from data_pipelines.targets import IGNORED, Target, target_of

_STEP = 0.0025  # of the largest value: half the step of 8-bit values that were scaled to it
_MOST = 0.02
_LEAST = 1e-4
_SCALED_ONE = 1e-6


def label_classes(values: np.ndarray, target: Target | str) -> np.ndarray:
    """uint8 parts of label values; the dtype of the file does not matter.

    Whole numbers that a scaled file holds inexactly, as nibabel writes them of floating-point
    arrays (1.00000006, or 0.996 of 2), are rounded. For a built-in target of one class every value
    above 0 is 1; of a target with classes of its own, what is ignored is ``IGNORED``.

    Raises:
        DataError: fractions, or values that the target does not have.
    """
    target = target_of(target) if isinstance(target, str) else target
    if target.values:
        return _own_classes(values, target)
    classes = target.classes
    highest = 255 if len(classes) == 1 else len(classes)
    whole = whole_numbers(values)
    bad = np.asarray(values)[(whole != whole) | (whole < 0) | (whole > highest)]
    if bad.size:
        found = np.unique(bad[: 2**20])
        raise DataError(
            f"label values must be whole numbers from 0 to {highest} for the target "
            f"'{target.name}'; got {', '.join(f'{v:.7g}' for v in found[:3])}"
            f"{' and others' if found.size > 3 else ''}. Correct the label file or choose another "
            "--data.target."
        )
    return (whole > 0).astype(np.uint8) if len(classes) == 1 else whole.astype(np.uint8)


def _own_classes(values: np.ndarray, target: Target) -> np.ndarray:
    """Parts of the values of a target with classes of its own."""
    whole = whole_numbers(values)
    parts = np.zeros(values.shape, np.uint8)
    known = whole == 0
    for part, of_part in enumerate(target.values, start=1):
        for value in of_part:
            here = whole == value
            parts[here] = part
            known |= here
    if target.ignore is not None:
        here = whole == target.ignore
        parts[here] = IGNORED
        known |= here
    if not known.all():
        found = np.unique(np.asarray(values)[~known][: 2**20])
        named = sorted({value for of_part in target.values for value in of_part})
        raise DataError(
            f"label values must be those of the classes of '{target.name}', 0"
            f"{'' if target.ignore is None else f', {target.ignore} (ignored)'} and "
            f"{', '.join(map(str, named))}; got {', '.join(f'{v:.7g}' for v in found[:3])}"
            f"{' and others' if found.size > 3 else ''}. Correct the label file, or name the value "
            "in --data.labels."
        )
    return parts


def settled(label: Volume) -> Volume:
    """A label or mask with its inexact whole numbers rounded; one with fractions as it is."""
    whole = whole_numbers(label.array)
    return label if (whole != whole).any() else Volume(whole, label.affine)


def whole_numbers(values: np.ndarray) -> np.ndarray:
    """Values rounded where a scaled file holds whole numbers inexactly; NaN for fractions."""
    if values.dtype.kind in "bui":
        return values
    largest = float(np.max(np.abs(values), initial=0, where=np.isfinite(values)))
    tolerance = min(max(_STEP * largest, _LEAST), _MOST)
    whole = np.rint(values)
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values - whole) <= tolerance, whole, np.nan)


def _is_scaled_mask(values: np.ndarray) -> bool:
    """Whether floating-point values are 0 and 1 alone, which no network's probabilities are."""
    ones = values[values != 0]
    return bool(ones.size and (abs(ones - 1) < _SCALED_ONE).all())


def predicted_values(values: np.ndarray, target: Target | str) -> np.ndarray:
    """What a predicted file holds: probabilities (floating point) or classes (uint8).

    Of a target with one class, fractions are probabilities, as are floating-point values that are
    all 0, and whole numbers a mask, which holds 0 and one other value.

    Raises:
        DataError: whole numbers of several values for one class, as probabilities in percent are,
            or fractions for several classes.
    """
    target = target_of(target) if isinstance(target, str) else target
    whole = whole_numbers(values)
    fractions = bool((whole != whole).any())
    if target.num_parts > 1:
        if fractions:
            raise DataError(
                "a mask of several classes must hold whole numbers; got fractions. "
                "Take the argmax over the class probabilities first."
            )
        return label_classes(values, target)
    if fractions:
        return np.where((values > 1) & (values < 1 + _SCALED_ONE), 1, values).astype(values.dtype)
    largest = float(whole.max(initial=0))
    if (whole < 0).any() or not np.isin(whole, (0, largest)).all():
        found = np.unique(whole)
        raise DataError(
            "a predicted mask must hold 0 and one other value, and probabilities must be "
            f"fractions; got {found.size} whole numbers from {found[0]:g} to {found[-1]:g}. Divide "
            "probabilities in percent by 100, or set the whole target to 1."
        )
    if values.dtype.kind == "f" and largest <= 1 and not _is_scaled_mask(values):
        return values
    return (whole > 0).astype(np.uint8)
