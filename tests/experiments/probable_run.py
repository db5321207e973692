"""A finished run on the phantom whose networks say what a test wants, and its data."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from data_pipelines.case import Case, spacing_of
from data_pipelines.reading.volume_io import write_nifti
from data_pipelines.serving import loading
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.summary import summarise
from experiments.process.records import write_record
from experiments.run_folder import SCHEMA, Results, RunFolder, RunRecord
from experiments.settings.command_line import parse
from experiments.settings.config import Config
from experiments.settings.stored import to_json


def phantom_source(cache: Path) -> tuple[Config, loading.CaseSource]:
    """Eight cases, coarse, and the settings of a run on them."""
    config = parse(
        [
            f"--data.cache={cache}",
            *("--data.phantom.num-cases=8", "--num-folds=2"),
            *("--data.preprocess.spacing-mm", "3", "3", "3"),
            *("--data.preprocess.size", "12", "32", "32"),
            *("--train.crop", "8", "32", "32"),
        ]
    )
    return config, loading.build(config.data)


def probable_run(
    folder: Path,
    config: Config,
    cases: loading.CaseSource,
    fold_of: Mapping[str, int],
    probability_of: Callable[[Case], np.ndarray],
) -> Path:
    """Write a run that says these probabilities, in the frame of each case's T2W file."""
    run, rows = RunFolder(folder), []
    for info in cases.info:
        case, fold = cases[info.case_id], fold_of[info.case_id]
        probability = probability_of(case).astype(np.float32)
        rows += measure_case(
            info.case_id,
            info.patient_id,
            fold,
            probability[..., None],
            case.original_truth,
            spacing_of(case.original_affine),
            Rule("lesion", 0.5),
        )
        (file,) = run.fold(fold).probabilities(info.case_id, ("lesion",))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_nifti(file, probability, case.original_affine)
    run.write_results(
        Results(summarise(rows, [0, 1]), "lesion", ("lesion",), 0.5, "ema", 2, (0, 1))
    )
    write_record(run.config, RunRecord(to_json(config), cases.fingerprint), schema=SCHEMA)
    return folder
