"""Predict new patients with runs or exported models, in the frame of their own T2W files.

``python -m experiments.predict --model RUN_OR_ARTIFACT --input CASE_OR_FOLDER --output DIR`` reads
whatever the data pipeline reads, one case or thousands; of several models (``--model A --model B``)
the mean of their probabilities is taken. While one case is computed, the next ones are read and the
ones before are written. A case that cannot be predicted is named and passed over, and the exit
status is then 4. Each case is recorded as soon as its files are written: a command that ended
early, however it did, goes on where it was when it is run again, and makes again what was removed
or changed since; one that came to its end predicts every case again.
"""

import collections
import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import tyro

from cmsad_jax import export
from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.progress import progress
from data_pipelines.reading import case_files
from data_pipelines.reading.case_files import CaseFiles
from data_pipelines.short_help import program
from experiments.exporting.opening import open_models
from experiments.measuring.training_data import in_words, unlike
from experiments.prediction.models import Models, Prepared, run_program
from experiments.prediction.outputs import (
    Computed,
    Extras,
    Facts,
    PredictedCase,
    PredictionFolder,
    Predictions,
    Settings,
    target_of_model,
)
from experiments.process.accelerator import select_accelerator
from experiments.process.called import callable_module
from experiments.process.console import log, run_main
from experiments.settings.config import Accelerator, FoldsAsked, ReportConfig
from experiments.settings.options import REGISTRY

T = TypeVar("T")
R = TypeVar("R")

READ_AHEAD = 2
"""Cases held in memory before, and after, the one that is computed."""

PASSED_OVER = 4
"""Exit status if a case could not be predicted and the others were."""


@dataclasses.dataclass(frozen=True)
class PredictCommand:
    """Predict new cases with a run or an artifact; masks and probabilities as NIfTI."""

    model: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """Run folder of experiments.cv or file of experiments.export; several: their mean is taken."""
    input: Path
    """Folder of one case (files named by modality) or of many, in any layout of the pipeline."""
    output: Path
    """Folder for the results."""
    accelerator: Accelerator = "auto"
    """Where to compute; auto takes the best there is."""
    folds: FoldsAsked = None
    """Folds that are averaged; all: the network of all cases. What the model has by default."""
    overlap: float | None = None
    """Least share of a window that its neighbour sees as well. The model's own by default."""
    flip: bool | None = None
    """Average over the left-right mirror image. The model's own by default."""
    batch_size: int | None = None
    """Windows for each call; changes speed and memory alone. The model's own by default."""
    threshold: float | Literal["learnt"] | None = None
    """Probability above which a voxel is foreground, or learnt. The model's own by default."""
    attention: bool = False
    """Write the attention map of each modality too, scaled to a maximum of 1."""
    uncertainty: bool = False
    """Write entropy (0 to 1) and the standard deviation between the folds too."""
    page: bool = True
    """Write predictions.html, in which the cases can be looked at."""
    report: ReportConfig = ReportConfig()


def open_command(command: PredictCommand) -> Models:
    """The models of a command line, applied as it asks.

    Raises:
        ConfigError: as ``open_models``, or more is asked than the models give.
    """
    settings = {field.name: getattr(command, field.name) for field in dataclasses.fields(Settings)}
    models = open_models(command.model, command.folds, settings)
    if command.attention and "attention" not in models.programs:
        if len(models.each) > 1:
            raise ConfigError(
                f"attention maps are those of one model; got {len(models.each)} models. "
                "Leave out --attention, or name one --model."
            )
        raise ConfigError(
            f"attention maps need a program for them; {command.model[0]} has none. "
            "Export the run again, or leave out --attention."
        )
    return models


def compute(models: Models, prepared: Sequence[Prepared], extras: Extras) -> Computed:
    """Run the models on a case; one that weighs modalities or draws attention says that too.

    Raises:
        DataError: a probability is not finite.
    """
    cases, remarks = models.in_boxes(prepared)
    first, case = models.each[0], cases[0]
    computed = Computed(case, models.predict(cases), None, remarks=remarks)
    if extras.attention:
        maps = run_program(first, case, "attention").probability
        maps /= np.maximum(maps.max((0, 1, 2)), 1e-12)
        computed = dataclasses.replace(computed, attention=maps)
    if "modality_weights" in models.programs:
        weights = run_program(first, case, "modality_weights").probability.mean((0, 1, 2))
        computed = dataclasses.replace(computed, modality_weights=weights)
    if extras.uncertainty and "drawn" in models.programs:
        drawn = run_program(first, case, "drawn").probability.max(-1)
        computed = dataclasses.replace(computed, drawn=drawn)
    return computed


class OtherImagesError(DataError):
    """A result of that name is there, of other images."""


@dataclasses.dataclass
class Account:
    """What a command has predicted so far, and what it took."""

    folder: PredictionFolder
    facts: Facts
    """The model, its settings, and what is written beside masks."""
    earlier: Sequence[PredictedCase]
    """Of earlier commands, for cases that are not predicted now."""
    cases: list[PredictedCase] = dataclasses.field(default_factory=list)
    computing_s: float = 0.0
    """Time in which the model ran."""
    beside_s: float = 0.0
    """Processor time of reading and writing, in their own threads."""
    started_s: float = dataclasses.field(default_factory=time.perf_counter)
    processor_started_s: float = dataclasses.field(default_factory=time.process_time)

    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    """sha256 of the images of each case of which there is, or was, a result in the folder."""
    warnings: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """What is worth a look, by case."""
    refused: int = 0
    """Cases whose result would have replaced that of other images."""
    on_disk: dict[str, str] = dataclasses.field(default_factory=dict)
    """``inputs`` as they were last written."""
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    """Cases are read, computed and written in threads of their own, and each of them says so."""

    @property
    def wall_s(self) -> float:
        """Time since the account was begun."""
        return time.perf_counter() - self.started_s

    @property
    def failed(self) -> int:
        """Cases that could not be predicted."""
        return self.refused + sum(case.error is not None for case in self.cases)

    def fail(self, case_id: str, error: Exception) -> None:
        """Say that a case is passed over."""
        print(f"error: case {case_id} is passed over: {error}", file=sys.stderr, flush=True)
        with self.lock:
            self.cases.append(PredictedCase(case_id, error=str(error)))

    def say(self, case_id: str, warnings: Sequence[str]) -> None:
        """Say what is worth a look in a case."""
        for text in warnings:
            print(f"warning: case {case_id}: {text}", file=sys.stderr, flush=True)

    def add_warnings(self, case_id: str, warnings: Sequence[str]) -> None:
        """Say what more is worth a look in a case, and keep it for the record."""
        self.say(case_id, warnings)
        with self.lock:
            self.warnings[case_id] = (*self.warnings.get(case_id, ()), *warnings)

    def claim(self, case_id: str, sha256: str) -> None:
        """Say whose the results of this name are from now on.

        Raises:
            OtherImagesError: they are those of other images.
        """
        with self.lock:
            there = self.folder.mask(case_id).exists()
            if there and self.inputs.get(case_id, sha256) != sha256:
                raise OtherImagesError(
                    "a result must not replace that of other images; "
                    f"{self.folder.path} holds one named {case_id} of others. Name another folder "
                    "with --output; or give --input the folder above, so that cases of equal names "
                    "are told apart."
                )
            self.inputs[case_id] = sha256

    def keep(self, entry: CaseFiles, before: Sequence[PredictedCase], error: Exception) -> None:
        """Say that a case is passed over, and leave what there is of that name."""
        print(f"error: case {entry.case_id} is passed over: {error}", file=sys.stderr, flush=True)
        with self.lock:
            self.refused += 1
            there = {case.case_id for case in self.earlier}
            kept = [case for case in before if case.case_id == entry.case_id]
            self.earlier = [*self.earlier, *(case for case in kept if case.case_id not in there)]

    def begin(self, case_id: str) -> None:
        """Have it on disk whose the files of this name are, before the first of them is written."""
        with self.lock:
            if self.on_disk.get(case_id) != self.inputs.get(case_id):
                self.save(complete=False)

    def finish(self, case: PredictedCase, seconds: float) -> None:
        """Record a case whose files are all written, after ``seconds`` of a processor."""
        with self.lock:
            if warnings := self.warnings.get(case.case_id):
                case = dataclasses.replace(case, warnings=warnings)
            self.cases.append(case)
            self.beside_s += seconds
            self.save(complete=False)

    def save(self, *, complete: bool) -> None:
        """Write the record, whole or not at all."""
        with self.lock:
            self.folder.write(
                Predictions(
                    self.facts,
                    tuple(sorted([*self.earlier, *self.cases], key=lambda case: case.case_id)),
                    inputs=dict(sorted(self.inputs.items())),
                    complete=complete,
                    wall_s=round(self.wall_s, 3),
                    compute_s=round(self.computing_s, 3),
                    processor_s=round(time.process_time() - self.processor_started_s, 3),
                    processor_beside_s=round(self.beside_s, 3),
                )
            )
            self.on_disk = dict(self.inputs)


def run(command: PredictCommand) -> int:
    """Predict every case of the input; returns how many could not be.

    Raises:
        ConfigError: a model or options that cannot work.
        DataError: no case at all, or an output folder of another model.
    """
    from experiments.prediction import inputs  # slow to load, and not needed for --help

    select_accelerator(command.accelerator)
    models = open_command(command)
    description, data = models.description, models.read_as
    entries = inputs.find_inputs(
        command.input, description.modalities, with_gland=data.preprocess.centre == "gland"
    )
    folder = PredictionFolder(command.output)
    with folder.opened():
        facts = models.facts(Extras(command.attention, command.uncertainty))
        account, before, done = open_account(folder, facts, [entry.case_id for entry in entries])
        for name in ("predict", *(("attention",) if command.attention else ())):
            models.compile(name)
        log(
            f"{len(entries) - len(done)} cases; {', '.join(description.classes)} from "
            f"{', '.join(description.modalities)}, {len(description.members)} members, "
            f"{whose_prediction(models)}"
            + (f"; {len(done)} were predicted before the interruption" if done else "")
        )
        say_trained_on(facts)
        with recorded(account):
            predict_cases(models, entries, account, before, done)
        count, wall = len(account.cases) + account.refused, max(account.wall_s, 1e-9)
        log(
            f"{count - account.failed} of {count} cases predicted in {wall:.1f} s "
            f"({60 * count / wall:.0f} a minute, {account.computing_s / wall:.0%} "
            f"of it computing); {folder.record}"
        )
        share(command, models, entries, folder)
    return account.failed


def share(
    command: PredictCommand,
    models: Models,
    entries: Sequence[CaseFiles],
    folder: PredictionFolder,
) -> None:
    """Write what people open: tables, segmentations for 3D Slicer and as DICOM, and the page."""
    # slow to load, and not needed for --help
    from experiments.prediction import inputs, sharing
    from experiments.reporting import prediction_page

    predictions, target = folder.read(), target_of_model(models.description)
    files = {entry.case_id: entry for entry in entries}
    done = [case.case_id for case in predictions.cases if case.error is None]
    here = [case_id for case_id in done if case_id in files]

    def warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    sharing.write_tables(folder, predictions, target)
    sharing.write_segmentations(folder, here, files, target, models.sha256, warn)
    if command.page:
        log(f"writing the page of {len(here)} cases")
        subject = prediction_page.Subject(
            models.description, lambda case_id: inputs.read_raw(files[case_id], models.read_as)
        )
        prediction_page.write_prediction_page(folder, predictions, subject, here, command.report)
        log(f"page: {folder.page}")


def open_account(
    folder: PredictionFolder, facts: Facts, case_ids: Sequence[str]
) -> tuple[Account, tuple[PredictedCase, ...], set[str]]:
    """The account of the cases to predict, what the folder said before, and which of them are done.

    What it said of a case is believed if the images of it are there and as they were written.

    Raises:
        ConfigError: the folder holds results of another model or other settings.
    """
    old = folder.earlier(facts)
    again = set(case_ids)
    done: set[str] = set()
    if not old.complete and old.facts.extras == facts.extras:
        cases = (case for case in old.cases if case.case_id in again)
        done = {case.case_id for case in cases if folder.is_intact(case)}
    kept = []
    for case in old.cases:
        if case.case_id in again - done:
            continue
        if case.error is None and case.case_id not in done and not folder.holds(case):
            print(
                f"warning: the record of case {case.case_id} is left out: its images in "
                f"{folder.path} were removed or changed. Predict it again to have them back.",
                file=sys.stderr,
                flush=True,
            )
            continue
        kept.append(case)
    account = Account(folder, facts, kept, inputs=dict(old.inputs))
    account.save(complete=False)
    return account, old.cases, done


def whose_prediction(models: Models) -> str:
    """Whose prediction it is, and what is not computed of several models."""
    told = f"model {models.sha256[:12]}"
    if len(models.each) == 1:
        return told
    told += f", the mean of {len(models.each)} models: " + ", ".join(
        model.sha256[:12] for model in models.each
    )
    left_out = {
        text
        for program, text in _OF_ONE_MODEL.items()
        if any(program in model.programs for model in models.each)
    }
    return told + "".join(f"; no {text}, which are of one model" for text in sorted(left_out))


_OF_ONE_MODEL = {
    "modality_weights": "weights of modalities",
    "drawn": "draws of attention across slices",
}


def say_trained_on(facts: Facts) -> None:
    """What each model was trained on; of drawn images, that it knows no patient."""
    for data in facts.trained_on:
        log(f"the model was trained on {in_words(data)}")
        if data is not None and data.synthetic:
            print(
                "warning: this model has seen synthetic images alone; what it says of patients "
                "means nothing.",
                file=sys.stderr,
                flush=True,
            )


@contextlib.contextmanager
def recorded(account: Account) -> Iterator[None]:
    """Write the record at the end, also of what came to it early."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # of a full disk, which is said already
            account.save(complete=False)
        raise
    account.save(complete=True)


def predict_cases(
    models: Models,
    entries: Sequence[CaseFiles],
    account: Account,
    before: Sequence[PredictedCase] = (),
    done: Collection[str] = (),
) -> None:
    """Read, compute and write each case, the three side by side; results go into the account.

    Of cases that are ``done`` only the images are read, to see that they are still the same; of
    those whose name other images have, the results ``before`` are kept. When it is interrupted
    the account holds the cases whose files are all written.
    """
    read = reader(models, entries, account, done)
    with ThreadPoolExecutor(1) as readers, writing(account, models.description) as write:
        read_cases = zip(entries, read_ahead(readers, read, entries), strict=True)
        for entry, (prepared, seconds) in progress(
            read_cases, description="Predicting", total=len(entries)
        ):
            account.beside_s += seconds
            account.say(entry.case_id, account.warnings.get(entry.case_id, ()))
            if isinstance(prepared, OtherImagesError):
                account.keep(entry, before, prepared)
            elif isinstance(prepared, DataError):
                account.fail(entry.case_id, prepared)
            if prepared is None or isinstance(prepared, DataError):
                continue
            started = time.perf_counter()
            try:
                computed = compute(models, prepared, account.facts.extras)
            except DataError as error:
                account.fail(entry.case_id, error)
                continue
            finally:
                account.computing_s += time.perf_counter() - started
            account.add_warnings(entry.case_id, computed.remarks)
            write(computed)


def reader(
    models: Models, entries: Sequence[CaseFiles], account: Account, done: Collection[str]
) -> Callable[[CaseFiles], tuple[Sequence[Prepared] | DataError | None, float]]:
    """What reads a case for each model: why there is none, None if it is done; and seconds.

    Whose images they are, and what is worth a look in them, goes into the account.
    """
    # slow to load, and not needed for --help
    from data_pipelines.preparing.examination import gland_suspicions, image_facts
    from experiments.prediction import inputs

    trained_on = account.facts.trained_on
    repeated = {
        problem.case_id: problem
        for problem in case_files.check_ids(entry.case_id for entry in entries)
    }

    def read(entry: CaseFiles) -> tuple[Sequence[Prepared] | DataError | None, float]:
        started = time.thread_time()
        try:
            if entry.case_id in repeated:
                raise DataError(repeated[entry.case_id].text)
            raw = inputs.read_raw(entry, models.read_as)
            account.claim(entry.case_id, inputs.images_sha256(raw))
            cases = None
            if entry.case_id not in done:
                cases = models.prepare(raw)
                images = {name: image_facts(volume) for name, volume in raw.images.items()}
                account.warnings[entry.case_id] = (
                    *(p.text for p in entry.problems if p.level == "warning"),
                    *(() if raw.gland is None else gland_suspicions(raw.gland)),
                    *dict.fromkeys(text for data in trained_on for text in unlike(data, images)),
                )
        except DataError as error:
            cases = error
        return cases, time.thread_time() - started

    return read


@contextlib.contextmanager
def writing(
    account: Account, description: export.Description
) -> Iterator[Callable[[Computed], None]]:
    """Give a function that has a case written in a thread; up to ``READ_AHEAD`` wait for theirs.

    Each is recorded in that thread as soon as its files are written, after an interruption too.
    """

    def write(computed: Computed) -> None:
        started = time.thread_time()
        account.begin(computed.case.case_id)
        case = account.folder.write_case(
            computed, description, uncertainty=account.facts.extras.uncertainty
        )
        account.finish(case, time.thread_time() - started)

    pending: collections.deque[Future[None]] = collections.deque()

    def submit(computed: Computed) -> None:
        while len(pending) >= READ_AHEAD:
            pending.popleft().result()
        pending.append(writers.submit(write, computed))

    with ThreadPoolExecutor(1) as writers:
        yield submit
        while pending:
            pending.popleft().result()


def read_ahead(
    executor: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]
) -> Iterator[R]:
    """Results of ``function`` in order, of which up to ``READ_AHEAD`` are made in advance."""
    pending: collections.deque[Future[R]] = collections.deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) > READ_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def call(command: PredictCommand) -> Predictions:
    """``experiments.predict(command)``: predict, and return what ``predictions.json`` says then.

    Cases that could not be predicted have an ``error`` there. Raises as ``run``.
    """
    run(command)
    return PredictionFolder(command.output).read()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit status 4 if a case was passed over, else as ``run_main``."""
    command = tyro.cli(
        PredictCommand, prog=program("experiments.predict"), args=arguments, registry=REGISTRY
    )
    if run(command):
        raise SystemExit(PASSED_OVER)


callable_module(__name__)

if __name__ == "__main__":
    run_main(main)
