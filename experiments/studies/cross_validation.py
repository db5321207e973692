"""Cross-validation over patients: train every fold, predict its validation patients, measure."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Sequence

import jax
import numpy as np

from cmsad_jax.types import ConfigError, Device
from data_pipelines.building import validation
from data_pipelines.building.builders import open_builder
from data_pipelines.case import Case, spacing_of
from data_pipelines.faults import DataError
from data_pipelines.files import expanded, naming_path
from data_pipelines.preparing import preprocessing
from data_pipelines.progress import duration, progress, recorded
from data_pipelines.reading import volume_io
from data_pipelines.serving import loading, splits
from experiments.measuring import mean_shape, summary
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.mean_shape import MeanShape
from experiments.measuring.metrics import to_mask
from experiments.measuring.rows import Row
from experiments.measuring.training_data import absences, gather
from experiments.planning import record
from experiments.planning.record import Plan
from experiments.prediction.windows import Params, predict_case, weights_sha256
from experiments.process import hosts
from experiments.process.accelerator import (
    keep_compiled,
    peak_memory_bytes,
    profiled,
    select_accelerator,
)
from experiments.process.console import log
from experiments.process.environment import versions_in_words
from experiments.process.signals import deferred_signals
from experiments.process.storage import locked, remove_temporary_files
from experiments.reporting import page
from experiments.reporting.figures import cases_to_show, save_figure
from experiments.run_folder import (
    FoldFolder,
    FoldResults,
    FoldSummary,
    Results,
    RunFolder,
    fold_title,
    folder_of,
    training_cases,
)
from experiments.settings.cascade import first_config
from experiments.settings.command_line import complete, without_effect
from experiments.settings.config import ALL, Config, box_of, folds_asked, refuse_all
from experiments.settings.stored import flatten, to_json
from experiments.studies.cascade import Cascade, refuse_lacking
from experiments.training import feed, tensorboard
from experiments.training.fold import Fold
from experiments.training.given_weights import given_weights
from experiments.training.loop import NOTHING_LEFT, Rest, train_folds
from experiments.training.programs import Programs, compile_programs, folds_at_once, groups


def cross_validate(config: Config) -> Results:
    """A whole cross-validation, for programs: ``run`` on the completed configuration.

    What follows from the data need not be set (``experiments.settings.command_line.complete``). Run
    again, it continues what is in ``config.output``.

    Raises:
        ConfigError: for settings that cannot work, among them the network of all cases, which
            ``run`` trains; or a run folder of another configuration.
        DataError: for faults of the data.
    """
    refuse_all(config, "cross_validate")
    results = run(complete(config))
    assert results is not None, "there is one process, which has the results"
    return results


def run(
    config: Config,
    programs: Programs | None = None,
    *,
    plan: Plan | None = None,
    folds: splits.Folds | None = None,
) -> Results | None:
    """Run the folds asked for and report on all that are done; returns what ``metrics.json`` holds.

    ``programs`` are those of a run that differs in seed and folder alone; None compiles them.
    ``plan`` is that which ``config`` follows, and is kept in the run folder. ``folds`` are made
    where they are not given. Of several processes (``experiments.process.hosts``) the first alone
    writes and returns something; where no fold is done, but the network of all cases, there is
    nothing to return.

    Raises:
        ConfigError: for settings that cannot work, or a run folder of another configuration.
        DataError: for faults of the data.
    """
    first = None
    if config.cascade.target:  # refused, if at all, before anything is read or written
        first = first_config(config, folder_of(config).first)
    devices = select_accelerator(config.accelerator)
    for sentence in without_effect(config):
        log(f"note: {sentence}")
    if config.init is not None:
        with hosts.first_alone("read the weights to start from"):
            if hosts.is_first():
                given_weights(config.init, config, 0)  # refused, if at all, before data are read
    if config.compilation_cache:
        keep_compiled(config.data.cache / "compiled")
    programs = programs or compile_programs(config, devices)
    folder = folder_of(config)
    with hosts.first_alone("open the run folder and the data set"):
        source = None
        if hosts.is_first():
            folder.refuse_other(config)
            source = open_source(config)
    if source is None:
        source = open_source(config)  # built by now, if its folder is that of process 0
    if folds is None:
        folds = make_folds(config, source)
    else:
        refuse_lacking(source.case_ids, (*folds.cases, *folds.test), config.data.target)
    hosts.must_agree(
        "configuration, data and folds",
        digest_of(config, source, folds),
        "Start all of them with the same options, on copies of the same data.",
    )
    with contextlib.ExitStack() as held:
        with hosts.first_alone("open the run folder"):
            if hosts.is_first():
                with naming_path(folder.path):
                    folder.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder.path))
                folder.refuse_other(config)
                remove_temporary_files(folder.path)
                folder.open(config, source, folds, "" if plan is None else plan.sha256)
                held.enter_context(recorded(folder.log, versions_in_words()))
                if plan is not None:
                    record.write(plan, folder.plan)
        cascade = None
        if first is not None:
            train_first(config, first, folds)
            cascade = Cascade(config, first, devices)
        return run_folds(config, devices, programs, source, folds, cascade)


def train_first(config: Config, first: Config, folds: splits.Folds) -> None:
    """Train the ``first`` network of a cascade in the same folds, as a run of its own.

    Raises:
        ConfigError, DataError: as ``run``; or a case has no label for the first network.
    """
    folder = folder_of(config)
    asked = folds_asked(config.folds, config.num_folds)
    if all(folder.is_done(fold) for fold in asked):
        return
    grid = first.data.preprocess
    log(
        f"first network of the cascade: {first.data.target} on voxels of "
        f"{' x '.join(f'{mm:g}' for mm in grid.spacing_mm)} mm; the second sees boxes of "
        f"{' x '.join(map(str, box_of(config)))} voxels in crops of "
        f"{' x '.join(map(str, config.train.crop))}"
    )
    run(first, folds=folds)
    log(f"second network of the cascade: {config.data.target}")


def open_source(config: Config) -> loading.CaseSource:
    """The run's data set, checked, and built where it has not been."""
    with naming_path(expanded(config.data.cache, "--data.cache"), "build the data set"):
        builder = open_builder(config.data)
        validation.check(builder, log)
        return loading.open_source(builder)


_OF_A_PROCESS = (
    *("distributed.process_id", "data.cache", "data.path"),
    *("folds_file", "init", "output", "plan"),
)
"""Settings in which the processes of a run may differ."""


def digest_of(config: Config, source: loading.CaseSource, folds: splits.Folds) -> str:
    """SHA-256 of what processes of one run have in common."""
    asked = {
        key: value for key, value in flatten(to_json(config)).items() if key not in _OF_A_PROCESS
    }
    facts = [asked, source.fingerprint, folds.sha256]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def run_folds(
    config: Config,
    devices: Sequence[Device],
    programs: Programs,
    source: loading.CaseSource,
    folds: splits.Folds,
    cascade: Cascade | None = None,
) -> Results | None:
    """The folds asked for that are not done, and the report, in an open and locked run folder."""
    folder = folder_of(config)
    positive = sum(info.positive for info in source.info)
    data = gather(config.data.name, source.info, config.data.modalities)
    if data.synthetic:
        log(f"note: {config.data.name} holds synthetic images; what is learned is of no patient")
    for sentence in absences(data):
        log(f"note: {sentence}")
    log(
        f"{len(source)} cases, {positive} with {config.data.target}, "
        f"{folds_in_words(config, folds, len(source))}; {devices[0].device_kind} x {len(devices)}; "
        f"run folder {folder.path}"
    )
    at_once = folds_at_once(config, devices)
    where, why = feed.residency(config, source, num_folds=at_once)
    log(
        ("batches from the host" if where == "host" else "cases resident on the device")
        + f": {why}"
        + ("" if programs.several is None else f"; {programs.steps_per_call} steps in each call")
        + ("" if at_once == 1 else f"; up to {at_once} folds side by side")
    )
    selected = folds_asked(config.folds, config.num_folds)
    todo = hosts.broadcast_from_first(np.array([not folder.is_done(fold) for fold in selected]))
    left = []
    for fold, wanted in zip(selected, todo, strict=True):
        if wanted:
            training = training_cases(folds, fold)
            validation = () if fold == ALL else folds.validation[fold]
            left.append(Fold(fold, training, validation, folder.fold(fold).path))
        else:
            log(f"{fold_title(fold, config.num_folds)}: done before")
    waiting, taken_s = groups(left, at_once), []
    for number, group in enumerate(waiting, 1):
        started, times = time.perf_counter(), len(waiting) - number
        rest = Rest(times, float(np.mean(taken_s)) if taken_s else None)
        cases = source if cascade is None else cascade.cases(source, *group)
        run_group(config, programs, cases, group, rest)
        taken_s.append(time.perf_counter() - started)
        if times:
            # the first group compiled as well
            each_s = float(np.mean(taken_s[1:] or taken_s))
            log(f"{number} of {len(waiting)} done; about {duration(times * each_s)} left")
    if not hosts.is_first():
        return None
    done = folder.done(config.num_folds)
    if not done:
        log(
            "no case was held out, so there is nothing to measure: python -m experiments.predict "
            f"--model={folder.path} --folds all"
        )
        return None
    return finish(config, folder, mean_shape.run(config, source, folds, done))


def folds_in_words(config: Config, folds: splits.Folds, num_cases: int) -> str:
    """How many folds of what, which group each of them leaves out, and which cases are in none."""
    over = f"by {config.group_by}" if config.group_by else "over patients"
    names = f" ({', '.join(folds.names)})" if folds.names else ""
    words = f"{len(folds)} folds {over}{names}" if len(folds) > 1 else "one split"
    if folds.test:
        words += f", {len(folds.test)} cases held out as a test"
    if others := num_cases - len(folds.cases) - len(folds.test):
        words += f", {others} cases in no fold"
    return words


def make_folds(config: Config, source: loading.CaseSource) -> splits.Folds:
    """Folds of the cases: published ones, or drawn; refuses a data set without any foreground."""
    if not any(info.positive for info in source.info):
        raise DataError(
            f"at least one case must hold the target; got {len(source)} cases without any "
            f"{config.data.target}. Check the labels, or choose another --data.target."
        )
    if config.folds_file is not None and config.group_by is not None:
        raise ConfigError(
            "folds must come from a file or from groups; got both --folds-file and --group-by. "
            "Drop one of them."
        )
    folds, whose = None, ""
    if config.folds_file is not None:
        folds, whose = splits.load_published(config.folds_file, source.info), "of the folds file"
    elif config.group_by is not None:
        folds, whose = splits.group_folds(source.info, group=config.group_by), "of groups"
    if folds is not None:
        if len(folds.validation) != config.num_folds:
            raise ConfigError(
                f"the number of folds must be that {whose}; "
                f"got {config.num_folds} and {len(folds.validation)}. "
                f"Use --num-folds={len(folds.validation)}."
            )
        return folds
    return splits.make_folds(source.info, num_folds=config.num_folds, seed=config.seed)


def run_group(
    config: Config,
    programs: Programs,
    source: loading.CaseSource,
    group: Sequence[Fold],
    rest: Rest = NOTHING_LEFT,
) -> None:
    """Train the folds of a group side by side, and predict and measure them one after another.

    Of several processes, all train and the first does the rest.
    """
    for fold in group if hosts.is_first() else ():
        with naming_path(fold.directory):
            fold.directory.mkdir(exist_ok=True)
    numbers = folds_asked(config.folds, config.num_folds)
    first = any(fold.number == numbers[0] for fold in group)
    with profiled(config.profile if first and hosts.is_first() else None):
        trained = train_folds(config, programs, source, group, rest)
    if hosts.is_first():
        for fold, (params, summary) in zip(group, trained, strict=True):
            measure_fold(config, programs, source, fold, params, summary)


def measure_fold(
    config: Config,
    programs: Programs,
    source: loading.CaseSource,
    fold: Fold,
    params: Params,
    summary: FoldSummary,
) -> None:
    """Predict and measure what is not done yet; its results, written last, end the fold."""
    folder, validation = FoldFolder(fold.directory), fold.validation
    title = fold_title(fold.number, config.num_folds)
    tensorboard.write_events(folder.history, folder.tensorboard)
    started = time.perf_counter()
    weights = weights_sha256(params)
    found = {case_id: folder.stored_rows(case_id, weights) for case_id in validation}
    missing = [case_id for case_id, rows in found.items() if rows is None]
    if len(missing) < len(validation):
        log(
            f"{title}: {len(validation) - len(missing)} of {len(validation)} cases predicted before"
        )
    with deferred_signals() as stop:
        for case in progress(
            loading.eval_cases(source, missing),
            description=f"{title} predicting",
            total=len(missing),
        ):
            if stop.number is not None:
                break
            rows = predict_and_measure(config, programs, params, case, fold.number, folder)
            folder.store_case(case.case_id, weights, rows, config.data.definition.part_names)
            found[case.case_id] = tuple(rows)
    rows = [row for rows in found.values() for row in rows or ()]
    shutil.rmtree(folder.figures, ignore_errors=True)
    for case_id in cases_to_show(rows, config.predict.figures):
        save_figure(config, programs, params, source[case_id], folder.figure(case_id))
    peak = peak_memory_bytes(jax.local_devices()[0])
    summary = dataclasses.replace(
        summary,
        predict_s=round(time.perf_counter() - started, 2),
        peak_memory_gb=None if peak is None else round(peak / 1e9, 2),
    )
    folder.write_results(FoldResults(tuple(rows), summary))
    log(
        f"{title}: {config.train.steps} steps in {summary.train_s:.0f} s "
        f"({summary.steps_per_s:.2f} steps/s, first step {summary.first_step_s:.0f} s, "
        f"{summary.input_wait_share:.1%} of the time waiting for input, "
        f"peak memory {'unknown' if peak is None else f'{peak / 1e9:.1f} GB'})"
        f", loss {summary.loss or np.nan:.3f}; "
        + (
            f"{len(validation)} cases predicted in {summary.predict_s:.0f} s; {outcome(rows)}"
            if validation
            else "no case is held out"
        )
    )


def outcome(rows: Sequence[Row]) -> str:
    """Mean Dice of a fold's positive cases in words, and what to do where nothing is ever found."""
    dice = [row.dice for row in rows if row.dice is not None]
    if not dice:
        return "no positive case, no Dice"
    words = f"Dice {np.mean(dice):.3f} over {len(dice)}"
    if any(row.volume_predicted_ml for row in rows):
        return words
    return (
        f"{words}; no voxel of any case is found. The network may have learnt that nothing is "
        "right for most crops: use a lower --train.optimizer.learning-rate or --loss.smooth"
    )


def predict_and_measure(
    config: Config, programs: Programs, params: Params, case: Case, fold: int, folder: FoldFolder
) -> list[Row]:
    """Predict a case, save mask and probabilities in its T2W frame, and measure them there."""
    target, affine = config.data.definition, case.original_affine
    classes = target.part_names
    probability = preprocessing.to_original(
        predict_case(programs.predict, params, case, config), case
    )
    foreground = probability if len(classes) == 1 else probability[..., 1:]
    files = [folder.mask(case.case_id), *folder.probabilities(case.case_id, classes)]
    mask = target.to_file(to_mask(probability, config.predict.threshold))
    for path, array in zip(files, [mask, *np.moveaxis(foreground, -1, 0)], strict=True):
        with naming_path(path):
            volume_io.write_nifti(path, array, affine, case_id=case.case_id)
    return measure_case(
        case.case_id,
        case.patient_id,
        fold,
        probability,
        case.original_truth,
        spacing_of(affine),
        rule_of(config),
    )


def rule_of(config: Config) -> Rule:
    """How the run's probabilities become masks."""
    data = config.data
    return Rule(data.target, config.predict.threshold, data.labels, data.lesions)


def finish(config: Config, folder: RunFolder, baseline: MeanShape) -> Results:
    """Gather the folds that are done into ``metrics.json``, the CSV and the report; print them.

    The report comes last: should it fail, the results are on disk and on the screen.
    """
    of_fold = {fold: folder.fold(fold).read_results() for fold in folder.done(config.num_folds)}
    rows = [row for results in of_fold.values() for row in results.metric_per_case]
    results = Results(
        summary.summarise(rows, folds=list(of_fold)),
        target=config.data.target,
        classes=config.data.classes,
        parts=config.data.definition.part_names if config.data.definition.has_regions else None,
        threshold=config.predict.threshold,
        checkpoint="ema" if config.train.average_decay else "last",
        num_folds=config.num_folds,
        folds_done=tuple(of_fold),
        baseline_mean_shape=baseline,
        best_checkpoint={fold: results.summary.best for fold, results in of_fold.items()},
        fold_summaries={fold: results.summary for fold, results in of_fold.items()},
    )
    with naming_path(folder.metrics):
        folder.write_results(results)
    log(summary.format_summary(results.summary))
    if baseline.mean_dice is not None:
        log(f"baseline that ignores the image (mean training shape): Dice {baseline.mean_dice:.3f}")
    missing = [str(fold) for fold in range(config.num_folds) if fold not in of_fold]
    if missing:
        log(f"folds still to run: {' '.join(missing)} (the same command with --folds, or without)")
    with naming_path(folder.report_html):
        html = page.write_report(folder, config.report)
    log(f"report: {html}")
    return results
