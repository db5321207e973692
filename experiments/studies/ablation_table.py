"""The table of an ablation: its rows over all seeds, each compared with the full model."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cmsad_jax.modules import baselines
from cmsad_jax.modules.network import NetworkConfig
from data_pipelines.faults import DataError
from experiments.measuring import statistics
from experiments.measuring.rows import Ends
from experiments.measuring.summary import Summary, summarise
from experiments.process.records import INLINE, to_text
from experiments.process.storage import write_text
from experiments.run_folder import RunFolder
from experiments.settings.config import Config, folds_asked, window

FULL = "full"
LATE = "late-fusion"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row: what it is called, and its configuration but for seed and run folder."""

    name: str
    config: Config


def folder_of_row(output: Path, row: str, seed: int) -> Path:
    """Where a row is trained with a seed; a sweep's value may hold what a path must not."""
    name = "".join(c if c.isalnum() or c in "._=-+" else "_" for c in row)
    return output / name / f"seed_{seed}"


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a network: its weights, and the operations of one forward pass of a window."""

    num_parameters: float
    num_operations: float


@dataclasses.dataclass(frozen=True)
class AgainstFull:
    """A row less the full model, paired on cases, each the mean over its seeds.

    Attributes:
        difference: mean over the cases; ``interval`` is its 95 % bootstrap interval over patients.
        tests: of the difference.
        corrected_p: of the permutation test, for the number of rows (Holm).
    """

    difference: float
    interval: Ends | None
    tests: statistics.PairedTests = dataclasses.field(metadata=INLINE)
    corrected_p: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """A row over its seeds.

    Attributes:
        num_seeds, num_cases, num_patients: seeds, positive cases, and whose they are.
        dice: mean over cases and seeds; ``interval`` is its 95 % bootstrap interval over patients.
        sd_over_seeds: of the mean Dice; None with one.
        average_precision, auroc: of detection, means over the seeds; None where one has none.
    """

    num_seeds: int
    num_cases: int
    num_patients: int
    dice: float | None
    interval: Ends | None
    sd_over_seeds: float | None
    average_precision: float | None
    auroc: float | None


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of the table; its size is not known of one that is not trained by itself alone."""

    figures: Figures = dataclasses.field(metadata=INLINE)
    size: Size | None = dataclasses.field(metadata=INLINE)
    against_full: AgainstFull | None


@dataclasses.dataclass(frozen=True)
class AblationTable:
    """The rows that are done with all of the seeds."""

    seeds: tuple[int, ...]
    rows: dict[str, TableRow]


def write_table(
    output: Path, rows: Sequence[Variant], seeds: Sequence[int], *, late_fusion: bool
) -> AblationTable:
    """Compare the rows that are done with all of ``seeds`` and folds, and write the table.

    It holds these rows alone, and late fusion, whose runs are averages of others, if asked for. Of
    runs that hold more folds than this ablation, those that it asks for count.
    """
    base = rows[0].config
    folds = sorted({*folds_asked(base.folds, base.num_folds)})
    configs = {variant.name: variant.config for variant in rows}
    done: dict[str, list[Summary]] = {}
    for name in (*configs, *([LATE] if late_fusion else [])):
        found = [_of_folds(folder_of_row(output, name, seed), folds) for seed in seeds]
        of_seeds = [summary for summary in found if summary is not None]
        if len(of_seeds) == len(found):
            done[name] = of_seeds
    sizes = {
        name: _size(config.network, window(config))
        for name, config in configs.items()
        if name in done
    }
    alone = [size for name, size in sizes.items() if name.endswith("-alone")]
    if LATE in done and alone:
        sizes[LATE] = Size(
            num_parameters=sum(size.num_parameters for size in alone),
            num_operations=sum(size.num_operations for size in alone),
        )
    figures = {name: summarise_row(of_seeds) for name, of_seeds in done.items()}
    compared: dict[str, AgainstFull] = {}
    if FULL in done and figures[FULL].num_cases:
        compared = {name: compare_rows(done[name], done[FULL]) for name in done if name != FULL}
    corrected = statistics.holm([entry.tests.permutation_p for entry in compared.values()])
    for name, p in zip([*compared], corrected, strict=True):
        compared[name] = dataclasses.replace(compared[name], corrected_p=p)
    table = AblationTable(
        tuple(seeds),
        {
            name: TableRow(of_row, sizes.get(name), compared.get(name))
            for name, of_row in figures.items()
        },
    )
    write_text(output / "ablation.json", to_text(table))
    write_text(output / "ablation.md", format_table(table) + "\n")
    return table


def _of_folds(run: Path, folds: Sequence[int]) -> Summary | None:
    """The figures of a run over these folds; None if some of them are not done."""
    folder = RunFolder(run)
    if not folder.metrics.exists():
        return None
    results = folder.read_results()
    done = {*(results.folds_done or ())}
    if not done >= {*folds}:
        return None
    if done == {*folds}:
        return results.summary
    return summarise([row for row in results.summary.metric_per_case if row.fold in folds], folds)


@functools.cache
def _size(network: NetworkConfig, space: tuple[int, ...]) -> Size:
    return Size(
        num_parameters=baselines.count_parameters(network, space),
        num_operations=baselines.count_operations(network, space),
    )


def dice_of_cases(of_seeds: Sequence[Summary]) -> tuple[np.ndarray, list[str], list[str]]:
    """Dice of each positive case: mean over its classes, then over the seeds; cases and patients.

    Raises:
        DataError: the seeds evaluated other cases.
    """
    found: list[dict[str, float]] = []
    patients: dict[str, str] = {}
    for summary in of_seeds:
        cases: dict[str, list[float]] = {}
        for row in summary.metric_per_case:
            if row.dice is not None:
                cases.setdefault(row.case_id, []).append(row.dice)
                patients[row.case_id] = row.patient_id
        found.append({case: float(np.mean(scores)) for case, scores in cases.items()})
    names = sorted(found[0])
    if any(sorted(cases) != names for cases in found):
        raise DataError(
            "all seeds of a row must have evaluated the same cases; got different ones. "
            "Finish the folds of every seed with the same command."
        )
    dice = np.array([[cases[name] for name in names] for cases in found])
    return dice, names, [patients[name] for name in names]


def summarise_row(of_seeds: Sequence[Summary]) -> Figures:
    """Mean Dice with its interval over patients, spread over seeds, and detection."""
    dice, _, patients = dice_of_cases(of_seeds)
    means = dice.mean(1) if patients else dice
    detections = [summary.detection for summary in of_seeds]
    return Figures(
        num_seeds=len(of_seeds),
        num_cases=dice.shape[1],
        num_patients=len(set(patients)),
        dice=float(means.mean()) if patients else None,
        interval=statistics.bootstrap_interval(dice.mean(0), patients) if patients else None,
        sd_over_seeds=float(means.std(ddof=1)) if len(means) > 1 and patients else None,
        average_precision=_mean([d and d.average_precision for d in detections]),
        auroc=_mean([d and d.auroc for d in detections]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """None if any of them is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def compare_rows(of_seeds: Sequence[Summary], full: Sequence[Summary]) -> AgainstFull:
    """The row less the full model; ``corrected_p`` is still that of one comparison."""
    dice, cases, patients = dice_of_cases(of_seeds)
    of_full, same, _ = dice_of_cases(full)
    if cases != same:
        raise DataError(
            "all rows must have evaluated the same cases; got different ones. "
            "Finish the folds of every row with the same command."
        )
    differences = dice.mean(0) - of_full.mean(0)
    tests = statistics.paired_tests(differences, patients)
    return AgainstFull(
        difference=float(differences.mean()),
        interval=statistics.bootstrap_interval(differences, patients),
        tests=tests,
        corrected_p=tests.permutation_p,
    )


def format_table(table: AblationTable) -> str:
    """The table in Markdown, with what its columns mean."""
    lines = [
        "| row | parameters | GFLOP | Dice | 95 % interval | sd over seeds | AP | AUROC "
        "| less full | 95 % interval | p | p corrected |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in table.rows.items():
        figures, size, against = row.figures, row.size, row.against_full
        cells = [
            name,
            "" if size is None else f"{size.num_parameters:,}",
            "" if size is None else f"{size.num_operations / 1e9:.2f}",
            _number(figures.dice),
            _interval(figures.interval),
            _number(figures.sd_over_seeds),
            _number(figures.average_precision),
            _number(figures.auroc),
            *(
                (
                    f"{against.difference:+.3f}",
                    _interval(against.interval),
                    f"{against.tests.permutation_p:.2g}",
                    f"{against.corrected_p:.2g}",
                )
                if against
                else ("", "", "", "")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = ", ".join(map(str, table.seeds))
    lines.append("")
    lines.append(
        f"Seeds {seeds}. Dice of positive cases, mean over seeds. Intervals: BCa bootstrap over "
        "patients; they do not cover chance in training, the sd over seeds does. p: sign-flip "
        "permutation test of the difference to the full model, paired on cases; corrected for the "
        "number of rows (Holm). GFLOP: one forward pass of a window."
    )
    few = [row.figures.num_patients for row in table.rows.values()]
    if few and min(few) < statistics.FEW_PATIENTS:
        lines.append(f"Warning: {statistics.few_patients_warning(min(few))}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(ends: Ends | None) -> str:
    return "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
