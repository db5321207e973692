"""Metrics of predicted masks: per case, summed up over cases and folds, written to JSON and CSV.

``python -m experiments.evaluate PREDICTIONS LABELS`` compares two folders of NIfTI files of equal
names. Every metric is measured in the frame of the original T2W volume, never on a resampled grid.

What each metric is, and where it is undefined: ``experiments.measuring.metrics``.

With probabilities, lesions are also detected and probabilities calibrated:
``experiments.measuring.lesions``.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from cmsad_jax.types import ConfigError
from data_pipelines.case import corners_apart
from data_pipelines.command_line import program
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.reading.case_files import check_patients
from data_pipelines.reading.tables import read_table
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.rows import Row
from experiments.measuring.summary import Summary, format_summary, summarise
from experiments.process.console import run_main
from experiments.run_folder import Results, RunFolder
from experiments.settings.options import REGISTRY

_SAME_PLACE = 0.05
"""Of the smallest voxel side: corners of one grid may lie so far apart in two headers."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Compare predicted masks or probabilities with labels: two folders of equal file names."""

    predictions: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PREDICTIONS")]
    """Folder of predictions, *.nii.gz or *.nii."""
    labels: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="LABELS")]
    """Folder of labels with the same names and the same grids."""
    target: str = "lesion"
    """What labels mean: lesion, gland (every value above 0), zones, or a name for own classes."""
    classes: tuple[str, ...] = ()
    """Own classes of a target of another name: name=value, name=1+2 (region), ignore=value."""
    lesions: tuple[str, ...] = ()
    """Which of one's own classes is a lesion, whose candidates are detected."""
    threshold: float = 0.5
    """Probabilities above this are foreground."""
    patients: Path | None = None
    """Table (CSV) with the columns case and patient; by default each file is a patient."""
    output: Path | None = None
    """Folder for metrics.json and metrics.csv; by default nothing is written."""


def evaluate_folders(config: EvaluateConfig) -> Summary:
    """Summary (without folds) of all files of ``config.predictions``, read one after the other."""
    if not 0 < config.threshold < 1:
        raise ConfigError(
            f"threshold must lie between 0 and 1; got {config.threshold:g}. Use --threshold=0.5."
        )
    names = _paired_names(config.predictions, config.labels)
    _check_names([_case_id(name) for name in names])
    patients = _read_patients(config.patients, [_case_id(name) for name in names])
    return summarise([row for name in names for row in _evaluate_file(config, name, patients)])


def _rule(config: EvaluateConfig) -> Rule:
    return Rule(config.target, config.threshold, config.classes, config.lesions)


def _case_id(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".nii")


def _check_names(case_ids: Sequence[str]) -> None:
    """Whether the files are of as many cases, wherever they are unpacked."""
    counts = Counter(case_id.casefold() for case_id in case_ids)
    if alike := [case_id for case_id in case_ids if counts[case_id.casefold()] > 1]:
        raise DataError(
            "files must be named for their cases, which differ in more than ending and upper or "
            f"lower case; got {', '.join(alike[:4])}. Rename or remove all but one."
        )


def _read_patients(table: Path | None, cases: Sequence[str]) -> dict[str, str]:
    """The patient of each case."""
    if table is None:
        return {case: case for case in cases}
    rows = read_table(table, ("case", "patient"), remedy="Name a table of cases and patients.")
    patients: dict[str, str] = {}
    for row in rows:
        if patients.setdefault(row["case"], row["patient"]) != row["patient"]:
            raise DataError(
                f"{table} must name one patient for each case; got {patients[row['case']]} and "
                f"{row['patient']} for {row['case']}. Remove one of these rows."
            )
    if lacking := [case for case in cases if not patients.get(case)]:
        raise DataError(
            f"{table} must name the patient of every case; got none of {', '.join(lacking[:5])}. "
            "Add these rows."
        )
    alike = check_patients({patients[case] for case in cases})
    if errors := [problem.text for problem in alike if problem.level == "error"]:
        raise DataError(f"{table}: {errors[0]}")
    return patients


def _paired_names(predictions: Path, labels: Path) -> list[str]:
    for folder in (predictions, labels):
        if not folder.is_dir():
            raise MissingDataError(
                f"predictions and labels must be folders; got {folder}. Check the path."
            )
    predicted, labelled = (_images(folder) for folder in (predictions, labels))
    if not predicted:
        raise MissingDataError(
            f"predictions must hold *.nii.gz or *.nii files; got none in {predictions}. "
            "Check the path."
        )
    if predicted != labelled:
        raise MissingDataError(
            "predictions and labels must have equal names; got "
            f"{sorted(predicted - labelled)} without label and {sorted(labelled - predicted)} "
            "without prediction. Add or remove these files."
        )
    return sorted(predicted)


def _images(folder: Path) -> set[str]:
    """Names of the files to evaluate; other kinds of image are refused rather than left out."""
    from data_pipelines.reading.volume_io import SUFFIXES  # slow to load, and not needed for --help

    images = {
        path.name
        for path in folder.iterdir()
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
    }
    if others := sorted(name for name in images if not name.endswith((".nii.gz", ".nii"))):
        raise DataError(
            f"predictions and labels must be *.nii.gz or *.nii files; got {others[0]!a} in "
            f"{folder}. Convert or rename it."
        )
    if strange := sorted(name for name in images if not name.isprintable()):
        raise DataError(
            f"file names must be printable text; got {strange[0]!a} in {folder}. Rename it."
        )
    return images


def _evaluate_file(config: EvaluateConfig, name: str, patients: Mapping[str, str]) -> list[Row]:
    # slow to load, and not needed for --help
    from data_pipelines.preparing.geometry import canonical
    from data_pipelines.preparing.labels import label_classes, predicted_values
    from data_pipelines.reading.volume_io import read_volume

    prediction, label = read_volume(config.predictions / name), read_volume(config.labels / name)
    prediction, label = canonical(prediction), canonical(label)
    apart = np.inf
    if prediction.shape == label.shape:
        apart = corners_apart(prediction.affine, label.affine, label.shape)
    if apart > _SAME_PLACE * min(label.spacing_mm):
        came = f"corners up to {apart:.2f} mm apart" if np.isfinite(apart) else "other sizes"
        raise DataError(
            f"prediction and label must lie on one grid; got {came} for {name}: "
            f"{prediction.shape} and {label.shape} voxels. Resample the prediction onto the "
            "label's grid."
        )
    rule = _rule(config)
    try:
        predicted = predicted_values(prediction.array, rule.definition)
    except DataError as error:
        raise DataError(f"the prediction {name}: {error}") from None
    try:
        truth = label_classes(label.array, rule.definition)
    except DataError as error:
        raise DataError(f"the label {name}: {error}") from None
    if np.issubdtype(predicted.dtype, np.floating):
        predicted = predicted[..., None]
    case_id = _case_id(name)
    try:
        return measure_case(
            case_id, patients[case_id], None, predicted, truth, label.spacing_mm, rule
        )
    except DataError as error:
        raise DataError(f"the prediction {name}: {error}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    config = tyro.cli(
        EvaluateConfig, prog=program("experiments.evaluate"), args=argv, registry=REGISTRY
    )
    summary = evaluate_folders(config)
    if config.output is not None:
        config.output.mkdir(parents=True, exist_ok=True)
        rule = _rule(config)
        RunFolder(config.output).write_results(
            Results(summary, rule.target, rule.classes, rule.threshold)
        )
    print(format_summary(summary))


if __name__ == "__main__":
    run_main(main)
