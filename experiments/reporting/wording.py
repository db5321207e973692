"""How the report says things: labels of classes and curves, numbers as text, tables, drawings."""

import dataclasses
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from experiments.measuring.masks import Metric
from experiments.measuring.rows import Ends

CURVE_LABELS = {
    "loss": "Loss, total",
    "cross_entropy_loss": "Cross-entropy loss",
    "cross_modal_distillation_loss": "Cross-modal distillation loss",
    "self_distillation_loss": "Self-distillation loss",
    "label_distillation_loss": "Distillation loss, label",
    "fused_distillation_loss": "Distillation loss, fused feature",
    "average_distillation_loss": "Distillation loss, averaged network",
    "output_distillation_loss": "Distillation loss, output of the averaged network",
    "map_distance": "Distance between the distilled maps of two cases",
    "examples_per_s": "Training examples per second",
    "validation_dice": "Validation Dice (reference grid)",
}
CLASS_LABELS = {"pz": "peripheral zone", "tz": "transition zone"}
UNDEFINED = "\u2013"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row, the others are right-aligned figures.

    ``facts`` of the rows, if any, are for the page's scripts: what to open on a click.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    facts: Sequence[Mapping[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Drawing:
    """An SVG with the words that belong to it."""

    title: str
    svg: Markup


def number(value: float | None, metric: Metric | None = None) -> str:
    """A value of a metric, or a share with three decimals."""
    if value is None:
        return UNDEFINED
    return f"{value:.3f}" if metric is None else metric.text(value)


def interval(ends: Ends | None, metric: Metric | None = None) -> str:
    """Both ends of an interval, or that there is none."""
    if ends is None:
        return UNDEFINED
    return f"{number(ends[0], metric)} to {number(ends[1], metric)}"


def volume(value: float | None) -> str:
    """Millilitres."""
    return UNDEFINED if value is None else f"{value:.2f} ml"


def text(value: object) -> str:
    """Any value from a configuration or a record."""
    if value is None:
        return UNDEFINED
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(text(item) for item in value)
    return str(value)


def duration(seconds: float) -> str:
    """Seconds in the unit that reads well."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def fold_name(fold: int, names: Sequence[str]) -> str:
    """Number of a fold, with the group that it leaves out where folds have names."""
    return f"{fold} ({names[fold]})" if fold < len(names) else str(fold)


def class_label(name: str) -> str:
    """A class in words."""
    return CLASS_LABELS.get(name, name)


def curve_label(name: str) -> str:
    """A training curve or record in words."""
    return CURVE_LABELS.get(name, name.replace("_", " ").capitalize())
