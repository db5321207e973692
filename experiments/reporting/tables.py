"""The tables of a run's report, each from the metrics or the facts that it shows.

``names`` are the groups that the folds leave out, in their order; empty for drawn folds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.measuring.metrics import METRICS
from experiments.reporting.charts import History
from experiments.reporting.wording import (
    LABELS,
    SHORT_LABELS,
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


def headline_table(metrics: Mapping[str, Any], name: str) -> Table:
    """Every metric of a class: over cases with its interval, and over folds."""
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
                LABELS[metric],
                number(metrics["mean"][name][metric], metric),
                interval(metrics["interval"][name][metric], metric),
                *(
                    number(metrics[key][name][metric], metric)
                    for key in ("sd", "sd_of_fold_means", "median")
                ),
                str(metrics["num_defined"][name][metric]),
            )
            for metric in METRICS
        ],
    )


def count_table(metrics: Mapping[str, Any], classes: Sequence[str]) -> Table:
    """How many cases are positive, missed or falsely positive, class by class."""

    def share(count: int, of: int) -> str:
        return f"{count} of {of}" if of else UNDEFINED

    rows: list[tuple[str, Callable[[str], str]]] = [
        ("Positive cases", lambda c: share(metrics["num_positive"][c], metrics["num_cases"])),
        (
            "Missed (empty prediction)",
            lambda c: share(metrics["num_missed"][c], metrics["num_positive"][c]),
        ),
        (
            "No overlap with the truth (missed ones included)",
            lambda c: share(metrics["num_no_overlap"][c], metrics["num_positive"][c]),
        ),
        (
            "Negative cases with false positives",
            lambda c: share(
                metrics["false_positives_on_negatives"][c]["num_cases"],
                metrics["num_negatives"][c],
            ),
        ),
        (
            "False-positive volume on negative cases, mean",
            lambda c: volume(metrics["false_positives_on_negatives"][c]["mean_ml"]),
        ),
        (
            "False-positive volume on negative cases, largest",
            lambda c: volume(metrics["false_positives_on_negatives"][c]["max_ml"]),
        ),
    ]
    return Table(
        "Counts",
        ("", *(class_label(name).capitalize() for name in classes)),
        [(title, *(value(name) for name in classes)) for title, value in rows],
    )


def detection_table(metrics: Mapping[str, Any]) -> Table | None:
    """Lesion detection with its intervals; None for a run that has none."""
    detection = metrics.get("detection")
    if detection is None:
        return None
    rows = [
        (label, number(detection[key], key), interval(detection["interval"][key], key))
        for key, label in (
            ("average_precision", "Average precision of lesions"),
            ("auroc", "AUROC of cases"),
            ("picai_score", "PI-CAI score"),
        )
    ]
    rows += [
        (
            f"Lesion sensitivity at {rate} false positives per case",
            number(value, "sensitivity"),
            interval(detection["interval"]["sensitivity_at"][rate], "sensitivity"),
        )
        for rate, value in detection["sensitivity_at"].items()
    ]
    rows += [
        (f"{label}, over all confidences", str(detection[key]), "")
        for key, label in (
            ("num_true_positive", "Lesions found"),
            ("num_false_negative", "Lesions not found"),
            ("num_false_positive", "False-positive candidates"),
        )
    ]
    for kind, reliability in detection["calibration"].items():
        key = "expected_calibration_error"
        rows.append((f"ECE of {kind}", number(reliability[key], key), ""))
        if kind == "voxels":
            above = number(reliability[f"{key}_above_lowest_bin"], key)
            rows.append(("ECE of voxels above the lowest bin", above, ""))
    return Table("Lesion detection and calibration", ("", "Value", "95 % interval"), rows)


def beside_table(metrics: Mapping[str, Any], classes: Sequence[str]) -> Table | None:
    """The headline beside what must be known to judge it."""
    baseline = metrics.get("baseline_mean_shape")
    if not baseline:
        return None
    means = [metrics["mean"][name]["dice"] for name in classes]
    known = [mean for mean in means if mean is not None]
    return Table(
        "Against a prediction that ignores the image",
        ("Prediction", "Mean Dice"),
        [
            ("This run", number(float(np.mean(known)) if known else None, "dice")),
            (
                "Mean shape of the training cases, same for every image",
                number(baseline.get("mean_dice"), "dice"),
            ),
        ],
    )


def best_table(metrics: Mapping[str, Any], names: Sequence[str]) -> Table | None:
    """Checkpoints chosen on the validation fold, one row per fold, or what the key holds."""
    best = metrics.get("best_checkpoint")
    if not best:
        return None
    if all(isinstance(entry, Mapping) for entry in best.values()):
        columns = list(dict.fromkeys(key for entry in best.values() for key in entry))
        rows = [
            (f"Fold {fold_name(int(fold), names)}", *(text(entry.get(key)) for key in columns))
            for fold, entry in best.items()
        ]
        return Table("Best checkpoints", ("", *(curve_label(key) for key in columns)), rows)
    return flat_table("Best checkpoints", best)


def fold_table(
    metrics: Mapping[str, Any], classes: Sequence[str], num_folds: int, names: Sequence[str]
) -> Table:
    """One row for each fold, also for those that are missing."""
    shown = ("dice", "sensitivity", "precision", "hd95_mm", "assd_mm", "false_positive_volume_ml")
    entries = {entry["fold"]: entry for entry in metrics["per_fold"]}
    several = len(classes) > 1
    rows = []
    for fold in range(max([num_folds, *(fold + 1 for fold in entries)])):
        for name in classes:
            title = f"Fold {fold_name(fold, names)}" + (f", {name}" if several else "")
            entry = entries.get(fold)
            if entry is None:
                rows.append((f"{title} (missing)", *([""] * (len(shown) + 3))))
                continue
            rows.append(
                (
                    title,
                    str(entry["num_cases"]),
                    str(entry["num_positive"][name]),
                    str(entry["num_missed"][name]),
                    *(number(entry["mean"][name][metric], metric) for metric in shown),
                )
            )
    columns = ("Fold", "Cases", "Positive", "Missed", *(SHORT_LABELS[metric] for metric in shown))
    return Table("Means per fold", columns, rows)


def case_table(metrics: Mapping[str, Any], names: Sequence[str]) -> Table:
    """One row for each case and class."""
    several = len(metrics["mean"]) > 1
    return Table(
        "Every case",
        ("Case", *(("Class",) if several else ()), "Fold", *(SHORT_LABELS[m] for m in METRICS)),
        [
            (
                row["case_id"],
                *((row["class"],) if several else ()),
                UNDEFINED if row["fold"] is None else fold_name(row["fold"], names),
                *(number(row[metric], metric) for metric in METRICS),
            )
            for row in metrics["metric_per_case"]
        ],
    )


def timing_table(
    metrics: Mapping[str, Any], environment: Mapping[str, Any], names: Sequence[str]
) -> Table | None:
    """Seconds per phase of the run, and speed per fold, as far as they were recorded."""
    rows = [
        (curve_label(phase), duration(seconds))
        for phase, seconds in _flatten(environment.get("wall_s") or {})
    ]
    for fold, summary in (metrics.get("fold_summaries") or {}).items():
        title = f"Fold {fold_name(int(fold), names)}"
        for key, label in (
            ("first_step_s", "first step, with compilation"),
            ("train_s", "training"),
            ("predict_s", "prediction"),
        ):
            if key in summary:
                rows.append((f"{title}: {label}", duration(summary[key])))
        if "examples_per_s" in summary:
            rows.append((f"{title}: examples per second", text(summary["examples_per_s"])))
        if "peak_memory_gb" in summary:
            memory = f"{summary['peak_memory_gb']:.2f} GB"
            rows.append((f"{title}: peak memory so far", memory))
    return Table("Time and memory", ("Phase", "Value"), rows) if rows else None


def folds_table(folds: Sequence[Mapping[str, Sequence[str]]], names: Sequence[str]) -> Table | None:
    """Numbers of cases in each fold; None where the folds are not known."""
    if not folds:
        return None
    return Table(
        "Folds",
        ("Fold", "Training cases", "Validation cases"),
        [
            (f"Fold {fold_name(index, names)}", str(len(fold["train"])), str(len(fold["val"])))
            for index, fold in enumerate(folds)
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
                text(_last(columns[name]["value"]) if name in columns else None)
                for columns in history.values()
            ),
        )
        for name in curves
    ]
    titles = (f"Fold {fold_name(fold, names)}" for fold in history)
    return Table("At the end of training", ("", *titles), rows)


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if values.size else None


def flat_table(title: str, nested: Mapping[str, Any]) -> Table:
    """A nested mapping as one row for each value, its keys joined by dots."""
    return Table(title, ("Name", "Value"), [(name, text(v)) for name, v in _flatten(nested)])


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in nested.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows
