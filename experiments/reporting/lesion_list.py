"""The lesions of a run one by one, and its false candidates; the worst first.

A candidate is faint if no voxel of it is above the threshold, so that no mask shows it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.measuring.lesions import Place
from experiments.measuring.rows import Match, Row
from experiments.reporting.views import View
from experiments.reporting.wording import UNDEFINED, Table, fold_name, number, volume

KINDS = ("missed", "found, faint", "false", "found", "false, faint")
"""In the order of the list."""


@dataclasses.dataclass(frozen=True)
class Located:
    """Where a lesion is in the viewer: slice, and place in it as ``viewer.js`` counts."""

    slice: int
    x: float
    y: float
    volume_ml: float


def kind_of(match: Match, threshold: float) -> str:
    """One of ``KINDS``."""
    if match.lesion and not match.confidence:
        return "missed"
    kind = "found" if match.lesion else "false"
    return kind if match.confidence > threshold else f"{kind}, faint"


def located(view: View, place: Place) -> Located:
    """A place in the viewer, of one on the view's grid."""
    d, h, w = place.centre
    _, height, width = view.mask.shape
    voxel_ml = float(np.prod(view.spacing_mm)) / 1000
    return Located(round(d), width - w - 0.5, height - h - 0.5, place.num_voxels * voxel_ml)


def lesion_table(
    rows: Sequence[Row],
    places: Mapping[str, Sequence[tuple[Place, Located]]],
    names: Sequence[str],
    threshold: float,
) -> Table | None:
    """Every lesion and every false candidate as measured, with its place where a view has it.

    Args:
        rows: of the cases; None is returned where they tell of no lesions.
        places: of the cases that can be opened, as ``experiments.measuring.lesions.locate`` found.
        names: of the groups that the folds leave out.
        threshold: above which a probability is in the mask.
    """
    if all(row.detection is None for row in rows):
        return None
    entries = []
    for row in rows:
        matches = () if row.detection is None else row.detection.lesions
        there = _paired(matches, places.get(row.case_id, ()))
        entries += [(row, match, at) for match, at in zip(matches, there, strict=True)]
    entries.sort(key=lambda entry: _badness(entry[0], entry[1], entry[2], threshold))
    return Table(
        "Lesions and false candidates",
        ("Case", "Kind", "Confidence", "IoU", "Volume", "Slice", "Fold"),
        [
            (
                row.case_id,
                kind_of(match, threshold),
                number(match.confidence) if match.confidence else UNDEFINED,
                number(match.overlap) if match.confidence and match.lesion else UNDEFINED,
                volume(None if at is None else at.volume_ml),
                UNDEFINED if at is None else str(at.slice + 1),
                UNDEFINED if row.fold is None else fold_name(row.fold, names),
            )
            for row, match, at in entries
        ],
        [
            {"case": row.case_id}
            | (
                {}
                if at is None
                else {"slice": str(at.slice), "x": f"{at.x:.1f}", "y": f"{at.y:.1f}"}
            )
            for row, match, at in entries
        ],
    )


def _badness(
    row: Row, match: Match, at: Located | None, threshold: float
) -> tuple[int, float, float, str]:
    """By kind; then missed ones the largest first, false ones by confidence, found ones by IoU."""
    kind = kind_of(match, threshold)
    size = 0.0 if at is None else at.volume_ml
    by = -size if kind == "missed" else match.overlap if match.lesion else -match.confidence
    return KINDS.index(kind), by, -size, row.case_id


def _paired(
    matches: Sequence[Match], places: Sequence[tuple[Place, Located]]
) -> list[Located | None]:
    """The place of each match: missed, found and false ones in the order of their confidence.

    Both were found in the same probabilities, of which the run's pictures keep half the digits.
    Where they do not agree in number, no place is given.
    """
    found: list[Located | None] = [None] * len(matches)
    for kind in ("missed", "found", "false"):
        these = [i for i, match in enumerate(matches) if kind_of(match, -1) == kind]
        those = [pair for pair in places if kind_of(pair[0].match, -1) == kind]
        if len(these) != len(those):
            continue
        these.sort(key=lambda i: -matches[i].confidence)
        those.sort(key=lambda pair: -pair[0].match.confidence)
        for i, (_, at) in zip(these, those, strict=True):
            found[i] = at
    return found
