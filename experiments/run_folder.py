"""What a run folder is: names of its files, reading and writing them, which folds are done.

No other file knows these names. Everything that is read again carries a schema number.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.files import naming_path
from data_pipelines.serving import loading, splits
from experiments.measuring.mean_shape import MeanShape
from experiments.measuring.metrics import METRICS
from experiments.measuring.rows import Row
from experiments.measuring.summary import Summary, summarise
from experiments.measuring.training_data import SCHEMA as DATA_SCHEMA
from experiments.measuring.training_data import TrainingData, gather
from experiments.process import records
from experiments.process.environment import Environment, environment
from experiments.process.records import INLINE
from experiments.process.storage import HOLDER, LOCK, TEMPORARY, file_sha256, write_text
from experiments.settings.config import ALL, Config, FoldsAsked, folds_asked
from experiments.settings.stored import differences, from_json, to_json

SCHEMA = 2
"""Version of the records of a run. Raise it with any change of one, and add its migration.

1: written without a number; 2: the same content, with it.
"""


def fold_title(fold: int, num_folds: int) -> str:
    """A fold in the account of a run: counted from 0, as its folder and in every file and page."""
    words = fold_words(fold)
    return words if fold == ALL else f"{words} ({fold + 1} of {num_folds})"


def fold_words(fold: int) -> str:
    """A fold by its number."""
    return "the network of all cases" if fold == ALL else f"fold {fold}"


# What the files hold ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """``config.json``: what a run is.

    Attributes:
        config: JSON values of its ``Config``.
        data_fingerprint: of its data set.
        plan_sha256: of the values of the plan that it follows; empty without one.
    """

    config: Mapping[str, object]
    data_fingerprint: str = ""
    plan_sha256: str = ""


@dataclasses.dataclass(frozen=True)
class Best:
    """The best look at the validation fold; None before the first that found a positive case."""

    step: int | None = None
    validation_dice: float | None = None


@dataclasses.dataclass(frozen=True)
class FoldSummary:
    """What the training and the prediction of a fold took and came to.

    Attributes:
        first_step_s: of the first step, most of it to compile.
        train_s: of all steps, over all starts.
        examples_per_s, steps_per_s: without the first step after each start.
        loss: of the last steps; None if no step made an update.
        skipped_updates: left out because something was not finite.
        best: chosen on the validation fold.
        steps_per_call: steps that one call of the program makes.
        folds_side_by_side: that were trained together.
        input_wait_share: of the time, waiting for batches.
        predict_s: to predict and measure its cases.
        peak_memory_gb: of the device, so far.
        started_from: whose weights it started from, and what of them fitted; empty if from none.
    """

    first_step_s: float
    train_s: float
    examples_per_s: float
    steps_per_s: float
    loss: float | None
    skipped_updates: int
    best: Best
    steps_per_call: int = 1
    folds_side_by_side: int = 1
    input_wait_share: float = 0.0
    predict_s: float | None = None
    peak_memory_gb: float | None = None
    started_from: str = ""


@dataclasses.dataclass(frozen=True)
class FoldResults:
    """``metrics.json`` of a fold."""

    metric_per_case: tuple[Row, ...]
    summary: FoldSummary


@dataclasses.dataclass(frozen=True)
class CaseRecord:
    """A case that is predicted: by which weights, into which files, and what was measured.

    Attributes:
        weights: their hash.
        files: hash of each file, by its name in the folder of the fold.
        rows: one for each class.
    """

    weights: str
    files: Mapping[str, str]
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Results:
    """``metrics.json``: all figures, and of a run what was asked and done.

    Attributes:
        summary: the figures.
        target, classes, threshold: what was predicted, and where a probability is foreground.
        checkpoint: whose weights were used: ``ema`` or ``last``.
        num_folds, folds_done: of the run; those that the figures are of.
        baseline_mean_shape: Dice without looking at an image.
        best_checkpoint: of each fold, chosen on its validation cases.
        fold_summaries: of each fold.
        parts: what the network tells apart, where classes are regions made of it.
    """

    summary: Summary = dataclasses.field(metadata=INLINE)
    target: str | None = None
    classes: tuple[str, ...] | None = None
    threshold: float | None = None
    checkpoint: str | None = None
    num_folds: int | None = None
    folds_done: tuple[int, ...] | None = None
    baseline_mean_shape: MeanShape | None = None
    best_checkpoint: Mapping[int, Best] | None = None
    fold_summaries: Mapping[int, FoldSummary] | None = None
    parts: tuple[str, ...] | None = None


def _with_summary(content: dict[str, object]) -> dict[str, object]:
    """Schema 1 to 2: the earliest runs lack intervals, which follow from their rows."""
    if "interval" in content:
        return content
    rows = records.decode(_Rows, content, "metrics.json")
    summary = summarise(rows.metric_per_case, [fold.fold for fold in rows.per_fold])
    return content | records.encode(summary)


@dataclasses.dataclass(frozen=True)
class _Number:
    fold: int


@dataclasses.dataclass(frozen=True)
class _Rows:
    metric_per_case: tuple[Row, ...]
    per_fold: tuple[_Number, ...]


# Where they are -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FoldFolder:
    """The part of a run folder that belongs to one fold."""

    path: Path

    @property
    def history(self) -> Path:
        """Training curves, CSV."""
        return self.path / "history.csv"

    @property
    def tensorboard(self) -> Path:
        """The same for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """Folder of what the report's pictures are drawn from."""
        return self.path / "figures"

    @property
    def metrics(self) -> Path:
        """What the fold came to; written last, it ends the fold."""
        return self.path / "metrics.json"

    def figure(self, case_id: str) -> Path:
        """What the report's pictures of a case are drawn from."""
        return self.figures / f"{case_id}.npz"

    def mask(self, case_id: str) -> Path:
        """Mask of a case."""
        return self.path / "masks" / f"{case_id}.nii.gz"

    def probabilities(self, case_id: str, classes: Sequence[str]) -> list[Path]:
        """Probabilities of a case, of each class."""
        suffixes = [""] if len(classes) == 1 else [f"_{name}" for name in classes]
        return [self.path / "probabilities" / f"{case_id}{suffix}.nii.gz" for suffix in suffixes]

    def read_probabilities(self, case_id: str, classes: Sequence[str]) -> np.ndarray:
        """Probabilities ``d h w k`` of a case in its T2W frame: of several classes background, too.

        Raises:
            DataError: a file is missing, or cannot be read.
        """
        from data_pipelines.reading.volume_io import read_volume  # slow to load, not for --help

        files = self.probabilities(case_id, classes)
        foreground = np.stack([read_volume(file).array for file in files], -1)
        if len(classes) == 1:
            return foreground
        return np.concatenate([1 - foreground.sum(-1, keepdims=True), foreground], -1)

    def not_finite(self, step: int) -> Path:
        """What is needed to repeat a step whose loss or gradient was not finite."""
        return self.path / f"not_finite_{step:08d}.npz"

    def _case(self, case_id: str) -> Path:
        return self.path / "cases" / f"{case_id}.json"

    def store_case(
        self, case_id: str, weights: str, rows: Sequence[Row], classes: Sequence[str]
    ) -> None:
        """Mark a case as predicted: its rows, with hashes of the weights and of its files."""
        files = {
            str(path.relative_to(self.path)): file_sha256(path)
            for path in (self.mask(case_id), *self.probabilities(case_id, classes))
        }
        record = CaseRecord(weights, files, tuple(rows))
        records.write_record(self._case(case_id), record, schema=SCHEMA)

    def read_case(self, case_id: str) -> CaseRecord:
        """The record of a case.

        Raises:
            OSError: there is none.
            DataError: it is not as this version writes it.
        """
        return records.read_record(CaseRecord, self._case(case_id), schema=SCHEMA)

    def stored_rows(self, case_id: str, weights: str) -> tuple[Row, ...] | None:
        """The rows of a case that these weights predicted and whose files are intact, else None.

        None also where another version measured other metrics: the case is then predicted again.
        """
        try:
            record = self.read_case(case_id)
            files = {name: file_sha256(self.path / name) for name in record.files}
        except (OSError, DataError):
            return None
        return record.rows if (record.weights, record.files) == (weights, files) else None

    def write_results(self, results: FoldResults) -> None:
        """End the fold."""
        records.write_record(self.metrics, results, schema=SCHEMA)

    def read_results(self) -> FoldResults:
        """What the fold came to.

        Raises:
            DataError: the file is not as this version writes it.
        """
        return records.read_record(FoldResults, self.metrics, schema=SCHEMA)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of one cross-validation."""

    path: Path

    @property
    def config(self) -> Path:
        """Configuration and fingerprint of the data."""
        return self.path / "config.json"

    @property
    def plan(self) -> Path:
        """The plan that the run follows, if it follows one."""
        return self.path / "plan.json"

    @property
    def environment(self) -> Path:
        """Versions, commit, device, time."""
        return self.path / "environment.json"

    @property
    def training_data(self) -> Path:
        """What the data are like."""
        return self.path / "training_data.json"

    @property
    def folds(self) -> Path:
        """Which cases train and validate in which fold."""
        return self.path / "folds.json"

    @property
    def metrics(self) -> Path:
        """All figures."""
        return self.path / "metrics.json"

    @property
    def table(self) -> Path:
        """One line for each case and class, CSV."""
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        """All that was said, with the command lines and versions."""
        return self.path / "log.txt"

    @property
    def report_html(self) -> Path:
        """The report as a page."""
        return self.path / "report.html"

    @property
    def report_markdown(self) -> Path:
        """The report as a text."""
        return self.path / "report.md"

    @property
    def first(self) -> Path:
        """Of a cascade, the run folder of the first network."""
        return self.path / "first"

    def fold(self, number: int) -> FoldFolder:
        """The part of a fold, counted from 0."""
        return FoldFolder(self.path / fold_name(number))

    def begun(self) -> Iterator[tuple[int, FoldFolder]]:
        """Number and folder of each fold that is there, in their order."""
        found = (re.fullmatch(r"fold_(\d+)", path.name) for path in self.path.glob("fold_*"))
        for number in sorted(int(match[1]) for match in found if match):
            yield number, self.fold(number)

    def is_done(self, fold: int) -> bool:
        """Whether a fold is trained and measured."""
        return self.fold(fold).metrics.is_file()

    def done(self, num_folds: int) -> list[int]:
        """The folds that are trained and measured."""
        return [fold for fold in range(num_folds) if self.is_done(fold)]

    def read_record(self) -> RunRecord:
        """Configuration, as JSON values, and fingerprint of the data.

        Raises:
            ConfigError: the folder holds no run.
        """
        if not self.config.is_file():
            raise ConfigError(
                f"a run folder must hold config.json; got none in {self.path}. "
                "Name a folder written by python -m experiments.cv."
            )
        return records.read_record(RunRecord, self.config, schema=SCHEMA)

    def read_config(self) -> Config:
        """The configuration; errors as ``read_record``."""
        return from_json(Config, self.read_record().config)

    def read_environment(self) -> Environment:
        """What the run was made with; nothing is known without the file."""
        if not self.environment.is_file():
            return Environment()
        return records.read_record(Environment, self.environment, schema=SCHEMA)

    def read_training_data(self) -> TrainingData | None:
        """What the data are like; None of runs that were made before that was recorded."""
        if not self.training_data.is_file():
            return None
        return records.read_record(TrainingData, self.training_data, schema=DATA_SCHEMA)

    def read_folds(self) -> splits.Folds:
        """The folds."""
        return splits.Folds.load(self.folds)

    def read_results(self) -> Results:
        """All figures.

        Raises:
            MissingDataError: there are none.
            DataError: they are not as this version writes them.
        """
        if not self.metrics.is_file():
            raise MissingDataError(
                f"a run folder must hold metrics.json; got none in {self.path}. "
                "Finish the run with python -m experiments.cv, or name another folder."
            )
        return records.read_record(
            Results, self.metrics, schema=SCHEMA, migrations={1: _with_summary}
        )

    @property
    def is_reported(self) -> bool:
        """Whether the report is of the results that are there, which are written before it."""
        pages = (self.report_markdown, self.report_html)
        return all(page.exists() for page in pages) and all(
            page.stat().st_mtime_ns >= self.metrics.stat().st_mtime_ns for page in pages
        )

    def write_results(self, results: Results) -> None:
        """Write all of them as JSON, and the rows (one for each case and class) as CSV.

        Each file appears whole or not at all; what is not finite (a diverged loss) is ``null``.
        """
        write_text(self.table, _csv(results.summary.metric_per_case))
        records.write_record(self.metrics, results, schema=SCHEMA)

    def refuse_other(self, config: Config) -> None:
        """Raise ``ConfigError`` if the folder holds something that is not this run."""
        before = (self.folds, self.environment, self.training_data)  # of the configuration
        begun = {LOCK, HOLDER, *(path.name for path in before)}
        if not self.path.exists() or (
            self.path.is_dir()
            and all(p.name in begun or TEMPORARY.fullmatch(p.name) for p in self.path.iterdir())
        ):
            return
        if not self.config.is_file():
            raise ConfigError(
                f"the run folder must be new or hold a run; {self.path} holds other files. "
                "Name another folder with --output."
            )
        changed = differences(to_json(self.read_config()), to_json(config))
        if changed:
            raise ConfigError(
                "a run folder holds one configuration; "
                f"{self.path} differs from what is asked for:\n  " + "\n  ".join(changed) + "\n"
                "Name another folder with --output, or remove that one."
            )

    def open(
        self, config: Config, source: loading.CaseSource, folds: splits.Folds, plan_sha256: str = ""
    ) -> None:
        """Fill a new folder, or check that it was made from the same data and folds.

        Raises:
            ConfigError: data or folds are others.
            DataError: a fold that is done was measured otherwise than this version does.
        """
        if self.config.exists():
            if (
                self.read_record().data_fingerprint != source.fingerprint
                or self.read_folds().sha256 != folds.sha256
            ):
                raise ConfigError(
                    "a run continues on the data and folds it began with; those of "
                    f"{self.path} have changed since. Name another folder with --output, or "
                    "restore the data."
                )
            for fold in self.done(config.num_folds):
                self.fold(fold).read_results()  # before hours of training, not after
            if not self.training_data.is_file():  # begun by an earlier version
                self._write_training_data(config, source)
            return
        with naming_path(self.folds):
            folds.save(self.folds)
        records.write_record(self.environment, environment(), schema=SCHEMA)
        self._write_training_data(config, source)
        record = RunRecord(to_json(config), source.fingerprint, plan_sha256)
        records.write_record(self.config, record, schema=SCHEMA)

    def _write_training_data(self, config: Config, source: loading.CaseSource) -> None:
        data = gather(config.data.name, source.info, config.data.modalities)
        records.write_record(self.training_data, data, schema=DATA_SCHEMA)

    def members(self, config: Config, folds: FoldsAsked) -> list[int]:
        """The folds to use, all of which must be done; ``ALL`` only where it is asked for.

        Raises:
            ConfigError: folds that do not exist or are not done.
        """
        wanted, done = folds_asked(folds, config.num_folds), self.done(config.num_folds)
        there = [*done, ALL] if folds == "all" and self.is_done(ALL) else done
        missing = [fold for fold in wanted if fold not in there]
        if missing or not wanted:
            lacking = " ".join("all" if fold == ALL else str(fold) for fold in missing)
            lacking = lacking or "a choice"
            or_pass = f", or pass --folds {' '.join(map(str, done))}" if done else ""
            or_pass = or_pass or (", or pass --folds all" if self.is_done(ALL) else "")
            raise ConfigError(
                f"every fold must be done; {self.path} lacks {lacking}. "
                f"Run python -m experiments.cv again{or_pass}."
            )
        return wanted


def training_cases(folds: splits.Folds, number: int) -> tuple[str, ...]:
    """Sorted ids of the cases that a fold, or the network of all cases, trains on."""
    return folds.cases if number == ALL else folds.training(number)


def fold_name(number: int) -> str:
    """Name of the folder of a fold, and of the member of an exported model that it becomes."""
    return f"fold_{'all' if number == ALL else number}"


def _csv(rows: Sequence[Row]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["case_id", "patient_id", "fold", "class", *METRICS])
    for row in rows:
        values = [row.metrics[name] for name in METRICS]
        writer.writerow([row.case_id, row.patient_id, row.fold, row.name, *values])
    return table.getvalue()


def folder_of(config: Config) -> RunFolder:
    """The run folder, which ``complete`` has named."""
    assert config.output is not None, "complete() names the run folder"
    return RunFolder(config.output)
