"""The mean of the probabilities of finished runs, evaluated as a run."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.case import spacing_of
from data_pipelines.faults import DataError
from data_pipelines.serving import loading
from experiments.measuring.cases import measure_case
from experiments.measuring.rows import Row
from experiments.measuring.summary import summarise
from experiments.run_folder import Results, RunFolder
from experiments.settings.config import Config


def average_runs(
    runs: Sequence[RunFolder], output: RunFolder, config: Config, source: loading.CaseSource
) -> Results:
    """Average what the runs wrote of each case when it was validated, and evaluate that.

    Every probability is that of networks that had not seen the case. The folds that the rows tell
    are those of the first run.

    Args:
        runs: finished, of one target and the same cases.
        output: folder in which results and report are written.
        config: how probabilities become masks, and what the report shows.
        source: the data.

    Returns:
        What was written.

    Raises:
        DataError: a probability is missing, or not on the grid of the others.
    """
    from experiments.reporting import page  # slow to load, and not needed for --help
    from experiments.studies import cross_validation

    first = runs[0].read_results()
    folds = [_fold_of(run) for run in runs]
    rule, classes = cross_validation.rule_of(config), config.data.definition.part_names
    rows: list[Row] = []
    for case_id, fold in sorted(folds[0].items()):
        probability = np.mean(
            [
                run.fold(fold_of[case_id]).read_probabilities(case_id, classes)
                for run, fold_of in zip(runs, folds, strict=True)
            ],
            0,
        )
        case = source[case_id]
        if probability.shape[:3] != case.original_shape:
            raise DataError(
                f"a probability must lie on the grid of its T2W file; got one of "
                f"{probability.shape[:3]} for {case_id} of {case.original_shape}. Restore the data "
                "that the runs were trained on."
            )
        rows += measure_case(
            case_id,
            case.patient_id,
            fold,
            probability,
            case.original_truth,
            spacing_of(case.original_affine),
            rule,
        )
    output.path.mkdir(parents=True, exist_ok=True)
    results = dataclasses.replace(
        first,
        summary=summarise(rows, first.folds_done or ()),
        baseline_mean_shape=None,
        best_checkpoint=None,
        fold_summaries=None,
    )
    output.write_results(results)
    page.write_report(output, config.report)
    return results


def _fold_of(run: RunFolder) -> Mapping[str, int]:
    """In which fold each case was validated."""
    found = {row.case_id: row.fold for row in run.read_results().summary.metric_per_case}
    return {case_id: fold for case_id, fold in found.items() if fold is not None}
