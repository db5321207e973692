"""The positive cases of a finished run once more, each with the network that had not seen it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias

import tyro

from cmsad_jax.types import ConfigError, Device
from data_pipelines.case import Case
from data_pipelines.faults import DataError
from data_pipelines.progress import progress
from data_pipelines.serving import loading
from experiments.prediction.windows import Params
from experiments.process.records import to_text
from experiments.process.storage import write_text
from experiments.run_folder import RunFolder, fold_title
from experiments.settings.cascade import first_config
from experiments.settings.config import Accelerator, Config
from experiments.studies.cascade import Cascade
from experiments.training.checkpoints import load_params

See: TypeAlias = Callable[[Case], Case]


@dataclasses.dataclass(frozen=True)
class RevisitCommand:
    """What the commands that look at finished runs again are asked."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders of python -m experiments.cv."""
    json: Path | None = None
    """Also write the rows to this file."""
    accelerator: Accelerator = "auto"
    """Where to compute; auto takes the best there is."""
    folds: tuple[int, ...] | None = None
    """Folds to look at. All by default."""

    def refuse_nothing(self) -> None:
        """Raise ``ConfigError`` if no run is named."""
        if not self.runs:
            raise ConfigError("at least one run must be given; got none. Name a run folder.")

    def write(self, **rows: Sequence[object]) -> None:
        """Write rows, which are dataclasses, by the name of their table, if it is asked for."""
        if self.json is not None:
            write_text(self.json, to_text(rows))


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run of ``experiments.cv`` and the positive cases of its validation folds.

    Attributes:
        folder: the run folder.
        config: its configuration.
        source: its data, checked to be those that it was trained on.
        patients: the patient of each positive case.
        of_fold: positive cases of each fold.
    """

    folder: Path
    config: Config
    source: loading.CaseSource
    patients: Mapping[str, str]
    of_fold: Mapping[int, Sequence[str]]

    def cases(self, devices: Sequence[Device]) -> Iterator[tuple[Params, Case, See]]:
        """Weights, case and view: the case is positive, and validated by the fold of the weights.

        The view gives the case as the network is to see it, also where a modality was taken away:
        in a cascade, the box around what the first network of that fold then finds.
        """
        cascade = None
        if self.config.cascade.target:
            first = first_config(self.config, RunFolder(self.folder).first)
            cascade = Cascade(self.config, first, devices)
        for fold, case_ids in self.of_fold.items():
            if not case_ids:
                continue
            params, see = load_params(self.folder, fold), _as_it_is
            if cascade is not None:
                see = partial(_in_box, cascade, cascade.params(fold))
            for case in progress(
                loading.eval_cases(self.source, case_ids),
                description=f"{self.folder.name} {fold_title(fold, self.config.num_folds)}",
                total=len(case_ids),
            ):
                yield params, case, see


def _as_it_is(case: Case) -> Case:
    return case


def _in_box(cascade: Cascade, first: Params, case: Case) -> Case:
    return cascade.see(first, case).cut(case)


def source_of(run: RunFolder, config: Config) -> loading.CaseSource:
    """The data of a run, found again.

    Raises:
        DataError: they are others than those of the run.
    """
    source = loading.build(config.data)
    if source.fingerprint != run.read_record().data_fingerprint:
        raise DataError(
            f"the data must be those that {run.path} was trained on; got others from "
            f"{config.data.name}. Restore the data, or run python -m experiments.cv again."
        )
    return source


def open_run(folder: Path, folds: tuple[int, ...] | None = None) -> FinishedRun:
    """Read a run and find its data again.

    Args:
        folder: a run folder.
        folds: which of its folds; None is all.

    Raises:
        ConfigError: no run, or a fold that is not done.
        DataError: no positive case, or the data are others than those of the run.
    """
    run = RunFolder(folder)
    config = run.read_config()
    members = run.members(config, folds)
    source = source_of(run, config)
    validation = run.read_folds().validation
    patients = {info.case_id: info.patient_id for info in source.info if info.positive}
    of_fold = {
        fold: [case_id for case_id in validation[fold] if case_id in patients] for fold in members
    }
    if not any(of_fold.values()):
        raise DataError(
            f"at least one case must be positive: what is measured lies in the target; {folder} "
            "has none. Name another run."
        )
    return FinishedRun(folder, config, source, patients, of_fold)
