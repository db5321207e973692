"""The page of a folder of predictions: the viewer over the cases, and what was found in them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cmsad_jax import export
from data_pipelines.case import RawCase, Volume, spacing_of
from data_pipelines.config import origin_of
from data_pipelines.preparing.geometry import canonical, resample
from data_pipelines.reading.volume_io import read_volume
from experiments.measuring.lesions import Candidate
from experiments.prediction.outputs import (
    PredictedCase,
    PredictionFolder,
    Predictions,
    target_of_model,
)
from experiments.prediction.sharing import parts_of_file
from experiments.process.storage import write_text
from experiments.reporting.page import BYTES_PER_PLACE, PROGRAM_BYTES, page_templates
from experiments.reporting.sprites import share_out
from experiments.reporting.views import View, slice_to_show, weights_in_words
from experiments.reporting.wording import UNDEFINED, Table, number, plural, volume
from experiments.settings.config import ReportConfig

UNITS = "intensities as stored in the files"
LEAST_BYTES = 100_000
"""Of a case: every one is read again, which thousands are not worth."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """Whose predictions a page shows.

    Attributes:
        description: of the model.
        read: reads the images of a case, by its name; raises ``DataError``.
    """

    description: export.Description
    read: Callable[[str], RawCase]


def write_prediction_page(
    folder: PredictionFolder,
    predictions: Predictions,
    subject: Subject,
    case_ids: Sequence[str],
    report: ReportConfig,
) -> None:
    """Write the page.

    Args:
        folder: of the masks and probabilities.
        predictions: its record.
        subject: the model, and how images are read.
        case_ids: the cases whose images can be read; others are in the tables alone.
        report: size of the page.
    """
    cases = sorted(predictions.cases, key=_suspicion)
    there = [case for case in cases if case.error is None and case.case_id in {*case_ids}]
    facts = _facts(predictions, subject.description, cases, report)
    facts["dicom_seg"] = any(folder.dicom_seg(case.case_id).is_file() for case in cases)
    html = page_templates().get_template("predictions.html.j2")
    num_rows = sum(len(case.candidates or ()) for case in there)
    without = len(html.render({**facts, "candidates": candidate_table(cases, {})}).encode())
    room = int(report.max_mb * 1e6) - without - PROGRAM_BYTES - BYTES_PER_PLACE * num_rows
    grids: dict[str, View] = {}

    def opened(case: PredictedCase) -> View:
        view = case_view(folder, case, subject)
        grids[case.case_id] = dataclasses.replace(view, images=np.zeros(0), foreground=np.zeros(0))
        return view

    views = {case.case_id: functools.partial(opened, case) for case in there}
    facts["viewer"] = share_out(views, UNITS, room, LEAST_BYTES) if there else None
    if facts["viewer"]:
        for case_id in facts["viewer"]["left_out"]:
            grids.pop(case_id, None)
    facts["candidates"] = candidate_table(cases, grids)
    write_text(folder.page, html.render(facts))


def _suspicion(case: PredictedCase) -> tuple[bool, float, str]:
    """The most suspicious case first, those that could not be predicted last."""
    highest = max((case.highest_probability or {"": 0.0}).values())
    strongest = max((found.confidence for found in case.candidates or ()), default=0.0)
    return case.error is not None, -(strongest or highest), case.case_id


def case_view(folder: PredictionFolder, case: PredictedCase, subject: Subject) -> View:
    """A case on the whole grid of its T2W file, with the intensities of its files."""
    classes = subject.description.classes
    raw = subject.read(case.case_id)
    mask = canonical(read_volume(folder.mask(case.case_id)))
    shape, affine = mask.shape, mask.affine
    foreground = np.zeros(shape, np.float32)
    for file in folder.probability(case.case_id, classes):
        foreground += canonical(read_volume(file)).array
    images = np.zeros((*shape, len(subject.description.modalities)), np.float32)
    for index, name in enumerate(subject.description.modalities):
        if name in raw.images:
            images[..., index] = _on_grid(raw.images[name], shape, affine)
    labels = parts_of_file(mask.array, target_of_model(subject.description))
    return View(
        title=f"{case.case_id}: {said_of(case)}",
        caption=weights_in_words(case.modality_weights or {}),
        modalities=subject.description.modalities,
        images=images,
        truth=None,
        mask=labels,
        foreground=np.clip(foreground, 0, 1),
        attention=None,
        spacing_mm=spacing_of(affine),
        index=slice_to_show(np.zeros(shape), labels, foreground),
        affine=affine,
    )


def _on_grid(image: Volume, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    return resample(canonical(image), shape, affine, order=1)[0]


def said_of(case: PredictedCase) -> str:
    """What was found in a case, in a few words."""
    volumes = ", ".join(f"{name} {volume(ml)}" for name, ml in (case.volume_ml or {}).items())
    if case.candidates is None:
        return volumes
    found = plural(len(case.candidates), "candidate")
    best = max((each.confidence for each in case.candidates), default=None)
    return f"{volumes}; {found}" + ("" if best is None else f", up to {best:.2f}")


def _facts(
    predictions: Predictions,
    description: export.Description,
    cases: Sequence[PredictedCase],
    report: ReportConfig,
) -> dict[str, Any]:
    config = description.provenance.get("config", {})
    data = config.get("data", {}) if isinstance(config, Mapping) else {}
    classes = target_of_model(description).classes
    failed = [case for case in cases if case.error is not None]
    return {
        "title": f"Predictions: {', '.join(classes)}",
        "disclaimer": predictions.disclaimer,
        "model": predictions.facts.model,
        "members": plural(len(predictions.facts.model.members), "member"),
        "settings": predictions.facts.settings,
        "several": len(description.classes) > 1,
        "trained_on": origin_of(str(data.get("name", "not recorded"))).text,
        "count": plural(len(cases) - len(failed), "case"),
        "failed": failed,
        "per_case": prediction_table(cases, classes),
        "max_mb": f"{report.max_mb:g}",
        "viewer": None,
    }


def prediction_table(cases: Sequence[PredictedCase], classes: Sequence[str]) -> Table:
    """One row for each case."""
    judged = any(case.lesion_probability is not None for case in cases)
    detected = any(case.candidates is not None for case in cases)
    columns = [
        "Case",
        *(f"{name} (ml)" for name in classes),
        *(f"Highest probability, {name}" for name in classes),
        *(("Candidates",) if detected else ()),
        *(("Probability of a lesion", "Called") if judged else ()),
        *("Missing modalities", "Remarks"),
    ]
    rows = []
    for case in cases:
        volumes, highest = case.volume_ml or {}, case.highest_probability or {}
        called = UNDEFINED if case.called is None else ("no", "yes")[case.called]
        rows.append(
            (
                case.case_id,
                *(_decimals(volumes.get(name), 2) for name in classes),
                *(_decimals(highest.get(name), 3) for name in classes),
                *((str(len(case.candidates or ())),) if detected else ()),
                *((number(case.lesion_probability), called) if judged else ()),
                " ".join(case.missing_modalities or ()) or UNDEFINED,
                "; ".join(case.warnings or ((case.error,) if case.error else ())) or UNDEFINED,
            )
        )
    return Table("Every case", columns, rows, [{"case": case.case_id} for case in cases])


def _decimals(value: float | None, digits: int) -> str:
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def candidate_table(cases: Sequence[PredictedCase], views: Mapping[str, View]) -> Table | None:
    """The lesion candidates, the most confident first, with their places in the views there are."""
    if all(case.candidates is None for case in cases):
        return None
    entries = [
        (case.case_id, rank, found)
        for case in cases
        for rank, found in enumerate(case.candidates or (), 1)
    ]
    entries.sort(key=lambda entry: (-entry[2].confidence, entry[0]))
    judged = any(found.probability is not None for _, _, found in entries)
    places = [_place(found, views.get(case_id)) for case_id, _, found in entries]
    return Table(
        "Lesion candidates",
        (
            *("Case", "Candidate", "Confidence"),
            *(("Probability", "Called") if judged else ()),
            *("Volume", "Slice", "Centre (mm, RAS)"),
        ),
        [
            (
                case_id,
                f"candidate {rank}",
                number(found.confidence),
                *((number(found.probability), "yes" if found.called else "no") if judged else ()),
                volume(found.volume_ml),
                str(int(place["slice"]) + 1) if place else UNDEFINED,
                " ".join(f"{mm:.1f}" for mm in found.centre_mm),
            )
            for (case_id, rank, found), place in zip(entries, places, strict=True)
        ],
        [{"case": case_id} | place for (case_id, _, _), place in zip(entries, places, strict=True)],
    )


def _place(found: Candidate, view: View | None) -> dict[str, str]:
    """Where a candidate is in the viewer."""
    if view is None or view.affine is None:
        return {}
    w, h, d = (np.linalg.inv(view.affine) @ [*found.centre_mm, 1])[:3]
    _, height, width = view.mask.shape
    return {"slice": str(round(d)), "x": f"{width - w - 0.5:.1f}", "y": f"{height - h - 0.5:.1f}"}
