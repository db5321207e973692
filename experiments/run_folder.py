"""What a run folder is: names of its files, reading and writing them, which folds are done."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmsad_jax.types import ConfigError
from data_pipelines.faults import MissingDataError
from data_pipelines.serving import loading, splits
from experiments.measuring.metrics import METRICS
from experiments.process.environment import environment
from experiments.process.storage import (
    LOCK,
    TEMPORARY,
    file_sha256,
    naming_path,
    read_json,
    write_json,
    write_text,
)
from experiments.settings.config import Config
from experiments.settings.stored import differences, from_json, to_json


def is_done(output: Path, fold: int) -> bool:
    """Whether a fold of the run folder is trained and measured."""
    return (output / f"fold_{fold}" / "metrics.json").exists()


def refuse_other_run(output: Path, config: Config) -> None:
    """Raise ``ConfigError`` if the folder holds something that is not this run."""
    begun = {LOCK, "folds.json", "environment.json"}  # written before config.json
    if not output.exists() or (
        output.is_dir()
        and all(p.name in begun or TEMPORARY.fullmatch(p.name) for p in output.iterdir())
    ):
        return
    file = output / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"the run folder must be new or hold a run; {output} holds other files. "
            "Name another folder with --output."
        )
    before = to_json(from_json(Config, read_json(file)["config"]))
    changed = differences(before, to_json(config))
    if changed:
        raise ConfigError(
            "a run folder holds one configuration; "
            f"{output} differs from what is asked for:\n  " + "\n  ".join(changed) + "\n"
            "Name another folder with --output, or remove that one."
        )


def open_run(output: Path, config: Config, source: loading.CaseSource, folds: splits.Folds) -> None:
    """Fill a new run folder, or check that it was made from the same data and folds."""
    record = {"config": to_json(config), "data_fingerprint": source.fingerprint}
    if (output / "config.json").exists():
        old = read_json(output / "config.json")
        if (
            old["data_fingerprint"] != source.fingerprint
            or splits.Folds.load(output / "folds.json").sha256 != folds.sha256
        ):
            raise ConfigError(
                f"a run continues on the data and folds it began with; those of {output} have "
                "changed since. Name another folder with --output, or restore the data."
            )
        return
    with naming_path(output / "folds.json"):
        folds.save(output / "folds.json")
    write_json(output / "environment.json", environment())
    write_json(output / "config.json", record)


def prediction_files(directory: Path, case_id: str, classes: Sequence[str]) -> list[Path]:
    """The mask of a case, then the probabilities of each class."""
    suffixes = [""] if len(classes) == 1 else [f"_{name}" for name in classes]
    return [directory / "masks" / f"{case_id}.nii.gz"] + [
        directory / "probabilities" / f"{case_id}{suffix}.nii.gz" for suffix in suffixes
    ]


def store_rows(
    directory: Path,
    case_id: str,
    weights: str,
    rows: Sequence[dict[str, Any]],
    classes: Sequence[str],
) -> None:
    """Mark a case as predicted: its rows, with the hashes of the weights and of its files."""
    files = {
        str(path.relative_to(directory)): file_sha256(path)
        for path in prediction_files(directory, case_id, classes)
    }
    write_json(
        directory / "cases" / f"{case_id}.json", {"weights": weights, "files": files, "rows": rows}
    )


def stored_rows(directory: Path, case_id: str, weights: str) -> list[dict[str, Any]] | None:
    """The rows of a case that these weights predicted and whose files are intact, else None."""
    path = directory / "cases" / f"{case_id}.json"
    try:
        record = json.loads(path.read_text("utf-8"))
        files = {name: file_sha256(directory / name) for name in record["files"]}
    except (OSError, ValueError):
        return None
    return record["rows"] if (record["weights"], record["files"]) == (weights, files) else None


def write_metrics(summary: Mapping[str, Any], json_path: Path, csv_path: Path) -> None:
    """Write a summary: all of it as JSON, its rows (one per case and class) as CSV.

    Each file appears whole or not at all. Further keys of ``summary`` go into the JSON too; NaN and
    infinity anywhere in it (a diverged loss) become ``null``.
    """
    table = io.StringIO()
    names = ("case_id", "patient_id", "fold", "class", *METRICS)
    writer = csv.DictWriter(table, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary["metric_per_case"])
    write_text(csv_path, table.getvalue())
    write_text(json_path, json.dumps(_without_nan(summary), indent=1, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def read_metrics(run: Path) -> dict[str, Any]:
    """The ``metrics.json`` of a run folder."""
    path = Path(run) / "metrics.json"
    if not path.is_file():
        raise MissingDataError(
            f"a run folder must hold metrics.json; got none in {run}. "
            "Finish the run with python -m experiments.cv, or name another folder."
        )
    return read_json(path)


def read_run(run: Path) -> tuple[Config, dict[str, Any]]:
    """Configuration and the whole record (``config.json``) of a run folder.

    Raises:
        ConfigError: the folder holds no run.
    """
    file = run / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"a run folder must hold config.json; got none in {run}. "
            "Name a folder written by python -m experiments.cv."
        )
    record = read_json(file)
    return from_json(Config, record["config"]), record


def run_members(run: Path, config: Config, folds: Sequence[int] | None) -> list[int]:
    """The folds to use, all of which must be done.

    Raises:
        ConfigError: folds that do not exist or are not done.
    """
    wanted = list(range(config.num_folds)) if folds is None else list(folds)
    done = [f for f in range(config.num_folds) if (run / f"fold_{f}" / "metrics.json").is_file()]
    missing = [fold for fold in wanted if fold not in done]
    if missing or not wanted:
        raise ConfigError(
            f"every fold must be done; {run} lacks {' '.join(map(str, missing)) or 'a choice'}. "
            + (
                f"Run python -m experiments.cv again, or pass --folds {' '.join(map(str, done))}."
                if done
                else "Run python -m experiments.cv again."
            )
        )
    return wanted


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
