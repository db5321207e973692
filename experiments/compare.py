"""Is one run better than another? Dice of two runs, paired on the same positive cases.

``python -m experiments.compare RUN_A RUN_B [RUN_C ...]`` compares the first run with each other one
by their ``metrics.json``. The difference is ``A - B``: an interval above 0 favours the first run.
The p values are corrected for the number of comparisons that one command makes (Holm).

``--average FOLDER`` also evaluates the mean of the probabilities of all runs, as a run of its own
in that folder, and compares the first run with it. The last lines say which is best, and how new
patients are predicted so.
"""

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.short_help import program
from experiments.measuring.rows import Row
from experiments.measuring.statistics import (
    FEW_PATIENTS,
    NUM_RESAMPLES,
    PairedTests,
    bootstrap_interval,
    few_patients_warning,
    holm,
    paired_tests,
)
from experiments.measuring.summary import Summary
from experiments.process.console import run_main
from experiments.process.records import to_text
from experiments.process.storage import write_text
from experiments.run_folder import RunFolder
from experiments.settings.options import REGISTRY

Rows = Mapping[tuple[str, str], Row]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Dice of one class in two runs, over the cases that hold this class.

    Attributes:
        name: the class.
        run_a, run_b: folders of the two runs.
        num_cases, num_patients: positive cases and the patients they come from.
        mean_a, mean_b: mean Dice over cases.
        difference: mean over cases of ``A - B``.
        interval: ends of the 95 % bootstrap interval of ``difference`` over patients; None below
            two patients.
        tests: paired tests over patients; None below two patients.
        corrected_p: ``tests.permutation_p`` corrected for the number of comparisons.
        same_folds: whether each case was validated in the same fold of both runs.
    """

    name: str
    run_a: str
    run_b: str
    num_cases: int
    num_patients: int
    mean_a: float
    mean_b: float
    difference: float
    interval: tuple[float, float] | None
    tests: PairedTests | None
    corrected_p: float | None
    same_folds: bool


def compare_all(
    first: Path, others: Sequence[Path], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[Comparison]:
    """``compare`` of the first run with each other, p corrected for their number."""
    rows = [
        row
        for other in others
        for row in compare(first, other, num_resamples=num_resamples, seed=seed)
    ]
    tested = [row for row in rows if row.tests is not None]
    corrected = holm([row.tests.permutation_p for row in tested if row.tests is not None])
    p_of = {id(row): p for row, p in zip(tested, corrected, strict=True)}
    return [dataclasses.replace(row, corrected_p=p_of.get(id(row))) for row in rows]


def compare(
    run_a: Path, run_b: Path, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> list[Comparison]:
    """One comparison per class (that any case holds) of two run folders.

    Raises:
        MissingDataError: a folder without ``metrics.json``.
        DataError: other classes, other cases, other truth, or no positive case in the runs.
    """
    summary_a, summary_b = (RunFolder(run).read_results().summary for run in (run_a, run_b))
    rows_a, rows_b = _rows(summary_a), _rows(summary_b)
    if {*summary_a.classes} != {*summary_b.classes}:
        raise DataError(
            "runs must have the same classes; got "
            f"{list(summary_a.classes)} in {run_a} and {list(summary_b.classes)} in {run_b}. "
            "Compare runs of one target."
        )
    cases_a, cases_b = ({case for case, _ in rows} for rows in (rows_a, rows_b))
    if cases_a != cases_b:
        raise DataError(
            "runs must have evaluated the same cases; got "
            f"{_few(cases_a - cases_b)} only in {run_a} and {_few(cases_b - cases_a)} only in "
            f"{run_b}. Finish both runs on the same data and folds."
        )
    pairs = {name: _pairs(name, rows_a, rows_b) for name in summary_a.classes}
    if not any(pairs.values()):
        raise DataError(
            f"a comparison needs a positive case; got none in {run_a}. "
            "Dice is undefined without foreground: evaluate on data that hold some."
        )
    return [
        _compare_class(name, run_a, run_b, paired, num_resamples=num_resamples, seed=seed)
        for name, paired in pairs.items()
        if paired
    ]


def _rows(summary: Summary) -> Rows:
    """Rows by case id and class."""
    return {(row.case_id, row.name): row for row in summary.metric_per_case}


def _few(cases: set[str]) -> str:
    listed = ", ".join(sorted(cases)[:3])
    return f"{len(cases)} ({listed}{', ...' if len(cases) > 3 else ''})" if cases else "none"


def _pairs(name: str, rows_a: Rows, rows_b: Rows) -> list[tuple[Row, Row]]:
    """Rows of both runs of the cases that hold class ``name``, by case id."""
    pairs = [(rows_a[key], rows_b[key]) for key in sorted(rows_a) if key[1] == name]
    volumes = [(a.case_id, a.volume_truth_ml, b.volume_truth_ml) for a, b in pairs]
    if differing := {case for case, a, b in volumes if not math.isclose(a, b, rel_tol=1e-3)}:
        raise DataError(
            f"runs must have the same truth; got other volumes of {name} in {_few(differing)}. "
            "Evaluate both against the same labels."
        )
    return [(a, b) for a, b in pairs if a.dice is not None]


def _compare_class(
    name: str,
    run_a: Path,
    run_b: Path,
    pairs: Sequence[tuple[Row, Row]],
    *,
    num_resamples: int,
    seed: int,
) -> Comparison:
    a, b = (np.array([pair[run].dice for pair in pairs], np.float64) for run in (0, 1))
    patients = [row.patient_id for row, _ in pairs]
    tests = paired_tests(a - b, patients, seed=seed) if len(set(patients)) > 1 else None
    return Comparison(
        name=name,
        run_a=str(run_a),
        run_b=str(run_b),
        num_cases=len(pairs),
        num_patients=len(set(patients)),
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=float((a - b).mean()),
        interval=bootstrap_interval(a - b, patients, num_resamples=num_resamples, seed=seed),
        tests=tests,
        corrected_p=None if tests is None else tests.permutation_p,
        same_folds=all(row_a.fold == row_b.fold for row_a, row_b in pairs),
    )


def format_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Text table: one line per pair of runs and class, then what the columns mean."""
    labels = _labels(comparisons)
    width = max(map(len, labels))
    lines = [
        f"{'A against B':<{width}}  {'cases':>5}  {'Dice A':>7}  {'Dice B':>7}  {'A - B':>7}  "
        f"{'95 % interval':>18}  {'p':>7}  {'p corr.':>7}  {'Wilcoxon':>8}  {'d_z':>6}  {'r':>6}"
    ]
    for label, row in zip(labels, comparisons, strict=True):
        interval = "needs 2 patients"
        if row.interval is not None:
            interval = f"{row.interval[0]:+.4f} to {row.interval[1]:+.4f}"
        tests = ""
        if row.tests is not None:
            effect = "" if row.tests.cohens_dz is None else f"{row.tests.cohens_dz:+.2f}"
            tests = (
                f"  {row.tests.permutation_p:>7.2g}  {row.corrected_p:>7.2g}  "
                f"{row.tests.wilcoxon_p:>8.2g}  {effect:>6}  {row.tests.rank_biserial:>+6.2f}"
            )
        lines.append(
            f"{label:<{width}}  {row.num_cases:>5}  {row.mean_a:>7.4f}  {row.mean_b:>7.4f}  "
            f"{row.difference:>+7.4f}  {interval:>18}{tests}"
        )
    lines.append(
        "Positive cases only, paired. Interval: BCa bootstrap over patients. p: sign-flip "
        "permutation test of the mean, two-sided; p corr.: for the number of rows (Holm). "
        "Wilcoxon: signed-rank test, uncorrected. d_z: mean over sd of the differences; r: matched "
        "rank-biserial correlation."
    )
    lines += [
        f"Warning: {label}: {few_patients_warning(row.num_patients)}"
        for label, row in zip(labels, comparisons, strict=True)
        if row.num_patients < FEW_PATIENTS
    ]
    lines += [
        f"Note: {label}: folds differ, so the models saw other training cases."
        for label, row in zip(labels, comparisons, strict=True)
        if not row.same_folds
    ]
    return "\n".join(lines)


def _labels(comparisons: Sequence[Comparison]) -> list[str]:
    """What each row is called: the ends of the folders' names that tell the runs apart."""
    runs = {Path(run) for row in comparisons for run in (row.run_a, row.run_b)}
    depth = 1
    while len({run.parts[-depth:] for run in runs}) < len(runs):
        depth += 1
    return [
        f"{Path(*Path(row.run_a).parts[-depth:])} - {Path(*Path(row.run_b).parts[-depth:])} "
        f"({row.name})"
        for row in comparisons
    ]


def average(runs: Sequence[Path], output: Path) -> None:
    """Evaluate the mean of the probabilities of some runs, as a run in ``output``.

    Raises:
        ConfigError: the folder holds something.
        DataError: the data of the first run are not those of then, or a probability is missing.
    """
    # slow to load, and not needed for --help
    from experiments.studies.averaging import average_runs
    from experiments.studies.revisit import source_of

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"the mean of runs is written into a folder of its own; {output} holds something. "
            "Name another one after --average."
        )
    folders = [RunFolder(run) for run in runs]
    config = folders[0].read_config()
    average_runs(folders, RunFolder(output), config, source_of(folders[0], config))


def proposal(runs: Sequence[Path], rows: Sequence[Comparison], averaged: Path | None) -> str:
    """Which run has the highest Dice, mean over classes, and the command that predicts with it."""
    scores: dict[str, list[float]] = {}
    for name in dict.fromkeys(row.name for row in rows):
        of_class = [row for row in rows if row.name == name]
        scores.setdefault(of_class[0].run_a, []).append(of_class[0].mean_a)
        for row in of_class:
            scores.setdefault(row.run_b, []).append(row.mean_b)
    means = {run: float(np.mean(values)) for run, values in scores.items()}
    best = max(means, key=lambda run: means[run])
    is_mean = averaged is not None and best == str(averaged)
    title = "the mean of the runs" if is_mean else best
    models = " ".join(f"--model {shlex.quote(str(run))}" for run in (runs if is_mean else (best,)))
    lines = [
        f"Highest Dice: {title} ({means[best]:.4f}). To predict so: "
        f"cmsad predict {models} --input CASES --output FOLDER"
    ]
    if averaged is None:
        lines.append("Add --average FOLDER to see whether the mean of the runs is better still.")
    lines.append(
        "The best of several has been chosen by these cases, and is a little worse on others."
    )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compare the Dice of the first run with each other run, paired on the same cases."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN RUN ...")]
    """Run folders, at least two; the first is compared with each other one."""
    json: Path | None = None
    """Also write the comparisons to this file."""
    average: Path | None = None
    """Also compare the mean of the probabilities of all runs, written as a run into this folder."""
    num_resamples: int = NUM_RESAMPLES
    """Number of bootstrap resamples."""
    seed: int = 0
    """Seed of the bootstrap and of the permutations."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    config = tyro.cli(
        CompareConfig, prog=program("experiments.compare"), args=argv, registry=REGISTRY
    )
    if len(config.runs) < 2:
        raise DataError(
            f"a comparison needs at least two runs; got {len(config.runs)}. Name another one."
        )
    if config.num_resamples < 1:
        raise ConfigError(
            f"an interval needs resamples; got {config.num_resamples}. "
            f"Use --num-resamples={NUM_RESAMPLES}."
        )
    first, *others = config.runs
    if config.average is not None:
        compare_all(first, others, num_resamples=1)  # refuses runs that cannot be paired
        average(config.runs, config.average)
        others.append(config.average)
    comparisons = compare_all(first, others, num_resamples=config.num_resamples, seed=config.seed)
    print(format_comparisons(comparisons))
    print(proposal(config.runs, comparisons, config.average))
    if config.json is not None:
        write_text(config.json, to_text(comparisons))


if __name__ == "__main__":
    run_main(main)
