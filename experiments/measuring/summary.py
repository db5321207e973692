"""Metrics summed up over cases and folds, and the summary as a text table."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.faults import DataError
from experiments.measuring import lesions, statistics
from experiments.measuring.metrics import METRICS, Row


def summarise(rows: Sequence[Row], folds: Sequence[int] = ()) -> dict[str, Any]:
    """Metrics over cases and folds, ready for ``json.dump``.

    Args:
        rows: one per case and class: ``{"case_id", "patient_id", "fold", "class", **metrics}``
            with the metrics of ``case_metrics``. Further keys are kept; ``detection`` is what
            ``lesions.detect`` says of a case with a probability map.
        folds: the folds that are evaluated; others are missing, not empty. Empty where there are
            no folds (then each ``fold`` may be None).

    Returns:
        * ``metric_per_case``: the rows by fold, case and class.
        * ``mean``, ``sd``, ``median``, ``num_defined``: ``{class: {metric: value}}`` over the
          cases for which the metric is defined. ``sd`` is the sample standard deviation (n - 1)
          over cases, ``sd_of_fold_means`` that over the means of the folds; None below two.
          Neither is a standard error.
        * ``interval``: ends of the 95 % bootstrap interval of each mean over patients
          (``experiments.measuring.statistics.bootstrap_interval``); None below two patients.
          ``num_patients``: those for whom the metric is defined.
        * ``per_fold``: each fold's ``num_cases``, ``num_positive``, ``num_missed``, ``mean`` and
          ``note`` (None, or that a class is in no case).
        * ``num_cases``, and ``folds_without_positives``: no case with any foreground.
        * ``detection``: ``lesions.summarise`` of the rows that have it, if any.
        * per class: ``num_positive``, ``num_negatives``, ``num_missed`` (truth but no prediction
          at all), ``num_no_overlap`` (positives with Dice 0, the missed ones among them) and
          ``false_positives_on_negatives``: ``num_cases`` with any, mean, median, sd, max in ml.

    Raises:
        DataError: no rows, a row twice or without some metric, ``detection`` in some rows alone,
            or a row of a fold that ``folds`` lacks.
    """
    _check_rows(rows, folds)
    rows = sorted(rows, key=lambda row: (_fold_key(row), row["case_id"]))
    by_class = {
        name: [row for row in rows if row["class"] == name]
        for name in dict.fromkeys(row["class"] for row in rows)
    }
    per_fold = [_fold_summary(fold, by_class) for fold in sorted(folds)]
    negatives = {name: _negatives(members) for name, members in by_class.items()}
    detected = [{**row, **row["detection"]} for row in rows if "detection" in row]
    return {
        **({"detection": lesions.summarise(detected)} if detected else {}),
        "mean": _table(by_class, _mean),
        "sd": _table(by_class, _sample_sd),
        "sd_of_fold_means": {
            name: {
                metric: _sample_sd(_defined([fold["mean"][name] for fold in per_fold], metric))
                for metric in METRICS
            }
            for name in by_class
        },
        "median": _table(by_class, _median),
        "num_defined": _table(by_class, len),
        "interval": {name: _intervals(members) for name, members in by_class.items()},
        "num_patients": {
            name: {metric: len(_patients(members, metric)) for metric in METRICS}
            for name, members in by_class.items()
        },
        "num_cases": len({row["case_id"] for row in rows}),
        **_counts(by_class),
        "num_no_overlap": {
            name: sum(row["dice"] == 0 for row in members) for name, members in by_class.items()
        },
        "num_negatives": {name: len(members) for name, members in negatives.items()},
        "false_positives_on_negatives": {
            name: _false_positives(members) for name, members in negatives.items()
        },
        "folds_without_positives": [
            fold["fold"] for fold in per_fold if not any(fold["num_positive"].values())
        ],
        "per_fold": per_fold,
        "metric_per_case": [dict(row) for row in rows],
    }


def _check_rows(rows: Sequence[Row], folds: Sequence[int]) -> None:
    if not rows:
        raise DataError("at least one case must be evaluated; got none. Check the prediction step.")
    count = collections.Counter((row["case_id"], row["class"]) for row in rows)
    if twice := sorted(row for row, times in count.items() if times > 1):
        raise DataError(
            f"each case must be evaluated once per class; got {twice} twice. Drop the copies."
        )
    lacking = sorted({metric for row in rows for metric in METRICS if metric not in row})
    if lacking:
        raise DataError(
            f"every row must hold all metrics; got rows without {', '.join(lacking)}, as earlier "
            "versions wrote them. Evaluate the cases again with this version."
        )
    without = sorted({row["case_id"] for row in rows if "detection" not in row})
    if 0 < len(without) < len({row["case_id"] for row in rows}):
        raise DataError(
            "predictions must be probabilities of all cases, or masks of all; got whole numbers in "
            f"{', '.join(without[:5])}{', ...' if len(without) > 5 else ''} beside probabilities. "
            "Save all as float32, or all as masks."
        )
    strays = [row for row in rows if folds and row.get("fold") not in folds]
    if strays:
        raise DataError(
            f"each case must belong to an evaluated fold; got case {strays[0]['case_id']} of "
            f"fold {strays[0].get('fold')} and folds {sorted(folds)}. Name its fold too."
        )


def _fold_key(row: Row) -> int:
    fold = row.get("fold")
    return -1 if fold is None else fold


def _fold_summary(fold: int, by_class: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    members = {
        name: [row for row in rows if row["fold"] == fold] for name, rows in by_class.items()
    }
    counts = _counts(members)
    absent = [name for name, num in counts["num_positive"].items() if not num]
    return {
        "fold": fold,
        "num_cases": len({row["case_id"] for rows in members.values() for row in rows}),
        **counts,
        "mean": _table(members, _mean),
        "note": f"no case with {' or '.join(absent)}: Dice undefined" if absent else None,
    }


def _counts(by_class: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, int]]:
    positives = {name: [row for row in rows if _positive(row)] for name, rows in by_class.items()}
    return {
        "num_positive": {name: len(rows) for name, rows in positives.items()},
        "num_missed": {
            name: sum(row["volume_predicted_ml"] == 0 for row in rows)
            for name, rows in positives.items()
        },
    }


def _positive(row: Row) -> bool:
    return row["volume_truth_ml"] > 0


def _negatives(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not _positive(row)]


def _table(
    by_class: Mapping[str, Sequence[Row]], statistic: Callable[[np.ndarray], float | None]
) -> dict[str, dict[str, float | None]]:
    """``statistic`` of the defined values of every class and metric."""
    return {
        name: {metric: statistic(_defined(rows, metric)) for metric in METRICS}
        for name, rows in by_class.items()
    }


def _patients(rows: Sequence[Row], metric: str) -> set[str]:
    return {row["patient_id"] for row in rows if row[metric] is not None}


def _intervals(rows: Sequence[Row]) -> dict[str, list[float] | None]:
    """Bootstrap interval of every metric's mean."""
    intervals: dict[str, list[float] | None] = {}
    for metric in METRICS:
        values = _defined(rows, metric)
        patients = [row["patient_id"] for row in rows if row[metric] is not None]
        interval = statistics.bootstrap_interval(values, patients) if patients else None
        intervals[metric] = None if interval is None else list(interval)
    return intervals


def _defined(rows: Sequence[Row], metric: str) -> np.ndarray:
    return np.array([row[metric] for row in rows if row[metric] is not None], np.float64)


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if values.size else None


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if values.size else None


def _sample_sd(values: np.ndarray) -> float | None:
    return float(np.std(values, ddof=1)) if values.size > 1 else None


def _false_positives(negatives: Sequence[Row]) -> dict[str, float | int | None]:
    volumes = _defined(negatives, "false_positive_volume_ml")
    return {
        "num_cases": int((volumes > 0).sum()),
        "mean_ml": _mean(volumes),
        "median_ml": _median(volumes),
        "sd_ml": _sample_sd(volumes),
        "max_ml": float(volumes.max()) if volumes.size else None,
    }


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as a small text table: one line per class and metric."""
    lines = [
        f"{'class':<10} {'metric':<26} {'mean':>9} {'95 % interval':>19} {'sd':>9} {'median':>9} "
        f"{'cases':>6}",
        *(
            f"{name:<10} {metric:<26} {_number(summary['mean'][name][metric]):>9} "
            f"{_interval(summary['interval'][name][metric]):>19} "
            f"{_number(summary['sd'][name][metric]):>9} "
            f"{_number(summary['median'][name][metric]):>9} "
            f"{summary['num_defined'][name][metric]:>6}"
            for name in summary["mean"]
            for metric in METRICS
        ),
    ]
    for name in summary["mean"]:
        false = summary["false_positives_on_negatives"][name]
        lines.append(
            f"{name}: {summary['num_positive'][name]} of {summary['num_cases']} cases positive, "
            f"{summary['num_missed'][name]} missed; false positives on {false['num_cases']} of "
            f"{summary['num_negatives'][name]} negatives. Means leave undefined values out."
        )
        if (num := summary["num_patients"][name]["dice"]) < statistics.FEW_PATIENTS:
            lines.append(f"{name}: {statistics.few_patients_warning(num)}")
    if detection := summary.get("detection"):
        lines.append(
            f"lesions: AP {_number(detection['average_precision'])}, AUROC of cases "
            f"{_number(detection['auroc'])}, PI-CAI score {_number(detection['picai_score'])}; "
            "sensitivity "
            + ", ".join(
                f"{_number(value)} at {rate}" for rate, value in detection["sensitivity_at"].items()
            )
            + " false positives per case"
        )
    return "\n".join(lines)


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
