"""Metrics summed up over cases and folds, and the summary as a text table."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.faults import DataError
from experiments.measuring import detection, statistics
from experiments.measuring.detection import DetectedCase, DetectionSummary
from experiments.measuring.metrics import METRICS
from experiments.measuring.operating_point import Operation, operate
from experiments.measuring.rows import Ends, Row, check_metrics

Table = Mapping[str, Mapping[str, float | None]]
"""``{class: {metric: value}}``."""


@dataclasses.dataclass(frozen=True)
class FalsePositives:
    """What is predicted on the cases that do not hold a class.

    Attributes:
        num_cases: on how many of them anything is.
        mean_ml, median_ml, sd_ml, max_ml: of its volume over all of them; None where it is not
            defined.
    """

    num_cases: int
    mean_ml: float | None
    median_ml: float | None
    sd_ml: float | None
    max_ml: float | None


@dataclasses.dataclass(frozen=True)
class OfFold:
    """The cases that one fold validates.

    Attributes:
        fold: its number, from 0.
        num_cases: of the fold.
        num_positive, num_missed: of each class: as in ``Summary``.
        mean: likewise.
        note: None, or that a class is in no case.
    """

    fold: int
    num_cases: int
    num_positive: Mapping[str, int]
    num_missed: Mapping[str, int]
    mean: Table
    note: str | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """Metrics over cases and folds.

    Attributes:
        metric_per_case: the rows by fold, case and class.
        mean, sd, median, num_defined: over the cases for which the metric is defined. ``sd`` is the
            sample standard deviation (n - 1) over cases, ``sd_of_fold_means`` that over the means
            of the folds; None below two. Neither is a standard error.
        interval: ends of the 95 % bootstrap interval of each mean over patients
            (``experiments.measuring.statistics.bootstrap_interval``); None below two patients.
        num_patients: those for whom the metric is defined.
        num_cases: of all folds.
        num_positive, num_negatives: of each class: cases with and without it.
        num_missed: positives without any prediction.
        num_no_overlap: positives with Dice 0, the missed ones among them.
        false_positives_on_negatives: of each class.
        folds_without_positives: folds in which no case has any foreground.
        per_fold: each fold.
        detection: of the rows that have it, if any.
        operation: operating points learnt from the other folds, where there are two or more.
    """

    metric_per_case: tuple[Row, ...]
    mean: Table
    sd: Table
    sd_of_fold_means: Table
    median: Table
    num_defined: Mapping[str, Mapping[str, int]]
    interval: Mapping[str, Mapping[str, Ends | None]]
    num_patients: Mapping[str, Mapping[str, int]]
    num_cases: int
    num_positive: Mapping[str, int]
    num_missed: Mapping[str, int]
    num_no_overlap: Mapping[str, int]
    num_negatives: Mapping[str, int]
    false_positives_on_negatives: Mapping[str, FalsePositives]
    folds_without_positives: tuple[int, ...]
    per_fold: tuple[OfFold, ...]
    detection: DetectionSummary | None = None
    operation: Operation | None = None

    def __post_init__(self):
        tables = [fold.mean for fold in self.per_fold]
        tables += [self.mean, self.sd, self.sd_of_fold_means, self.median]
        for table in (*tables, self.num_defined, self.interval, self.num_patients):
            for of_class in table.values():
                check_metrics(of_class, "summary")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self.mean)


def summarise(rows: Sequence[Row], folds: Sequence[int] = ()) -> Summary:
    """Metrics over cases and folds.

    Args:
        rows: one for each case and class.
        folds: the folds that are evaluated; others are missing, not empty. Empty where there are
            no folds (then each row's fold may be None).

    Raises:
        DataError: no rows, a row twice, ``detection`` in some rows alone, or a row of a fold that
            ``folds`` lacks.
    """
    _check_rows(rows, folds)
    rows = sorted(rows, key=lambda row: (-1 if row.fold is None else row.fold, row.case_id))
    by_class = {
        name: [row for row in rows if row.name == name]
        for name in dict.fromkeys(row.name for row in rows)
    }
    per_fold = tuple(_of_fold(fold, by_class) for fold in sorted(folds))
    negatives = {
        name: [row for row in members if not row.positive] for name, members in by_class.items()
    }
    detected = [
        DetectedCase(row.case_id, row.patient_id, row.detection)
        for row in rows
        if row.detection is not None
    ]
    num_positive, num_missed = _counts(by_class)
    return Summary(
        metric_per_case=tuple(rows),
        mean=_table(by_class, _mean),
        sd=_table(by_class, _sample_sd),
        sd_of_fold_means={
            name: {metric: _sd_of_means(per_fold, name, metric) for metric in METRICS}
            for name in by_class
        },
        median=_table(by_class, _median),
        num_defined={
            name: {metric: len(_defined(members, metric)) for metric in METRICS}
            for name, members in by_class.items()
        },
        interval={
            name: {metric: _interval(members, metric) for metric in METRICS}
            for name, members in by_class.items()
        },
        num_patients={
            name: {metric: len({*_patients(members, metric)}) for metric in METRICS}
            for name, members in by_class.items()
        },
        num_cases=len({row.case_id for row in rows}),
        num_positive=num_positive,
        num_missed=num_missed,
        num_no_overlap={
            name: sum(row.dice == 0 for row in members) for name, members in by_class.items()
        },
        num_negatives={name: len(members) for name, members in negatives.items()},
        false_positives_on_negatives={
            name: _false_positives(members) for name, members in negatives.items()
        },
        folds_without_positives=tuple(
            fold.fold for fold in per_fold if not any(fold.num_positive.values())
        ),
        per_fold=per_fold,
        detection=detection.summarise(detected) if detected else None,
        operation=operate(
            {
                fold: [r.detection for r in rows if r.fold == fold and r.detection is not None]
                for fold in sorted(folds)
            }
        ),
    )


def _check_rows(rows: Sequence[Row], folds: Sequence[int]) -> None:
    if not rows:
        raise DataError("at least one case must be evaluated; got none. Check the prediction step.")
    count = collections.Counter((row.case_id, row.name) for row in rows)
    if twice := sorted(row for row, times in count.items() if times > 1):
        raise DataError(
            f"each case must be evaluated once per class; got {twice} twice. Drop the copies."
        )
    detected = {row.name for row in rows if row.detection is not None}
    of_detected = [row for row in rows if row.name in detected]
    without = sorted({row.case_id for row in of_detected if row.detection is None})
    if 0 < len(without) < len({row.case_id for row in of_detected}):
        raise DataError(
            "predictions must be probabilities of all cases, or masks of all; got whole numbers in "
            f"{', '.join(without[:5])}{', ...' if len(without) > 5 else ''} beside probabilities. "
            "Save all as float32, or all as masks."
        )
    strays = [row for row in rows if folds and row.fold not in folds]
    if strays:
        raise DataError(
            f"each case must belong to an evaluated fold; got case {strays[0].case_id} of "
            f"fold {strays[0].fold} and folds {sorted(folds)}. Name its fold too."
        )


def _of_fold(fold: int, by_class: Mapping[str, Sequence[Row]]) -> OfFold:
    members = {name: [row for row in rows if row.fold == fold] for name, rows in by_class.items()}
    num_positive, num_missed = _counts(members)
    absent = [name for name, num in num_positive.items() if not num]
    return OfFold(
        fold=fold,
        num_cases=len({row.case_id for rows in members.values() for row in rows}),
        num_positive=num_positive,
        num_missed=num_missed,
        mean=_table(members, _mean),
        note=f"no case with {' or '.join(absent)}: Dice undefined" if absent else None,
    )


def _counts(by_class: Mapping[str, Sequence[Row]]) -> tuple[dict[str, int], dict[str, int]]:
    """Positive cases of each class, and those of them without any prediction."""
    positives = {name: [row for row in rows if row.positive] for name, rows in by_class.items()}
    missed = {
        name: sum(row.volume_predicted_ml == 0 for row in rows) for name, rows in positives.items()
    }
    return {name: len(rows) for name, rows in positives.items()}, missed


def _table(
    by_class: Mapping[str, Sequence[Row]], statistic: Callable[[np.ndarray], float | None]
) -> dict[str, dict[str, float | None]]:
    """``statistic`` of the defined values of every class and metric."""
    return {
        name: {metric: statistic(_defined(rows, metric)) for metric in METRICS}
        for name, rows in by_class.items()
    }


def _sd_of_means(per_fold: Sequence[OfFold], name: str, metric: str) -> float | None:
    means = [fold.mean[name][metric] for fold in per_fold]
    return _sample_sd(np.array([mean for mean in means if mean is not None], np.float64))


def _patients(rows: Sequence[Row], metric: str) -> list[str]:
    """The patient of each row for which the metric is defined."""
    return [row.patient_id for row in rows if row.metrics[metric] is not None]


def _interval(rows: Sequence[Row], metric: str) -> Ends | None:
    """Bootstrap interval of a metric's mean."""
    patients = _patients(rows, metric)
    if not patients:
        return None
    return statistics.bootstrap_interval(_defined(rows, metric), patients)


def _defined(rows: Sequence[Row], metric: str) -> np.ndarray:
    values = [row.metrics[metric] for row in rows]
    return np.array([value for value in values if value is not None], np.float64)


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if values.size else None


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if values.size else None


def _sample_sd(values: np.ndarray) -> float | None:
    return float(np.std(values, ddof=1)) if values.size > 1 else None


def _false_positives(negatives: Sequence[Row]) -> FalsePositives:
    volumes = np.array([row.false_positive_volume_ml for row in negatives])
    return FalsePositives(
        num_cases=int((volumes > 0).sum()),
        mean_ml=_mean(volumes),
        median_ml=_median(volumes),
        sd_ml=_sample_sd(volumes),
        max_ml=float(volumes.max()) if volumes.size else None,
    )


def format_summary(summary: Summary) -> str:
    """The summary as a small text table: one line per class and metric."""
    lines = [
        f"{'class':<10} {'metric':<26} {'mean':>9} {'95 % interval':>19} {'sd':>9} {'median':>9} "
        f"{'cases':>6}"
    ]
    for name in summary.classes:
        for key in METRICS:
            ends = summary.interval[name][key]
            tables = (summary.mean, summary.sd, summary.median)
            mean, sd, median = (_number(table[name][key]) for table in tables)
            between = "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
            lines.append(
                f"{name:<10} {key:<26} {mean:>9} {between:>19} {sd:>9} {median:>9} "
                f"{summary.num_defined[name][key]:>6}"
            )
    for name in summary.classes:
        false = summary.false_positives_on_negatives[name]
        lines.append(
            f"{name}: {summary.num_positive[name]} of {summary.num_cases} cases positive, "
            f"{summary.num_missed[name]} missed; false positives on {false.num_cases} of "
            f"{summary.num_negatives[name]} negatives. Means leave undefined values out."
        )
        if (num := summary.num_patients[name]["dice"]) < statistics.FEW_PATIENTS:
            lines.append(f"{name}: {statistics.few_patients_warning(num)}")
    if found := summary.detection:
        lines.append(
            f"lesions: AP {_number(found.average_precision)}, AUROC of cases "
            f"{_number(found.auroc)}, PI-CAI score {_number(found.picai_score)}; sensitivity "
            + ", ".join(f"{_number(v)} at {rate}" for rate, v in found.sensitivity_at.items())
            + " false positives per case"
        )
    if found := summary.operation:
        lines.append(in_words(found))
    return "\n".join(lines)


def in_words(operation: Operation) -> str:
    """What came of the operating points."""
    found = operation.found
    return (
        f"operating points from the other folds: {_number(found.sensitivity)} of the lesions are "
        f"called, and something on {found.num_false_positive_cases} of {found.num_negatives} "
        f"negatives; calibration error of cases {_number(found.expected_calibration_error)}; Dice "
        f"at the voxel thresholds learnt {_number(found.dice)}"
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
