"""What is measured of a case: a row for each class, and the detection of its lesions."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from data_pipelines.faults import DataError
from experiments.measuring.metrics import METRICS
from experiments.process.records import INLINE

Ends = tuple[float, float]
"""Lower and upper end of an interval."""


class Match(NamedTuple):
    """A lesion candidate, or a lesion without one.

    Attributes:
        lesion: 1 if it is (on) a lesion, else 0.
        confidence: of the candidate; 0 for a lesion without one.
        overlap: IoU of candidate and lesion.
    """

    lesion: int
    confidence: float
    overlap: float


class Bin(NamedTuple):
    """Voxels, or cases, whose probabilities fall into one bin.

    Attributes:
        size: how many.
        probability: sum of their probabilities.
        positive: how many are foreground.
    """

    size: int
    probability: float
    positive: int


@dataclasses.dataclass(frozen=True)
class Detection:
    """What ``lesions.detect`` finds in the probabilities of a case.

    Attributes:
        confidence: of the strongest candidate; 0 without any.
        lesions: each candidate, and each lesion without one.
        voxels: bins over the probabilities from 0 to 1, for calibration.
    """

    confidence: float
    lesions: tuple[Match, ...]
    voxels: tuple[Bin, ...]

    @property
    def positive(self) -> bool:
        """Whether the case has a lesion."""
        return any(match.lesion for match in self.lesions)


@dataclasses.dataclass(frozen=True)
class Row:
    """One class of one case.

    Attributes:
        case_id, patient_id: whose.
        fold: in which it was validated; None without folds.
        name: of the class.
        metrics: every one of ``METRICS``; None where it is undefined.
        detection: of the case's lesions, where there are probabilities of them.

    Raises:
        DataError: a metric is missing.
    """

    case_id: str
    patient_id: str
    fold: int | None
    name: str = dataclasses.field(metadata={"json": "class"})
    metrics: Mapping[str, float | None] = dataclasses.field(metadata=INLINE)
    detection: Detection | None = None

    def __post_init__(self):
        check_metrics(self.metrics, "row")

    @property
    def dice(self) -> float | None:
        """Dice; None for a case without the class."""
        return self.metrics["dice"]

    @property
    def volume_truth_ml(self) -> float:
        """Volume of the truth."""
        return self.metrics["volume_truth_ml"] or 0.0

    @property
    def volume_predicted_ml(self) -> float:
        """Volume of the prediction."""
        return self.metrics["volume_predicted_ml"] or 0.0

    @property
    def false_positive_volume_ml(self) -> float:
        """Predicted volume outside the truth."""
        return self.metrics["false_positive_volume_ml"] or 0.0

    @property
    def positive(self) -> bool:
        """Whether the case holds the class."""
        return self.volume_truth_ml > 0


def check_metrics(found: Mapping[str, object], what: str) -> None:
    """Raise ``DataError`` unless every metric is there."""
    if lacking := [name for name in METRICS if name not in found]:
        raise DataError(
            f"every {what} must hold all metrics; got one without {', '.join(lacking)}, as another "
            "version wrote it. Measure the cases again: with python -m experiments.evaluate, or "
            "remove the metrics.json of each fold and run python -m experiments.cv again."
        )
