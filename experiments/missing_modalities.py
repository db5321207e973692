"""What does the loss of a modality cost? Every case again, with each of its modalities withheld.

``python -m experiments.missing_modalities RUN [RUN_B ...]`` takes finished runs of
``experiments.cv``. Each fold's own network predicts the positive cases that it did not see, with
all modalities and without each one, and Dice is measured in the frame of the T2W file, as in the
run. Given several runs, the losses of the first are compared with those of each other one, paired
on the same cases: so a run with ``--train.modality-dropout`` is held against one without.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro

from cmsad_jax.types import ConfigError
from data_pipelines.case import Case, spacing_of
from data_pipelines.faults import DataError
from data_pipelines.short_help import program
from experiments.measuring import statistics
from experiments.measuring.cases import Rule, measure_case
from experiments.prediction.windows import predict_case
from experiments.process.accelerator import select_accelerator
from experiments.process.console import log, run_main
from experiments.run_folder import RunFolder
from experiments.settings.config import Accelerator
from experiments.settings.options import REGISTRY
from experiments.studies.revisit import RevisitCommand, open_run
from experiments.training.programs import compile_programs

NOTHING = "nothing"
"""What is withheld from a case that is predicted with all its modalities."""

Key = tuple[str, str]
"""What is withheld, and the class that is measured."""

Dice = Mapping[Key, Mapping[str, float]]
"""Dice of each positive case that has what is withheld, and something else."""


@dataclasses.dataclass(frozen=True)
class Withheld:
    """Dice of one class in one run while one modality is withheld.

    Attributes:
        run: name of the run.
        without: the modality, or ``nothing``.
        name: the class.
        num_cases, num_patients: positive cases that have the modality, and whose they are.
        dice: mean over the cases; ``dice_interval`` is its 95 % bootstrap interval over patients.
        loss: mean of Dice with all modalities less ``dice``, paired; None for ``nothing``.
        loss_interval: of ``loss``. Intervals are None below two patients.
    """

    run: str
    without: str
    name: str
    num_cases: int
    num_patients: int
    dice: float
    dice_interval: tuple[float, float] | None
    loss: float | None
    loss_interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class LossDifference:
    """The loss of run A less that of run B; below 0, A bears the lack better.

    Attributes:
        run_a, run_b: names of the runs.
        without, name, num_cases, num_patients: as in ``Withheld``.
        difference: mean over the cases; ``interval`` as there.
        p: sign-flip permutation test over patients; None below two patients.
        corrected_p: ``p`` corrected for the number of comparisons of this command (Holm).
    """

    run_a: str
    run_b: str
    without: str
    name: str
    num_cases: int
    num_patients: int
    difference: float
    interval: tuple[float, float] | None
    p: float | None
    corrected_p: float | None


def measure(
    run: Path, accelerator: Accelerator, folds: tuple[int, ...] | None = None
) -> tuple[Dice, Mapping[str, str]]:
    """Dice of a run's positive cases with each modality withheld; the patient of each case.

    Raises:
        ConfigError: no run, a fold that is not done, or a single modality.
        DataError: no positive case, or the data are others than those of the run.
    """
    from data_pipelines.preparing.preprocessing import (
        to_original,  # slow to load, and not needed for --help
    )

    names = RunFolder(run).read_config().data.modalities
    if len(names) < 2:
        raise ConfigError(
            f"a run must have two modalities or more to do without one; {run} has "
            f"{', '.join(names)}. Name another run."
        )
    finished = open_run(run, folds)
    config = finished.config
    devices = select_accelerator(accelerator)[:1]
    program = compile_programs(config, devices).predict
    data = config.data
    rule = Rule(data.target, config.predict.threshold, data.labels, data.lesions)
    dice: dict[Key, dict[str, float]] = {}
    for params, case, see in finished.cases(devices):
        for without, poorer in withheld(case, names):
            seen = see(poorer)
            probability = to_original(predict_case(program, params, seen, config), seen)
            rows = measure_case(
                case.case_id,
                case.patient_id,
                None,
                probability,
                case.original_truth,
                spacing_of(case.original_affine),
                rule,
                detect=False,
            )
            for row in rows:
                if row.dice is not None:
                    dice.setdefault((without, row.name), {})[case.case_id] = row.dice
    return dice, finished.patients


def withheld(case: Case, modalities: Sequence[str]) -> Iterator[tuple[str, Case]]:
    """A case as it is, then without each modality that it has, unless that is its only one."""
    yield NOTHING, case
    for index, name in enumerate(modalities):
        present = case.present.copy()
        present[index] = False
        if case.present[index] and present.any():
            yield name, dataclasses.replace(case, present=present)


def summarise(run: str, dice: Dice, patients: Mapping[str, str]) -> list[Withheld]:
    """One row for each thing withheld and each class."""
    rows = []
    for (without, name), values in dice.items():
        cases = sorted(values)
        owners = [patients[case] for case in cases]
        found = np.array([values[case] for case in cases])
        lost = None if without == NOTHING else _losses(dice, (without, name), cases)
        rows.append(
            Withheld(
                run=run,
                without=without,
                name=name,
                num_cases=len(cases),
                num_patients=len(set(owners)),
                dice=float(found.mean()),
                dice_interval=statistics.bootstrap_interval(found, owners),
                loss=None if lost is None else float(lost.mean()),
                loss_interval=(
                    None if lost is None else statistics.bootstrap_interval(lost, owners)
                ),
            )
        )
    return rows


def compare_losses(
    run_a: str, dice_a: Dice, run_b: str, dice_b: Dice, patients: Mapping[str, str]
) -> list[LossDifference]:
    """The losses of two runs, paired on cases; ``corrected_p`` is still that of one comparison.

    Raises:
        DataError: the runs have other modalities, classes or positive cases.
    """
    if {key: set(cases) for key, cases in dice_a.items()} != {
        key: set(cases) for key, cases in dice_b.items()
    }:
        raise DataError(
            f"runs must have the same modalities, classes and positive cases; those of {run_a} and "
            f"{run_b} differ. Compare runs on the same data, with all folds done."
        )
    rows = []
    for key, values in dice_a.items():
        if key[0] == NOTHING:
            continue
        cases = sorted(values)
        owners = [patients[case] for case in cases]
        differences = _losses(dice_a, key, cases) - _losses(dice_b, key, cases)
        p = None
        if len(set(owners)) > 1:
            p = statistics.paired_tests(differences, owners).permutation_p
        rows.append(
            LossDifference(
                run_a=run_a,
                run_b=run_b,
                without=key[0],
                name=key[1],
                num_cases=len(cases),
                num_patients=len(set(owners)),
                difference=float(differences.mean()),
                interval=statistics.bootstrap_interval(differences, owners),
                p=p,
                corrected_p=p,
            )
        )
    return rows


def _losses(dice: Dice, key: Key, cases: Sequence[str]) -> np.ndarray:
    """Dice with everything less Dice without, of each case."""
    return np.array([dice[NOTHING, key[1]][case] - dice[key][case] for case in cases])


def format_table(rows: Sequence[Withheld], differences: Sequence[LossDifference]) -> str:
    """Both tables in Markdown, and what their columns mean."""
    lines = [
        "| run | without | class | cases | Dice | 95 % interval | loss | 95 % interval |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        loss = "" if row.loss is None else f"{row.loss:+.3f}"
        lines.append(
            f"| {row.run} | {row.without} | {row.name} | {row.num_cases} | {row.dice:.3f} "
            f"| {_interval(row.dice_interval, '.3f')} | {loss} "
            f"| {_interval(row.loss_interval, '+.3f')} |"
        )
    if differences:
        lines += [
            "",
            "| A less B | without | class | cases | loss A - B | 95 % interval | p | p corr. |",
            "|---|---|---|---:|---:|---:|---:|---:|",
        ]
    for row in differences:
        p = ("", "") if row.p is None else (f"{row.p:.2g}", f"{row.corrected_p:.2g}")
        lines.append(
            f"| {row.run_a} - {row.run_b} | {row.without} | {row.name} | {row.num_cases} "
            f"| {row.difference:+.3f} | {_interval(row.interval, '+.3f')} | {' | '.join(p)} |"
        )
    lines += [
        "",
        "Positive cases, each predicted by the network that had not seen it. Loss: Dice with all "
        "modalities less Dice without this one, paired. Intervals: BCa bootstrap over patients. "
        "p: sign-flip permutation test, two-sided; p corr.: for the number of rows (Holm).",
    ]
    few = min(row.num_patients for row in rows)
    if few < statistics.FEW_PATIENTS:
        lines.append(f"Warning: {statistics.few_patients_warning(few)}")
    return "\n".join(lines)


def _interval(ends: Sequence[float] | None, form: str) -> str:
    return "" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


@dataclasses.dataclass(frozen=True)
class MissingConfig(RevisitCommand):
    """Dice of finished runs with each modality withheld; the first is held against the others."""


def run(config: MissingConfig) -> tuple[list[Withheld], list[LossDifference]]:
    """Measure and compare the runs; prints the tables."""
    config.refuse_nothing()
    measured = [
        (str(folder), *measure(folder, config.accelerator, config.folds)) for folder in config.runs
    ]
    rows = [row for name, dice, patients in measured for row in summarise(name, dice, patients)]
    (first, dice, patients), *others = measured
    differences = [
        row
        for name, other, _ in others
        for row in compare_losses(first, dice, name, other, patients)
    ]
    tested = [row.p for row in differences if row.p is not None]
    corrected = iter(statistics.holm(tested))
    differences = [
        row if row.p is None else dataclasses.replace(row, corrected_p=next(corrected))
        for row in differences
    ]
    log(format_table(rows, differences))
    config.write(dice=rows, differences=differences)
    return rows, differences


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    prog = program("experiments.missing_modalities")
    run(tyro.cli(MissingConfig, prog=prog, args=arguments, registry=REGISTRY))


if __name__ == "__main__":
    run_main(main)
