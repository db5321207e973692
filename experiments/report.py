"""The report of a run folder: ``report.html``, one file that needs nothing else, and ``report.md``.

``python -m experiments.report RUN`` writes both anew from what the folder holds: the results, the
training curves and pictures of cases. Both hold the same facts; charts and pictures are in the
HTML alone. A run with some folds missing is reported as such.
"""

import base64
import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.image
import numpy as np
import tyro
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.evaluate import METRICS, Row, read_metrics, write_text
from experiments.runtime import run_main

LABELS = {
    "dice": "Dice",
    "sensitivity": "Sensitivity",
    "precision": "Precision",
    "hd95_mm": "HD95 (mm)",
    "assd_mm": "ASSD (mm)",
    "false_positive_volume_ml": "False-positive volume (ml)",
    "volume_truth_ml": "True volume (ml)",
    "volume_predicted_ml": "Predicted volume (ml)",
}
SHORT_LABELS = LABELS | {
    "false_positive_volume_ml": "False pos. (ml)",
    "volume_truth_ml": "Truth (ml)",
    "volume_predicted_ml": "Predicted (ml)",
}
CURVE_LABELS = {
    "loss": "Loss, total",
    "cross_entropy_loss": "Cross-entropy loss",
    "cross_modal_distillation_loss": "Cross-modal distillation loss",
    "self_distillation_loss": "Self-distillation loss",
    "examples_per_s": "Training examples per second",
    "validation_dice": "Validation Dice (reference grid)",
}
CLASS_LABELS = {"pz": "peripheral zone", "tz": "transition zone"}
CHECKPOINT_LABELS = {
    "last": "last training step",
    "ema": "moving average (EMA) of the weights, last training step",
}
DEFINITIONS = (
    (
        "Undefined Dice",
        "A case without foreground has no Dice: it is shown as \u2013 and never averaged in, "
        "neither as 0 nor as 1. Sensitivity, precision and surface distances are of positive cases "
        "too; negative cases are judged by their false-positive volume. The column Cases holds the "
        "number of cases for which a metric is defined; every mean is over these alone.",
    ),
    (
        "Missed cases",
        "A positive case with an empty prediction has Dice and sensitivity 0, but no precision, "
        "HD95 or ASSD. These means therefore leave it out; the missed cases are counted above.",
    ),
    (
        "Spread",
        "Standard deviations (n - 1) over cases, and over the means of the folds. Neither is a "
        "standard error or a confidence interval.",
    ),
    (
        "Frame",
        "Every metric is measured on the original T2W grid, after resampling and cropping were "
        "undone.",
    ),
    (
        "Surface distances",
        "Convention of the package surface-distance: surfaces through voxel corners, elements "
        "weighted by area. HD95 is the larger of the two directed 95th percentiles, ASSD the mean "
        "of the two directed average distances. MONAI and MedPy give other values.",
    ),
    (
        "False-positive volume",
        "Predicted volume outside the truth; on negative cases all that is predicted.",
    ),
)
UNDEFINED = "\u2013"
FOLD_COLORS = ("#3f8fd2", "#e07b2e", "#2fa36b", "#b565c9", "#c79a1b", "#d9546a", "#2ba6a6")
MAX_CURVE_POINTS = 300

_FOREGROUND = "#0a0b0c"  # replaced by CSS's currentColor in charts, for light and dark pages


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row, the others are right-aligned figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """An SVG with the words that belong to it."""

    title: str
    svg: Markup


@dataclasses.dataclass(frozen=True)
class Picture:
    """The slice of one case that is shown, panel by panel."""

    title: str
    caption: str
    columns: int
    panels: Sequence[Drawing]


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and ``report.md`` of a run folder; returns the HTML's path.

    ``metrics.json`` must be there; any other file may be missing, and the report then says so or
    leaves its section out.

    Raises:
        MissingDataError: the folder holds no ``metrics.json``.
    """
    run_dir = Path(run_dir)
    facts = _facts(run_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and ".html" in name),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = _markdown
    for name in ("report.md", "report.html"):
        write_text(run_dir / name, environment.get_template(f"{name}.j2").render(facts))
    return run_dir / "report.html"


def _markdown(table: Table) -> str:
    """The table in GitHub's Markdown, under a heading."""
    lines = [
        table.columns,
        ["---", *["---:"] * (len(table.columns) - 1)],
        *table.rows,
    ]
    cells = ((cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines)
    body = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"## {table.title}\n\n{body}\n"


def _facts(run_dir: Path) -> dict[str, Any]:
    """Everything the two templates show."""
    metrics = read_metrics(run_dir)
    classes = metrics.get("classes") or list(metrics["mean"])
    target = metrics.get("target", classes[0])
    folds = _read_json(run_dir / "folds.json")
    fold_list = folds["folds"] if isinstance(folds, dict) else folds
    done = [entry["fold"] for entry in metrics["per_fold"]]
    num_folds = len(fold_list) or metrics.get("num_folds", len(done))
    history = _read_history(run_dir)
    curves, unused = _curve_names(history)
    environment = _read_json(run_dir / "environment.json")
    config = _read_json(run_dir / "config.json")
    return {
        "title": f"Cross-validation: {target} segmentation",
        "run": run_dir.resolve().name,
        "target": target,
        "started": environment.get("started"),
        "device": environment.get("device"),
        "checkpoint": CHECKPOINT_LABELS.get(
            metrics.get("checkpoint", ""), metrics.get("checkpoint", "not recorded")
        ),
        "rule": "the largest of the class probabilities"
        if len(classes) > 1
        else f"probability above {metrics.get('threshold', 'not recorded')}",
        "status": _status(done, num_folds),
        "complete": len(done) == num_folds,
        "warnings": _warnings(metrics, classes),
        "tiles": _tiles(metrics, classes),
        "headline": [_headline_table(metrics, name) for name in classes],
        "counts": _count_table(metrics, classes),
        "definitions": DEFINITIONS,
        "beside": _beside_table(metrics, classes),
        "best": _best_table(metrics),
        "per_fold": _fold_table(metrics, classes, num_folds),
        "fold_colors": [(fold, _color(fold)) for fold in (done or sorted(history))],
        "result_charts": [
            chart
            for index, name in enumerate(classes)
            for chart in _result_charts(metrics, name, f"r{index}")
        ],
        "curve_charts": [
            _curve_chart(history, name, f"t{index}") for index, name in enumerate(curves)
        ],
        "curve_table": _curve_table(history, curves),
        "unused_terms": [_curve_label(name) for name in unused],
        "pictures": _pictures(run_dir, metrics, classes),
        "per_case": _case_table(metrics),
        "timing": _timing_table(metrics, environment),
        "folds_table": _folds_table(fold_list),
        "folds_sha256": folds.get("sha256") if isinstance(folds, dict) else None,
        "config": _flat_table("Configuration", config.get("config", config)),
        "data_fingerprint": config.get("data_fingerprint"),
        "environment": _flat_table(
            "Environment", {key: value for key, value in environment.items() if key != "wall_s"}
        ),
    }


# Facts as texts ---------------------------------------------------------------------------------


def _status(done: Sequence[int], num_folds: int) -> str:
    if not num_folds:
        return "Evaluated without folds."
    missing = [fold for fold in range(num_folds) if fold not in done]
    if not missing:
        return f"All {num_folds} folds are done."
    return (
        f"Incomplete: {len(done)} of {num_folds} folds are done; missing: "
        f"{', '.join(f'fold {fold}' for fold in missing)}. "
        "Every figure below is of the folds that are done."
    )


def _warnings(metrics: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    warnings = [
        f"No evaluated case holds any {_class_label(name)}: Dice, sensitivity, precision and "
        "surface distances are undefined. Only false positives can be judged."
        for name in classes
        if not metrics["num_positive"][name]
    ]
    without = metrics["folds_without_positives"]
    if without and any(metrics["num_positive"].values()):
        listed = ", ".join(f"fold {fold}" for fold in without)
        warnings.append(f"No positive case in {listed}: Dice is undefined there.")
    return warnings


def _tiles(metrics: Mapping[str, Any], classes: Sequence[str]) -> list[dict[str, str]]:
    """The few figures that stand at the top, each with what it rests on."""
    tiles = []
    for name in classes:
        num = metrics["num_defined"][name]["dice"]
        tiles.append(
            {
                "label": f"Mean {_class_label(name)} Dice",
                "value": _number(metrics["mean"][name]["dice"], "dice"),
                "note": f"sd {_number(metrics['sd'][name]['dice'], 'dice')} over "
                f"{_plural(num, 'positive case')}"
                if num
                else "undefined: no positive case",
            }
        )
    name = classes[0]
    if len(classes) == 1:
        if metrics["num_positive"][name]:
            tiles.append(
                {
                    "label": "Missed",
                    "value": f"{metrics['num_missed'][name]} of {metrics['num_positive'][name]}",
                    "note": "positive cases with an empty prediction",
                }
            )
        if metrics["num_negatives"][name]:
            false = metrics["false_positives_on_negatives"][name]
            tiles.append(
                {
                    "label": "False positives",
                    "value": f"{false['num_cases']} of {metrics['num_negatives'][name]}",
                    "note": f"negative cases, {_volume(false['mean_ml'])} on average",
                }
            )
    return tiles


def _headline_table(metrics: Mapping[str, Any], name: str) -> Table:
    return Table(
        f"{_class_label(name).capitalize()}: over cases and folds",
        ("Metric", "Mean", "SD over cases", "SD of fold means", "Median", "Cases"),
        [
            (
                LABELS[metric],
                *(
                    _number(metrics[key][name][metric], metric)
                    for key in ("mean", "sd", "sd_of_fold_means", "median")
                ),
                str(metrics["num_defined"][name][metric]),
            )
            for metric in METRICS
        ],
    )


def _count_table(metrics: Mapping[str, Any], classes: Sequence[str]) -> Table:
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
            lambda c: _volume(metrics["false_positives_on_negatives"][c]["mean_ml"]),
        ),
        (
            "False-positive volume on negative cases, largest",
            lambda c: _volume(metrics["false_positives_on_negatives"][c]["max_ml"]),
        ),
    ]
    return Table(
        "Counts",
        ("", *(_class_label(name).capitalize() for name in classes)),
        [(title, *(value(name) for name in classes)) for title, value in rows],
    )


def _beside_table(metrics: Mapping[str, Any], classes: Sequence[str]) -> Table | None:
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
            ("This run", _number(float(np.mean(known)) if known else None, "dice")),
            (
                "Mean shape of the training cases, same for every image",
                _number(baseline.get("mean_dice"), "dice"),
            ),
        ],
    )


def _best_table(metrics: Mapping[str, Any]) -> Table | None:
    """Checkpoints chosen on the validation fold, one row per fold, or what the key holds."""
    best = metrics.get("best_checkpoint")
    if not best:
        return None
    if all(isinstance(entry, Mapping) for entry in best.values()):
        columns = list(dict.fromkeys(key for entry in best.values() for key in entry))
        rows = [
            (f"Fold {fold}", *(_value(entry.get(key)) for key in columns))
            for fold, entry in best.items()
        ]
        return Table("Best checkpoints", ("", *(_curve_label(key) for key in columns)), rows)
    return _flat_table("Best checkpoints", best)


def _fold_table(metrics: Mapping[str, Any], classes: Sequence[str], num_folds: int) -> Table:
    shown = ("dice", "sensitivity", "precision", "hd95_mm", "assd_mm", "false_positive_volume_ml")
    entries = {entry["fold"]: entry for entry in metrics["per_fold"]}
    several = len(classes) > 1
    rows = []
    for fold in range(max([num_folds, *(fold + 1 for fold in entries)])):
        for name in classes:
            title = f"Fold {fold}, {name}" if several else f"Fold {fold}"
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
                    *(_number(entry["mean"][name][metric], metric) for metric in shown),
                )
            )
    columns = ("Fold", "Cases", "Positive", "Missed", *(SHORT_LABELS[metric] for metric in shown))
    return Table("Means per fold", columns, rows)


def _case_table(metrics: Mapping[str, Any]) -> Table:
    several = len(metrics["mean"]) > 1
    return Table(
        "Every case",
        ("Case", *(("Class",) if several else ()), "Fold", *(SHORT_LABELS[m] for m in METRICS)),
        [
            (
                row["case_id"],
                *((row["class"],) if several else ()),
                _value(row["fold"]),
                *(_number(row[metric], metric) for metric in METRICS),
            )
            for row in metrics["metric_per_case"]
        ],
    )


def _timing_table(metrics: Mapping[str, Any], environment: Mapping[str, Any]) -> Table | None:
    """Seconds per phase of the run, and speed per fold, as far as they were recorded."""
    rows = [
        (_curve_label(phase), _duration(seconds))
        for phase, seconds in _flatten(environment.get("wall_s") or {})
    ]
    for fold, summary in (metrics.get("fold_summaries") or {}).items():
        for key, label in (
            ("first_step_s", "first step, with compilation"),
            ("train_s", "training"),
            ("predict_s", "prediction"),
        ):
            if key in summary:
                rows.append((f"Fold {fold}: {label}", _duration(summary[key])))
        if "examples_per_s" in summary:
            rows.append((f"Fold {fold}: examples per second", _value(summary["examples_per_s"])))
    return Table("Time", ("Phase", "Time"), rows) if rows else None


def _folds_table(folds: Sequence[Mapping[str, Sequence[str]]]) -> Table | None:
    if not folds:
        return None
    return Table(
        "Folds",
        ("Fold", "Training cases", "Validation cases"),
        [
            (f"Fold {index}", str(len(fold["train"])), str(len(fold["val"])))
            for index, fold in enumerate(folds)
        ],
    )


def _curve_table(history: "History", names: Sequence[str]) -> Table | None:
    """The last value of each curve in each fold."""
    if not names:
        return None
    rows = [
        (
            _curve_label(name),
            *(
                _value(_last(columns[name]["value"]) if name in columns else None)
                for columns in history.values()
            ),
        )
        for name in names
    ]
    return Table("At the end of training", ("", *(f"Fold {fold}" for fold in history)), rows)


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if values.size else None


def _flat_table(title: str, nested: Mapping[str, Any]) -> Table:
    return Table(title, ("Name", "Value"), [(name, _value(v)) for name, v in _flatten(nested)])


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in nested.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return UNDEFINED
    return f"{value:.2f}" if metric.endswith(("_mm", "_ml")) else f"{value:.3f}"


def _volume(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.2f} ml"


def _value(value: Any) -> str:
    if value is None:
        return UNDEFINED
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(_value(item) for item in value)
    return str(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _class_label(name: str) -> str:
    return CLASS_LABELS.get(name, name)


def _curve_label(name: str) -> str:
    return CURVE_LABELS.get(name, name.replace("_", " ").capitalize())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# Charts -----------------------------------------------------------------------------------------

History = dict[int, dict[str, dict[str, np.ndarray]]]
"""``history[fold][column]["step" or "value"]``: float64, empty cells left out."""


def _read_history(run_dir: Path) -> History:
    history: History = {}
    for file in run_dir.glob("fold_*/history.csv"):
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        columns = [name for name in (rows[0] if rows else ()) if name and name != "step"]
        history[int(file.parent.name.removeprefix("fold_"))] = {
            name: {
                "step": np.array([float(row["step"]) for row in rows if row[name]]),
                "value": np.array([float(row[name]) for row in rows if row[name]]),
            }
            for name in columns
        }
    return dict(sorted(history.items()))


def _curve_names(history: History) -> tuple[list[str], list[str]]:
    """Columns to plot (total loss, its terms, validation, the rest), and loss terms never used."""

    def rank(name: str) -> int:
        kinds = (name == "loss", name.endswith("_loss"), name.startswith("validation_"), True)
        return kinds.index(True)

    names = list(dict.fromkeys(name for columns in history.values() for name in columns))
    plotted, unused = [], []
    for name in sorted(names, key=rank):
        values = np.concatenate(
            [columns[name]["value"] for columns in history.values() if name in columns]
        )
        if values.any():
            plotted.append(name)
        elif values.size and name.endswith("_loss"):
            unused.append(name)
    return plotted, unused


def _color(fold: int | None) -> str:
    return FOLD_COLORS[(fold or 0) % len(FOLD_COLORS)]


def _chart(
    title: str, identity: str, draw: Callable[[Axes], None], size: tuple[float, float] = (4.3, 2.9)
) -> Drawing:
    """One chart as inline SVG whose text and axes take the page's text colour."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": identity,
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.15,
        "grid.linewidth": 0.8,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
            _FOREGROUND,
        ),
        "grid.color": _FOREGROUND,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{identity}-", svg)
    svg = svg.replace(_FOREGROUND, "currentColor")
    label = Markup.escape(title)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return Drawing(title, Markup(svg))


def _result_charts(metrics: Mapping[str, Any], name: str, identity: str) -> list[Drawing]:
    rows = [
        row
        for row in metrics["metric_per_case"]
        if row["class"] == name and row["dice"] is not None
    ]
    if not rows:
        return []
    label = _class_label(name)
    folds = [entry["fold"] for entry in metrics["per_fold"]]

    def strip(axes: Axes) -> None:
        _draw_strip(axes, rows, folds or [None])
        axes.set_ylabel(f"Dice, {label}")

    def scatter(axes: Axes) -> None:
        for fold in folds or [None]:
            members = [row for row in rows if row["fold"] == fold]
            axes.scatter(
                [row["volume_truth_ml"] for row in members],
                [row["dice"] for row in members],
                s=26,
                color=_color(fold),
                alpha=0.85,
                linewidths=0,
            )
        volumes = [row["volume_truth_ml"] for row in rows]
        if max(volumes) > 5 * min(volumes):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        axes.set_xlabel(f"True {label} volume (ml)")
        axes.set_ylabel(f"Dice, {label}")
        axes.set_ylim(-0.03, 1.03)

    return [
        _chart(f"Dice per fold, {label}", f"{identity}a", strip, (5.2, 3.2)),
        _chart(f"Dice against volume, {label}", f"{identity}b", scatter, (5.2, 3.2)),
    ]


def _draw_strip(axes: Axes, rows: Sequence[Row], folds: Sequence[int | None]) -> None:
    """Each case a dot, box = quartiles and median (from five cases), bar = mean of the fold."""
    for place, fold in enumerate(folds):
        dice = np.array([row["dice"] for row in rows if row["fold"] == fold])
        if not dice.size:
            axes.text(place, 0.5, "no positive\ncase", ha="center", va="center", fontsize=9)
            continue
        if dice.size >= 5:
            line = {"color": _color(fold), "alpha": 0.55}
            axes.boxplot(
                dice,
                positions=[place],
                widths=0.62,
                showfliers=False,
                boxprops=line,
                whiskerprops=line,
                capprops=line,
                medianprops=line,
            )
        spread = (np.arange(dice.size) * 0.618034 % 1 - 0.5) * (0.4 if dice.size > 1 else 0)
        axes.scatter(place + spread, dice, s=24, color=_color(fold), alpha=0.85, linewidths=0)
        axes.hlines(dice.mean(), place - 0.38, place + 0.38, color=_FOREGROUND, linewidth=2)
    axes.set_xticks(range(len(folds)), ["all" if fold is None else str(fold) for fold in folds])
    axes.set_xlim(-0.6, len(folds) - 0.4)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("Fold")


def _curve_chart(history: History, name: str, identity: str) -> Drawing:
    def draw(axes: Axes) -> None:
        for fold, columns in history.items():
            if name not in columns or not columns[name]["value"].size:
                continue
            step, value = (_binned(columns[name][key]) for key in ("step", "value"))
            marker = "o" if value.size <= 20 else None
            axes.plot(step, value, color=_color(fold), linewidth=1.6, marker=marker, markersize=4)
        axes.set_xlabel("Training step")
        axes.set_ylabel(_curve_label(name).removesuffix(" (reference grid)"))
        if name.startswith("validation_"):
            axes.set_ylim(-0.03, 1.03)
        elif name != "learning_rate":
            axes.margins(y=0.08)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)

    return _chart(_curve_label(name), identity, draw)


def _binned(values: np.ndarray) -> np.ndarray:
    """At most ``MAX_CURVE_POINTS`` means of consecutive values."""
    size = -(-values.size // MAX_CURVE_POINTS)
    starts = np.arange(0, values.size, max(size, 1))
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, values.size))


# Pictures of cases ------------------------------------------------------------------------------


def _pictures(run_dir: Path, metrics: Mapping[str, Any], classes: Sequence[str]) -> list[Picture]:
    files = {file.stem: file for file in run_dir.glob("fold_*/figures/*.npz")}
    rows: dict[str, list[Row]] = {}
    for row in metrics["metric_per_case"]:
        rows.setdefault(row["case_id"], []).append(row)
    return [
        _picture(files[case], f"{role}: {case}", rows[case], classes, metrics)
        for case, role in choose_cases(rows, files.keys() & rows.keys()).items()
    ]


def choose_cases(rows: Mapping[str, Sequence[Row]], pictured: Collection[str]) -> dict[str, str]:
    """Which pictured cases to show, and why: best, median, worst, and a negative one.

    Best, median and worst are by Dice (its mean over the classes that a case holds); the role
    says so if a case that was not pictured would be the better choice. The negative case is the
    pictured one with most false-positive volume.
    """
    dice = {case: _case_dice(members) for case, members in sorted(rows.items())}
    positives = {case: score for case, score in dice.items() if score is not None}
    shown = {case: score for case, score in positives.items() if case in pictured}
    negatives = [case for case in dice if case in pictured and case not in positives]
    chosen: dict[str, str] = {}
    if shown:
        ordered = np.sort(list(positives.values()))
        wanted = {"Best": ordered[-1], "Worst": ordered[0], "Median": ordered[len(ordered) // 2]}
        for role, score in wanted.items():
            case = min(shown, key=lambda case, score=score: abs(shown[case] - score))
            exact = shown[case] == score
            chosen.setdefault(case, role if exact else f"{role} of the cases pictured")
        chosen = dict(sorted(chosen.items(), key=lambda item: -shown[item[0]]))
    if negatives:
        worst = max(
            negatives, key=lambda case: sum(row["volume_predicted_ml"] for row in rows[case])
        )
        chosen[worst] = "Negative, most false positives of the cases pictured"
    return chosen


def _case_dice(rows: Sequence[Row]) -> float | None:
    """Mean over the classes that the case holds."""
    dice = [row["dice"] for row in rows if row["dice"] is not None]
    return float(np.mean(dice)) if dice else None


def _picture(
    file: Path,
    title: str,
    rows: Sequence[Row],
    classes: Sequence[str],
    metrics: Mapping[str, Any],
) -> Picture:
    with np.load(file) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    truth = data["truth"]
    foreground, mask = _foreground(data["probability"], len(classes), metrics.get("threshold", 0.5))
    index = slice_to_show(truth, mask, foreground)
    spacing = data["spacing_mm"][1:]
    outlines = [
        *_outlines(truth[index], "truth", len(classes)),
        *_outlines(mask[index], "prediction", len(classes)),
    ]
    modalities = [str(name) for name in data["modalities"]]
    panels = [
        _panel(name.upper(), _grey(data["image"][index, ..., m]), spacing, outlines)
        for m, name in enumerate(modalities)
    ]
    panels.append(
        _panel("Probability", _colored(foreground[index], "magma", 1.0), spacing, outlines)
    )
    if "attention" in data:
        truth_only = _outlines(truth[index], "truth", len(classes))
        for m, name in enumerate(modalities):
            attention = data["attention"][index, ..., m].astype(np.float32)
            image = _colored(attention, "viridis", float(attention.max()))
            panels.append(_panel(f"Attention {name.upper()}", image, spacing, truth_only))
    scores = ", ".join(
        f"{_class_label(row['class'])} Dice {_number(row['dice'], 'dice')}"
        if row["dice"] is not None
        else f"no {_class_label(row['class'])}, {_volume(row['volume_predicted_ml'])} predicted"
        for row in rows
    )
    fold = rows[0]["fold"]
    caption = (
        f"{scores}; {'' if fold is None else f'fold {fold}, '}slice {index + 1} of {len(truth)}"
    )
    return Picture(title, caption, len(modalities) + 1, panels)


def _foreground(
    probability: np.ndarray, num_classes: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Probability of any foreground and the predicted classes, both ``d h w``.

    ``probability`` is ``d h w``, ``d h w 1``, or ``d h w k`` with background first.
    """
    probability = probability.astype(np.float32)
    if num_classes > 1:
        return 1 - probability[..., 0], probability.argmax(-1)
    if probability.ndim == 4:
        probability = probability[..., 0]
    return probability, (probability > threshold).astype(np.uint8)


def slice_to_show(truth: np.ndarray, mask: np.ndarray, probability: np.ndarray) -> int:
    """Slice with most truth, else with most prediction, else with the largest probability."""
    for volume in (truth > 0, mask > 0):
        if volume.any():
            return int(volume.sum((1, 2)).argmax())
    return int(probability.max((1, 2)).argmax())


def _outlines(labels: np.ndarray, kind: str, num_classes: int) -> list[tuple[str, str]]:
    """SVG path (in voxels) around every class, along the voxel edges."""
    return [
        (kind, path)
        for label in range(1, num_classes + 1)
        if (path := outline(_radiological(labels == label)))
    ]


def outline(mask: np.ndarray) -> str:
    """SVG path along the voxel edges between foreground and background of a bool ``h w``."""
    padded = np.pad(mask, 1).astype(np.int8)
    rows, columns = np.nonzero(np.diff(padded, axis=0)[:, 1:-1])
    path = [f"M{x} {y}h1" for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(np.diff(padded, axis=1)[1:-1])
    return "".join([*path, *(f"M{x} {y}v1" for y, x in zip(rows, columns, strict=True))])


def _radiological(array: np.ndarray) -> np.ndarray:
    """Reference-grid slice (``h`` to anterior, ``w`` to the right) as radiologists look at it.

    Anterior is up, and the patient's right on the left of the picture.
    """
    return array[::-1, ::-1]


def _grey(image: np.ndarray) -> np.ndarray:
    """uint8 ``h w 3`` between the 1st and 99.5th percentile of what is inside the field of view."""
    image = image.astype(np.float32)
    inside = image[image != 0]
    if not inside.size:
        return np.zeros((*image.shape, 3), np.uint8)
    low, high = np.percentile(inside, (1, 99.5))
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat((255 * scaled).astype(np.uint8)[..., None], 3, -1)


def _colored(image: np.ndarray, colormap: str, largest: float) -> np.ndarray:
    """uint8 ``h w 3``: 0 to ``largest`` in a colormap."""
    scaled = np.clip(image / max(largest, 1e-12), 0, 1)
    return (255 * matplotlib.colormaps[colormap](scaled)[..., :3]).astype(np.uint8)


def _panel(
    title: str, image: np.ndarray, spacing_mm: np.ndarray, outlines: Sequence[tuple[str, str]]
) -> Drawing:
    """A slice (``h w 3``) in its physical proportions with outlines on it, as SVG."""
    height, width = image.shape[:2]
    dy, dx = (float(step) for step in spacing_mm)
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.ascontiguousarray(_radiological(image)), format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    paths = "".join(
        f'<path class="{kind}" transform="scale({dx:g} {dy:g})" d="{path}"/>'
        for kind, path in outlines
    )
    size = f"{width * dx:g} {height * dy:g}"
    return Drawing(
        title,
        Markup(
            f'<svg class="panel" role="img" aria-label="{Markup.escape(title)}" '
            f'viewBox="0 0 {size}"><image width="{width * dx:g}" height="{height * dy:g}" '
            f'preserveAspectRatio="none" href="data:image/png;base64,{encoded}"/>{paths}</svg>'
        ),
    )


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write report.html and report.md of a run folder anew."""

    run: tyro.conf.Positional[Path]
    """Run folder of python -m experiments.cv."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    print(write_report(tyro.cli(ReportConfig, args=argv).run))


if __name__ == "__main__":
    run_main(main)
