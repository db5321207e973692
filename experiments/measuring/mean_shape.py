"""What can be had without looking at an image: where the target usually lies."""

import dataclasses
import math
from collections.abc import Collection, Sequence

import numpy as np

from data_pipelines.preparing import preprocessing
from data_pipelines.serving import loading, splits
from data_pipelines.targets import IGNORED
from experiments.settings.config import Config


@dataclasses.dataclass(frozen=True)
class MeanShape:
    """Mean Dice of the mean training shape, and over how many cases and classes.

    ``mean_dice`` is None where no case holds the target.
    """

    mean_dice: float | None
    num_cases: int


def run(
    config: Config, source: loading.CaseSource, folds: splits.Folds, done: Collection[int]
) -> MeanShape:
    """Mean Dice of the training patients' mean label, and over how many cases and classes.

    For each fold of ``done``, voxels whose label frequency over the training cases exceeds the
    threshold that gives the training cases the best mean Dice; measured like a prediction, in the
    T2W frame. Several classes are averaged over the cases that hold each, then with equal weight.
    """
    target = config.data.definition
    classes = target.classes
    grid, voxels = (), {}
    for case in loading.eval_cases(source, source.case_ids):
        grid = case.label.shape
        voxels[case.case_id] = [
            np.flatnonzero(target.mask_of(case.label, index)) for index in range(len(classes))
        ]
    scores: list[list[float]] = [[] for _ in classes]
    for fold in done:
        validation = folds.validation[fold]
        for index in range(len(classes)):
            known = [voxels[case_id][index] for case_id in folds.training(fold)]
            shape = mean_shape(known, math.prod(grid)).reshape(*grid, 1).astype(np.float32)
            for case_id in validation:
                case = source[case_id]
                mask = preprocessing.to_original(shape, case)[..., 0] > 0.5
                mask &= case.original_truth != IGNORED
                truth = target.mask_of(case.original_truth, index)
                if truth.any():
                    scores[index].append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    return average(scores)


def average(scores: Sequence[Sequence[float]]) -> MeanShape:
    """Mean over the classes of the mean over the cases of each, as the headline of a run has it."""
    means = [np.mean(of_class) for of_class in scores if of_class]
    return MeanShape(
        mean_dice=float(np.mean(means)) if means else None, num_cases=sum(map(len, scores))
    )


def mean_shape(known: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Voxels that are foreground often enough, by the threshold that fits the cases best.

    Args:
        known: of each case, the flat indices of its foreground voxels.
        size: number of voxels of a case.

    Returns:
        bool, flat: frequency over the cases of at least that of 34 candidates (quantiles of the
        frequencies above 0) which gives the highest mean Dice over the cases with foreground;
        nothing but voxels of every case where none has any.
    """
    frequency = np.bincount(np.concatenate(known), minlength=size) / len(known)
    filled = [frequency[voxels] for voxels in known if voxels.size]
    if not filled:
        return frequency >= 1

    def mean_dice(threshold: float) -> float:
        marked = (frequency >= threshold).sum()
        overlaps = [(2 * (values >= threshold).sum(), values.size) for values in filled]
        return float(np.mean([twice / (volume + marked) for twice, volume in overlaps]))

    candidates = np.unique(np.quantile(frequency[frequency > 0], np.linspace(0, 0.99, 34)))
    return frequency >= max(candidates, key=mean_dice)
