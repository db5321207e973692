"""The tables of a run's report, each from the results or the facts that it shows.

``names`` are the groups that the folds leave out, in their order; empty for drawn folds.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.serving.splits import Folds
from experiments.measuring.detection import DetectionSummary
from experiments.measuring.metrics import METRICS
from experiments.measuring.operating_point import Operation
from experiments.measuring.summary import Summary
from experiments.reporting.charts import History
from experiments.reporting.wording import (
    UNDEFINED,
    Table,
    class_label,
    curve_label,
    duration,
    fold_name,
    interval,
    number,
    text,
    volume,
)
from experiments.run_folder import Best, FoldSummary, Results


def headline_table(summary: Summary, name: str) -> Table:
    """Every metric of a class: over cases with its interval, and over folds."""
    spreads = (summary.sd, summary.sd_of_fold_means, summary.median)
    return Table(
        f"{class_label(name).capitalize()}: over cases and folds",
        (
            "Metric",
            "Mean",
            "95 % interval",
            "SD over cases",
            "SD of fold means",
            "Median",
            "Cases",
        ),
        [
            (
                metric.title,
                number(summary.mean[name][key], metric),
                interval(summary.interval[name][key], metric),
                *(number(table[name][key], metric) for table in spreads),
                str(summary.num_defined[name][key]),
            )
            for key, metric in METRICS.items()
        ],
    )


def count_table(summary: Summary, classes: Sequence[str]) -> Table:
    """How many cases are positive, missed or falsely positive, class by class."""

    def share(count: int, of: int) -> str:
        return f"{count} of {of}" if of else UNDEFINED

    false = summary.false_positives_on_negatives
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("Positive cases", lambda c: share(summary.num_positive[c], summary.num_cases)),
        (
            "Missed (empty prediction)",
            lambda c: share(summary.num_missed[c], summary.num_positive[c]),
        ),
        (
            "No overlap with the truth (missed ones included)",
            lambda c: share(summary.num_no_overlap[c], summary.num_positive[c]),
        ),
        (
            "Negative cases with false positives",
            lambda c: share(false[c].num_cases, summary.num_negatives[c]),
        ),
        ("False-positive volume on negative cases, mean", lambda c: volume(false[c].mean_ml)),
        ("False-positive volume on negative cases, largest", lambda c: volume(false[c].max_ml)),
    ]
    return Table(
        "Counts",
        ("", *(class_label(name).capitalize() for name in classes)),
        [(title, *(value(name) for name in classes)) for title, value in rows],
    )


def detection_table(detection: DetectionSummary, operation: Operation | None) -> Table:
    """Lesion detection with its intervals, and what came of the operating points."""
    ends, voxels, cases = (
        detection.interval,
        detection.calibration.voxels,
        detection.calibration.cases,
    )
    above = voxels.expected_calibration_error_above_lowest_bin
    return Table(
        "Lesion detection and calibration",
        ("", "Value", "95 % interval"),
        [
            (
                "Average precision of lesions",
                number(detection.average_precision),
                interval(ends.average_precision),
            ),
            ("AUROC of cases", number(detection.auroc), interval(ends.auroc)),
            ("PI-CAI score", number(detection.picai_score), interval(ends.picai_score)),
            *(
                (
                    f"Lesion sensitivity at {rate} false positives per case",
                    number(value),
                    interval(ends.sensitivity_at[rate]),
                )
                for rate, value in detection.sensitivity_at.items()
            ),
            ("Lesions found, over all confidences", str(detection.num_true_positive), ""),
            ("Lesions not found, over all confidences", str(detection.num_false_negative), ""),
            (
                "False-positive candidates, over all confidences",
                str(detection.num_false_positive),
                "",
            ),
            ("ECE of voxels", number(voxels.expected_calibration_error), ""),
            ("ECE of voxels above the lowest bin", number(above), ""),
            ("ECE of cases", number(cases.expected_calibration_error), ""),
            *(() if operation is None else _operation_rows(operation)),
        ],
    )


def _operation_rows(operation: Operation) -> Sequence[tuple[str, str, str]]:
    """At operating points that were learnt from the other folds."""
    found = operation.found
    return (
        ("Lesions called, by operating points of the other folds", number(found.sensitivity), ""),
        (
            "Negatives on which something is called, by these",
            f"{found.num_false_positive_cases} of {found.num_negatives}",
            "",
        ),
        ("ECE of cases, by probabilities of these", number(found.expected_calibration_error), ""),
        ("Dice at the voxel thresholds of these", number(found.dice), ""),
    )


def beside_table(results: Results, classes: Sequence[str]) -> Table | None:
    """The headline beside what must be known to judge it."""
    baseline = results.baseline_mean_shape
    if baseline is None:
        return None
    means = [results.summary.mean[name]["dice"] for name in classes]
    known = [mean for mean in means if mean is not None]
    return Table(
        "Against a prediction that ignores the image",
        ("Prediction", "Mean Dice"),
        [
            ("This run", number(float(np.mean(known)) if known else None)),
            (
                "Mean shape of the training cases, same for every image",
                number(baseline.mean_dice),
            ),
        ],
    )


def best_table(best: Mapping[int, Best], names: Sequence[str]) -> Table:
    """Checkpoints chosen on the validation fold, one row per fold."""
    return Table(
        "Best checkpoints",
        ("", curve_label("step"), curve_label("validation_dice")),
        [
            (f"Fold {fold_name(fold, names)}", text(of_fold.step), text(of_fold.validation_dice))
            for fold, of_fold in best.items()
        ],
    )


def fold_table(
    summary: Summary, classes: Sequence[str], num_folds: int, names: Sequence[str]
) -> Table:
    """One row for each fold, also for those that are missing."""
    shown = [metric for metric in METRICS.values() if metric.per_fold]
    of_fold = {entry.fold: entry for entry in summary.per_fold}
    rows = []
    for fold in range(max([num_folds, *(fold + 1 for fold in of_fold)])):
        for name in classes:
            title = f"Fold {fold_name(fold, names)}" + (f", {name}" if len(classes) > 1 else "")
            entry = of_fold.get(fold)
            if entry is None:
                rows.append((f"{title} (missing)", *([""] * (len(shown) + 3))))
                continue
            rows.append(
                (
                    title,
                    str(entry.num_cases),
                    str(entry.num_positive[name]),
                    str(entry.num_missed[name]),
                    *(number(entry.mean[name][metric.name], metric) for metric in shown),
                )
            )
    columns = ("Fold", "Cases", "Positive", "Missed", *(metric.column for metric in shown))
    return Table("Means per fold", columns, rows)


def case_table(summary: Summary, names: Sequence[str]) -> Table:
    """One row for each case and class."""
    several = len(summary.classes) > 1
    columns = (metric.column for metric in METRICS.values())
    return Table(
        "Every case",
        ("Case", *(("Class",) if several else ()), "Fold", *columns),
        [
            (
                row.case_id,
                *((row.name,) if several else ()),
                UNDEFINED if row.fold is None else fold_name(row.fold, names),
                *(number(row.metrics[key], metric) for key, metric in METRICS.items()),
            )
            for row in summary.metric_per_case
        ],
        [{"case": row.case_id} for row in summary.metric_per_case],
    )


def timing_table(summaries: Mapping[int, FoldSummary], names: Sequence[str]) -> Table | None:
    """Times and memory of each fold; None where they were not recorded."""
    rows = []
    for fold, summary in summaries.items():
        title = f"Fold {fold_name(fold, names)}"
        rows += [
            (f"{title}: first step, with compilation", duration(summary.first_step_s)),
            (f"{title}: training", duration(summary.train_s)),
        ]
        if summary.predict_s is not None:
            rows.append((f"{title}: prediction", duration(summary.predict_s)))
        rows.append((f"{title}: examples per second", text(summary.examples_per_s)))
        if summary.peak_memory_gb is not None:
            rows.append((f"{title}: peak memory so far", f"{summary.peak_memory_gb:.2f} GB"))
    return Table("Time and memory", ("Phase", "Value"), rows) if rows else None


def folds_table(folds: Folds) -> Table:
    """Numbers of cases in each fold."""
    return Table(
        "Folds",
        ("Fold", "Training cases", "Validation cases"),
        [
            (f"Fold {fold_name(fold, folds.names)}", str(len(folds.training(fold))), str(len(ids)))
            for fold, ids in enumerate(folds.validation)
        ],
    )


def curve_table(history: History, curves: Sequence[str], names: Sequence[str]) -> Table | None:
    """The last value of each curve in each fold."""
    if not curves:
        return None
    rows = [
        (
            curve_label(name),
            *(
                text(_last(columns[name].values) if name in columns else None)
                for columns in history.values()
            ),
        )
        for name in curves
    ]
    titles = (f"Fold {fold_name(fold, names)}" for fold in history)
    return Table("At the end of training", ("", *titles), rows)


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if values.size else None


def flat_table(title: str, nested: Mapping[str, object]) -> Table:
    """A nested mapping as one row for each value, its keys joined by dots."""
    return Table(title, ("Name", "Value"), [(name, text(v)) for name, v in _flatten(nested)])


def _flatten(nested: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows = []
    for key, value in nested.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows
