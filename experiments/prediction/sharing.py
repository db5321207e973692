"""What others open of a folder of predictions: tables, segmentations, label descriptions."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.faults import DataError
from data_pipelines.files import naming_path
from data_pipelines.reading.case_files import CaseFiles
from data_pipelines.targets import Target
from experiments.prediction.outputs import PredictedCase, PredictionFolder, Predictions
from experiments.prediction.segments import (
    has_highdicom,
    label_descriptions,
    segments_of,
    write_dicom_seg,
    write_seg_nrrd,
)
from experiments.process.storage import write_text


def write_tables(folder: PredictionFolder, predictions: Predictions, target: Target) -> None:
    """``cases.csv``, ``candidates.csv`` and the label descriptions."""
    values = [of_part[0] for of_part in target.values]
    with naming_path(folder.path):
        write_text(folder.cases_table, cases_csv(predictions.cases, target.classes))
        if any(case.candidates is not None for case in predictions.cases):
            write_text(folder.candidates_table, candidates_csv(predictions.cases))
        write_text(folder.labels, label_descriptions(segments_of(target), values))


def parts_of_file(mask: np.ndarray, target: Target) -> np.ndarray:
    """A mask as it was written, with its parts numbered from 1 on, uint8."""
    if not target.values:
        return mask.astype(np.uint8)
    parts = np.zeros(mask.shape, np.uint8)
    for number, values in enumerate(target.values, 1):
        parts[mask == values[0]] = number
    return parts


def cases_csv(cases: Sequence[PredictedCase], classes: Sequence[str]) -> str:
    """One line for each case; what a case has none of is an empty cell."""
    columns = [
        *("case_id", "error", "modalities", "missing_modalities"),
        *(f"volume_{name}_ml" for name in classes),
        *(f"highest_probability_{name}" for name in classes),
        *("num_candidates", "lesion_probability", "called", "warnings"),
    ]
    return _csv(columns, [_case_row(case, classes) for case in cases])


def _case_row(case: PredictedCase, classes: Sequence[str]) -> list[object]:
    volumes, highest = case.volume_ml or {}, case.highest_probability or {}
    return [
        case.case_id,
        case.error,
        " ".join(case.modalities or ()),
        " ".join(case.missing_modalities or ()),
        *(volumes.get(name) for name in classes),
        *(highest.get(name) for name in classes),
        None if case.candidates is None else len(case.candidates),
        case.lesion_probability,
        case.called,
        "; ".join(case.warnings or ()),
    ]


def candidates_csv(cases: Sequence[PredictedCase]) -> str:
    """One line for each lesion candidate, the most confident of each case first."""
    columns = ("case_id", "candidate", "confidence", "probability", "called", "volume_ml")
    return _csv(
        (*columns, "x_mm", "y_mm", "z_mm"),
        [
            [case.case_id, number, found.confidence, found.probability, found.called,
             found.volume_ml, *found.centre_mm]
            for case in cases
            for number, found in enumerate(case.candidates or (), 1)
        ],
    )  # fmt: skip


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return table.getvalue()


def write_segmentations(
    folder: PredictionFolder,
    case_ids: Sequence[str],
    entries: Mapping[str, CaseFiles],
    target: Target,
    model_sha256: str,
    warn: Callable[[str], None],
) -> None:
    """Each mask as ``.seg.nrrd``, and as DICOM SEG where its T2W is a DICOM series.

    Args:
        folder: of the masks.
        case_ids: cases that have one.
        entries: their files.
        target: of the model.
        model_sha256: its identity.
        warn: is told of each DICOM SEG that could not be written; the masks are there regardless.
    """
    from data_pipelines.reading import volume_io  # slow to load, and not needed for --help

    segments, lacking = segments_of(target), 0
    for case_id in case_ids:
        mask = volume_io.read_volume(folder.mask(case_id))
        array = parts_of_file(mask.array, target)
        with naming_path(folder.segmentation(case_id)):
            write_seg_nrrd(folder.segmentation(case_id), array, mask.affine, segments)
        series = reference_of(entries[case_id])
        if not series.is_dir():
            continue
        if not has_highdicom():
            lacking += 1
            continue
        try:
            with naming_path(folder.dicom_seg(case_id)):
                write_dicom_seg(
                    folder.dicom_seg(case_id), array, mask.affine, series, segments, model_sha256
                )
        except DataError as error:
            warn(f"no DICOM SEG of case {case_id}: {error}")
    if lacking:
        warn(
            f"no DICOM SEG of {lacking} cases read from DICOM: highdicom is not installed. "
            'Run pip install "cmsad-jax[dicom]" and predict again.'
        )


def reference_of(entry: CaseFiles) -> Path:
    """The file, or the folder of a DICOM series, in whose frame the masks lie: T2W or the first."""
    return entry.images.get("t2w") or next(iter(entry.images.values()))
