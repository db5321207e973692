"""The one way in which a predicted case is measured, whoever predicted it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.targets import IGNORED, Target, target_of
from experiments.measuring import lesions
from experiments.measuring.metrics import case_metrics, to_mask
from experiments.measuring.rows import Row


@dataclasses.dataclass(frozen=True)
class Rule:
    """How predictions become masks.

    Attributes:
        target: what is predicted: lesion, gland, zones, or a name of the user's.
        threshold: above which a probability of a target with one class is foreground.
        labels, lesions: of a target of the user's own, as in ``DataConfig``.
    """

    target: str
    threshold: float
    labels: tuple[str, ...] = ()
    lesions: tuple[str, ...] = ()

    @property
    def definition(self) -> Target:
        """Classes, and the stored values that make them."""
        return target_of(self.target, self.labels, self.lesions)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes, in label order."""
        return self.definition.classes


def measure_case(
    case_id: str,
    patient_id: str,
    fold: int | None,
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    rule: Rule,
    *,
    detect: bool = True,
) -> list[Row]:
    """A row for each class of the target.

    Args:
        case_id: of the case.
        patient_id: whose it is.
        fold: in which it is validated; None without folds.
        prediction: in the frame of ``truth``: a mask ``d h w`` of whole numbers, class ``i`` as
            ``i + 1``; or probabilities ``d h w k``, of the class alone or with background first.
        truth: integer or bool ``d h w``, class ``i`` as ``i + 1``, or the parts of a target of the
            user's own.
        spacing_mm: voxel size, ``d h w``.
        rule: target and threshold.
        detect: lesions too, where there are probabilities of them.

    Raises:
        DataError: as ``case_metrics``.
    """
    target, mask, detection = rule.definition, prediction, None
    if np.issubdtype(prediction.dtype, np.floating):
        one = target.num_parts == 1
        mask = prediction[..., 0] if one else to_mask(prediction, rule.threshold)
    measured = case_metrics(mask, truth, spacing_mm, target.classes, rule.threshold, target=target)
    if detect and target.lesion is not None and mask is not prediction:
        index = target.classes.index(target.lesion)
        counted = None if target.ignore is None else truth != IGNORED
        detection = lesions.detect(
            target.probability_of(prediction, index), target.mask_of(truth, index), counted=counted
        )
    return [
        Row(case_id, patient_id, fold, name, metrics, detection if name == target.lesion else None)
        for name, metrics in measured.items()
    ]
