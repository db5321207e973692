"""The table of an ablation: its rows over all seeds, each compared with the full model."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmsad_jax.modules import baselines
from cmsad_jax.modules.network import NetworkConfig
from data_pipelines.faults import DataError
from experiments import run_folder
from experiments.measuring import statistics, summary
from experiments.process import storage
from experiments.settings.config import Config, window

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


def write_table(
    output: Path, rows: Sequence[Variant], seeds: Sequence[int], *, late_fusion: bool
) -> dict[str, Any]:
    """Compare the rows that are done with all of ``seeds`` and folds, and write the table.

    It holds these rows alone, and late fusion, whose runs are averages of others, if asked for. Of
    runs that hold more folds than this ablation, those that it asks for count.
    """
    base = rows[0].config
    folds = list(range(base.num_folds)) if base.folds is None else sorted(set(base.folds))
    configs = {variant.name: variant.config for variant in rows}
    names = [*configs, *([LATE] if late_fusion else [])]
    runs = {name: [folder_of_row(output, name, seed) for seed in seeds] for name in names}
    found = {name: [_of_folds(run, folds) for run in folders] for name, folders in runs.items()}
    done = {
        name: [metrics for metrics in of_seeds if metrics is not None]
        for name, of_seeds in found.items()
        if None not in of_seeds
    }
    entries = {name: summarise_row(metrics) for name, metrics in done.items()}
    sizes = {
        name: _size(config.network, window(config))
        for name, config in configs.items()
        if name in done
    }
    if LATE in done and (
        alone := [size for name, size in sizes.items() if name.endswith("-alone")]
    ):
        sizes[LATE] = {key: sum(size[key] for size in alone) for key in alone[0]}
    compared = {
        name: compare_rows(done[name], done[FULL])
        for name in done
        if name != FULL and FULL in done and entries[FULL]["num_cases"]
    }
    corrected = statistics.holm([entry["permutation_p"] for entry in compared.values()])
    for name, p in zip(compared, corrected, strict=True):
        compared[name]["corrected_p"] = p
    table = {
        "seeds": list(seeds),
        "rows": {
            name: entry | sizes.get(name, {}) | {"against_full": compared.get(name)}
            for name, entry in entries.items()
        },
    }
    text = json.dumps(table, indent=1, allow_nan=False)
    storage.write_text(output / "ablation.json", text + "\n")
    storage.write_text(output / "ablation.md", format_table(table) + "\n")
    return table


def _of_folds(run: Path, folds: Sequence[int]) -> Mapping[str, Any] | None:
    """The metrics of a run over these folds; None if some of them are not done."""
    if not (run / "metrics.json").exists():
        return None
    metrics = run_folder.read_metrics(run)
    done = set(metrics["folds_done"])
    if not done >= set(folds):
        return None
    if done == set(folds):
        return metrics
    return summary.summarise(
        [row for row in metrics["metric_per_case"] if row["fold"] in folds], folds
    )


@functools.cache
def _size(network: NetworkConfig, space: tuple[int, ...]) -> dict[str, float]:
    return {
        "num_parameters": baselines.count_parameters(network, space),
        "num_operations": baselines.count_operations(network, space),
    }


def dice_of_cases(metrics: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, list[str], list[str]]:
    """Dice of each positive case: mean over its classes, then over the seeds; cases and patients.

    Raises:
        DataError: the seeds evaluated other cases.
    """
    found: list[dict[str, float]] = []
    patients: dict[str, str] = {}
    for of_seed in metrics:
        cases: dict[str, list[float]] = {}
        for row in of_seed["metric_per_case"]:
            if row["dice"] is not None:
                cases.setdefault(row["case_id"], []).append(row["dice"])
                patients[row["case_id"]] = row["patient_id"]
        found.append({case: float(np.mean(scores)) for case, scores in cases.items()})
    names = sorted(found[0])
    if any(sorted(cases) != names for cases in found):
        raise DataError(
            "all seeds of a row must have evaluated the same cases; got different ones. "
            "Finish the folds of every seed with the same command."
        )
    dice = np.array([[cases[name] for name in names] for cases in found])
    return dice, names, [patients[name] for name in names]


def summarise_row(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean Dice with its interval over patients, spread over seeds, and detection."""
    dice, _, patients = dice_of_cases(metrics)
    means = dice.mean(1) if patients else dice

    def detection(key: str) -> float | None:
        values = [of_seed.get("detection", {}).get(key) for of_seed in metrics]
        return None if None in values else float(np.mean(values))

    return {
        "num_seeds": len(metrics),
        "num_cases": dice.shape[1],
        "num_patients": len(set(patients)),
        "dice": float(means.mean()) if patients else None,
        "interval": statistics.bootstrap_interval(dice.mean(0), patients) if patients else None,
        "sd_over_seeds": float(means.std(ddof=1)) if len(means) > 1 and patients else None,
        "average_precision": detection("average_precision"),
        "auroc": detection("auroc"),
    }


def compare_rows(
    metrics: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The row less the full model, paired on cases, each the mean over its seeds."""
    dice, cases, patients = dice_of_cases(metrics)
    of_full, same, _ = dice_of_cases(full)
    if cases != same:
        raise DataError(
            "all rows must have evaluated the same cases; got different ones. "
            "Finish the folds of every row with the same command."
        )
    differences = dice.mean(0) - of_full.mean(0)
    tests = statistics.paired_tests(differences, patients)
    return {
        "difference": float(differences.mean()),
        "interval": statistics.bootstrap_interval(differences, patients),
        **dataclasses.asdict(tests),
    }


def format_table(table: Mapping[str, Any]) -> str:
    """The table in Markdown, with what its columns mean."""
    lines = [
        "| row | parameters | GFLOP | Dice | 95 % interval | sd over seeds | AP | AUROC "
        "| less full | 95 % interval | p | p corrected |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in table["rows"].items():
        against = row["against_full"]
        cells = [
            name,
            f"{row['num_parameters']:,}" if "num_parameters" in row else "",
            f"{row['num_operations'] / 1e9:.2f}" if "num_operations" in row else "",
            _number(row["dice"]),
            _interval(row["interval"]),
            _number(row["sd_over_seeds"]),
            _number(row["average_precision"]),
            _number(row["auroc"]),
            *(
                (
                    f"{against['difference']:+.3f}",
                    _interval(against["interval"]),
                    f"{against['permutation_p']:.2g}",
                    f"{against['corrected_p']:.2g}",
                )
                if against
                else ("", "", "", "")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = ", ".join(map(str, table["seeds"]))
    lines.append("")
    lines.append(
        f"Seeds {seeds}. Dice of positive cases, mean over seeds. Intervals: BCa bootstrap over "
        "patients; they do not cover chance in training, the sd over seeds does. p: sign-flip "
        "permutation test of the difference to the full model, paired on cases; corrected for the "
        "number of rows (Holm). GFLOP: one forward pass of a window."
    )
    few = [row["num_patients"] for row in table["rows"].values()]
    if few and min(few) < statistics.FEW_PATIENTS:
        lines.append(f"Warning: {statistics.few_patients_warning(min(few))}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
