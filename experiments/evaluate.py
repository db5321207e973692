"""Metrics of predicted masks: per case, summed up over cases and folds, written to JSON and CSV.

``python -m experiments.evaluate PREDICTIONS LABELS`` compares two folders of NIfTI files of equal
names. Every metric is measured in the frame of the original T2W volume, never on a resampled grid.

What each metric is, and where it is undefined: ``experiments.measuring.metrics``.

With probabilities, lesions are also detected and probabilities calibrated:
``experiments.measuring.lesions``.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from cmsad_jax.types import ConfigError
from data_pipelines.case import corners_apart
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.reading.case_files import check_patients
from data_pipelines.reading.tables import read_table
from data_pipelines.short_help import program
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.rows import Row
from experiments.measuring.summary import Summary, format_summary, summarise
from experiments.process.called import callable_module
from experiments.process.console import log, run_main
from experiments.run_folder import Results, RunFolder
from experiments.settings.options import REGISTRY

_SAME_PLACE = 0.05
"""Of the smallest voxel side: corners of one grid may lie so far apart in two headers."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Compare predicted masks or probabilities with labels: two folders of equal file names."""

    predictions: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PREDICTIONS")]
    """Folder of predictions; a label without one is told, and not measured."""
    labels: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="LABELS")]
    """Folder of labels with the same names, but for the ending, and the same grids."""
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
    pairs = _pairs(config.predictions, config.labels)
    patients = _read_patients(config.patients, [pair.case_id for pair in pairs])
    return summarise([row for pair in pairs for row in _evaluate_file(config, pair, patients)])


def _rule(config: EvaluateConfig) -> Rule:
    return Rule(config.target, config.threshold, config.classes, config.lesions)


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


class Pair(NamedTuple):
    """The prediction and the label of a case."""

    case_id: str
    prediction: Path
    label: Path


def _pairs(predictions: Path, labels: Path) -> list[Pair]:
    """Predictions and labels of equal names, whatever their endings; says what has no other."""
    for folder in (predictions, labels):
        if not folder.is_dir():
            raise MissingDataError(
                f"predictions and labels must be folders; got {folder}. Check the path."
            )
    predicted, labelled = (_images(folder) for folder in (predictions, labels))
    both = sorted(predicted.keys() & labelled.keys())
    if not both:
        raise MissingDataError(
            "predictions and labels of a case must have one name, but for the ending; got "
            f"{_some(predicted) or 'none'} in {predictions} and {_some(labelled) or 'none'} in "
            f"{labels}. Rename them, or check the paths."
        )
    for alone, words in (
        (labelled.keys() - predicted.keys(), "labels have no prediction"),
        (predicted.keys() - labelled.keys(), "predictions have no label"),
    ):
        if alone:
            log(f"measured are {len(both)} cases; {len(alone)} {words} and are not: {_some(alone)}")
    return [Pair(case_id, predicted[case_id], labelled[case_id]) for case_id in both]


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _images(folder: Path) -> dict[str, Path]:
    """The files to evaluate, by case."""
    # slow to load, and not needed for --help
    from data_pipelines.reading.volume_io import name_without_ending

    named = [
        (case_id, path)
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and (case_id := name_without_ending(path.name))
    ]
    if strange := sorted(path.name for _, path in named if not path.name.isprintable()):
        raise DataError(
            f"file names must be printable text; got {strange[0]!a} in {folder}. Rename it."
        )
    _check_names([case_id for case_id, _ in named])
    return dict(named)


def _evaluate_file(config: EvaluateConfig, pair: Pair, patients: Mapping[str, str]) -> list[Row]:
    # slow to load, and not needed for --help
    from data_pipelines.preparing.geometry import canonical
    from data_pipelines.preparing.labels import label_classes, predicted_values
    from data_pipelines.reading.volume_io import read_volume

    name = pair.prediction.name
    prediction, label = read_volume(pair.prediction), read_volume(pair.label)
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
        raise DataError(f"the label {pair.label.name}: {error}") from None
    if np.issubdtype(predicted.dtype, np.floating):
        predicted = predicted[..., None]
    case_id = pair.case_id
    try:
        return measure_case(
            case_id, patients[case_id], None, predicted, truth, label.spacing_mm, rule
        )
    except DataError as error:
        raise DataError(f"the prediction {name}: {error}") from None


def call(config: EvaluateConfig) -> Summary:
    """``experiments.evaluate(config)``: the figures, written to ``config.output`` if that is given.

    Raises as ``evaluate_folders``.
    """
    summary = evaluate_folders(config)
    if config.output is not None:
        config.output.mkdir(parents=True, exist_ok=True)
        rule = _rule(config)
        RunFolder(config.output).write_results(
            Results(summary, rule.target, rule.classes, rule.threshold)
        )
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    config = tyro.cli(
        EvaluateConfig, prog=program("experiments.evaluate"), args=argv, registry=REGISTRY
    )
    print(format_summary(call(config)))


callable_module(__name__)

if __name__ == "__main__":
    run_main(main)
