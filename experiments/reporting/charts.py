"""Charts of the report: matplotlib, as inline SVG that takes the page's text colour."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.measuring.detection import DetectionSummary, Reliability
from experiments.measuring.rows import Row
from experiments.measuring.summary import Summary
from experiments.reporting.wording import Drawing, class_label, curve_label
from experiments.run_folder import RunFolder

FOLD_COLORS = ("#3f8fd2", "#e07b2e", "#2fa36b", "#b565c9", "#c79a1b", "#d9546a", "#2ba6a6")
MAX_CURVE_POINTS = 300

_LINE = FOLD_COLORS[0]
_FOREGROUND = "#0a0b0c"  # replaced by CSS's currentColor in charts, for light and dark pages


class Curve(NamedTuple):
    """A column of a history: where it has a value, and which, float64."""

    steps: np.ndarray
    values: np.ndarray


History = dict[int, dict[str, Curve]]
"""``history[fold][column]``."""


def read_history(run: RunFolder) -> History:
    """Training curves of the folds that have any."""
    history: History = {}
    for number, folder in run.begun():
        if not folder.history.is_file():
            continue
        with folder.history.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        columns = [name for name in (rows[0] if rows else ()) if name and name != "step"]
        history[number] = {
            name: Curve(
                steps=np.array([float(row["step"]) for row in rows if row[name]]),
                values=np.array([float(row[name]) for row in rows if row[name]]),
            )
            for name in columns
        }
    return history


def curve_names(history: History) -> tuple[list[str], list[str]]:
    """Columns to plot (total loss, its terms, validation, the rest), and loss terms never used."""

    def rank(name: str) -> int:
        kinds = (name == "loss", name.endswith("_loss"), name.startswith("validation_"), True)
        return kinds.index(True)

    names = list(dict.fromkeys(name for columns in history.values() for name in columns))
    plotted, unused = [], []
    for name in sorted(names, key=rank):
        values = np.concatenate(
            [columns[name].values for columns in history.values() if name in columns]
        )
        if values.any():
            plotted.append(name)
        elif values.size and name.endswith("_loss"):
            unused.append(name)
    return plotted, unused


def fold_color(fold: int | None) -> str:
    """Colour of a fold in every chart."""
    return FOLD_COLORS[(fold or 0) % len(FOLD_COLORS)]


def chart(
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


def result_charts(summary: Summary, name: str, identity: str) -> list[Drawing]:
    """Dice of a class by fold and against the volume; none without a positive case."""
    rows = [row for row in summary.metric_per_case if row.name == name and row.dice is not None]
    if not rows:
        return []
    label = class_label(name)
    folds = [entry.fold for entry in summary.per_fold]

    def strip(axes: Axes) -> None:
        _draw_strip(axes, rows, folds or [None])
        axes.set_ylabel(f"Dice, {label}")

    def scatter(axes: Axes) -> None:
        for fold in folds or [None]:
            members = [row for row in rows if row.fold == fold]
            axes.scatter(
                [row.volume_truth_ml for row in members],
                [row.dice for row in members if row.dice is not None],
                s=26,
                color=fold_color(fold),
                alpha=0.85,
                linewidths=0,
            )
        volumes = [row.volume_truth_ml for row in rows]
        if max(volumes) > 5 * min(volumes):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        axes.set_xlabel(f"True {label} volume (ml)")
        axes.set_ylabel(f"Dice, {label}")
        axes.set_ylim(-0.03, 1.03)

    return [
        chart(f"Dice per fold, {label}", f"{identity}a", strip, (5.2, 3.2)),
        chart(f"Dice against volume, {label}", f"{identity}b", scatter, (5.2, 3.2)),
    ]


def _draw_strip(axes: Axes, rows: Sequence[Row], folds: Sequence[int | None]) -> None:
    """Each case a dot, box = quartiles and median (from five cases), bar = mean of the fold."""
    for place, fold in enumerate(folds):
        dice = np.array([row.dice for row in rows if row.fold == fold], np.float64)
        if not dice.size:
            axes.text(place, 0.5, "no positive\ncase", ha="center", va="center", fontsize=9)
            continue
        if dice.size >= 5:
            line = {"color": fold_color(fold), "alpha": 0.55}
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
        axes.scatter(place + spread, dice, s=24, color=fold_color(fold), alpha=0.85, linewidths=0)
        axes.hlines(dice.mean(), place - 0.38, place + 0.38, color=_FOREGROUND, linewidth=2)
    names = ["all" if fold is None else str(fold) for fold in folds]
    axes.set_xticks(range(len(folds)), names)
    axes.set_xlim(-0.6, len(folds) - 0.4)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("Fold")


def curve_chart(history: History, name: str, identity: str) -> Drawing:
    """A column of the history, one line for each fold."""

    def draw(axes: Axes) -> None:
        for fold, columns in history.items():
            if name not in columns or not columns[name].values.size:
                continue
            step, value = map(_binned, columns[name])
            smooth = smoothed(value)
            marker = "o" if value.size <= 20 else None
            if smooth is not value:
                axes.plot(step, value, color=fold_color(fold), linewidth=0.8, alpha=0.3)
            axes.plot(
                step, smooth, color=fold_color(fold), linewidth=1.6, marker=marker, markersize=4
            )
        axes.set_xlabel("Training step")
        axes.set_ylabel(curve_label(name).removesuffix(" (reference grid)"))
        if name.startswith("validation_"):
            axes.set_ylim(-0.03, 1.03)
        elif name != "learning_rate":
            axes.margins(y=0.08)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)

    return chart(curve_label(name), identity, draw)


SMOOTHING = 0.06
"""Width of the running mean of a curve, as a share of its length."""


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over ``SMOOTHING`` of the values, narrower at the ends; short curves as is."""
    half = round(values.size * SMOOTHING / 2)
    if not half or values.size <= 20:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(values.size)
    reach = np.minimum(half, np.minimum(place, values.size - 1 - place))
    return (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)


def _binned(values: np.ndarray) -> np.ndarray:
    """At most ``MAX_CURVE_POINTS`` means of consecutive values."""
    size = -(-values.size // MAX_CURVE_POINTS)
    starts = np.arange(0, values.size, max(size, 1))
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, values.size))


def detection_charts(detection: DetectionSummary) -> list[Drawing]:
    """FROC, ROC and reliability, as far as there are lesions or both kinds of cases."""
    charts = []
    froc, roc = detection.froc, detection.roc
    if froc is not None:

        def draw_froc(axes: Axes) -> None:
            rate, sensitivity = froc.false_positives_per_case, froc.sensitivity
            last = max(2.0, rate[-1])
            axes.step([*rate, last], [*sensitivity, sensitivity[-1]], where="post", color=_LINE)
            at = {float(x): y for x, y in detection.sensitivity_at.items() if y is not None}
            axes.plot(list(at), list(at.values()), "o", color=_LINE)
            axes.set_xlabel("False positives per case")
            axes.set_ylabel("Lesion sensitivity")
            axes.set_ylim(-0.03, 1.03)

        charts.append(chart("FROC of lesions", "d0", draw_froc))
    if roc is not None:

        def draw_roc(axes: Axes) -> None:
            axes.plot([0, 1], [0, 1], color=_FOREGROUND, alpha=0.4, linewidth=1, linestyle="--")
            axes.plot(roc.false_positive_rate, roc.true_positive_rate, color=_LINE)
            axes.set_xlabel("False-positive rate of cases")
            axes.set_ylabel("True-positive rate")
            axes.set_ylim(-0.03, 1.03)

        charts.append(chart("ROC of cases", "d1", draw_roc))
    charts.append(_reliability_chart("voxels", detection.calibration.voxels, "d2"))
    charts.append(_reliability_chart("cases", detection.calibration.cases, "d3"))
    return charts


def _reliability_chart(kind: str, reliability: Reliability, identity: str) -> Drawing:
    bins = [
        point
        for point in zip(
            reliability.mean_probability,
            reliability.frequency,
            reliability.count,
            strict=True,
        )
        if point[2]
    ]

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_FOREGROUND, alpha=0.4, linewidth=1, linestyle="--")
        probability, frequency, count = np.array(bins).T
        size = 12 + 60 * np.log1p(count) / np.log1p(count.max())
        axes.plot(probability, frequency, color=_LINE, linewidth=1.2)
        axes.scatter(probability, frequency, s=size, color=_LINE, linewidths=0)
        axes.set_xlabel("Mean probability of the bin")
        axes.set_ylabel("Frequency of lesion")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)

    return chart(f"Calibration of {kind}", identity, draw)
