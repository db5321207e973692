"""The one way in which a predicted case is measured, whoever predicted it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.config import TARGET_CLASSES
from experiments.measuring import lesions
from experiments.measuring.metrics import case_metrics, to_mask
from experiments.measuring.rows import Row


@dataclasses.dataclass(frozen=True)
class Rule:
    """How predictions become masks.

    Attributes:
        target: what is predicted; a key of ``TARGET_CLASSES``.
        threshold: above which a probability of a target with one class is foreground.
    """

    target: str
    threshold: float

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes, in label order."""
        return TARGET_CLASSES[self.target]


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
        truth: integer or bool ``d h w``, class ``i`` as ``i + 1``.
        spacing_mm: voxel size, ``d h w``.
        rule: target and threshold.
        detect: lesions too, where there are probabilities of them.

    Raises:
        DataError: as ``case_metrics``.
    """
    mask, detection = prediction, None
    if np.issubdtype(prediction.dtype, np.floating):
        one = len(rule.classes) == 1
        mask = prediction[..., 0] if one else to_mask(prediction, rule.threshold)
    measured = case_metrics(mask, truth, spacing_mm, rule.classes, rule.threshold)
    if detect and rule.target == lesions.TARGET and mask is not prediction:
        detection = lesions.detect(mask, truth)
    return [
        Row(case_id, patient_id, fold, name, metrics, detection)
        for name, metrics in measured.items()
    ]
