"""Cross-validation over patients: train every fold, predict its validation patients, measure."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cmsad_jax.types import ConfigError, Device
from data_pipelines import validate
from data_pipelines.case import Case, spacing_of
from data_pipelines.faults import DataError
from data_pipelines.preparing import preprocessing
from data_pipelines.reading import volume_io
from data_pipelines.serving import loading, splits
from experiments import run_folder
from experiments.measuring import lesions, mean_shape, summary
from experiments.measuring.metrics import case_metrics
from experiments.prediction.windows import predict_case, to_mask
from experiments.process import hosts
from experiments.process.accelerator import (
    keep_compiled,
    peak_memory_bytes,
    profiled,
    select_accelerator,
)
from experiments.process.console import log, progress
from experiments.process.signals import deferred_signals
from experiments.process.storage import (
    locked,
    naming_path,
    read_json,
    remove_temporary_files,
    write_json,
)
from experiments.reporting import page
from experiments.reporting.figures import cases_to_show, save_figure
from experiments.run_folder import (
    is_done,
    open_run,
    prediction_files,
    refuse_other_run,
    store_rows,
    stored_rows,
)
from experiments.settings.config import Config
from experiments.settings.stored import flatten, to_json
from experiments.training import feed, tensorboard
from experiments.training.fold import Fold
from experiments.training.loop import train_folds
from experiments.training.programs import Programs, compile_programs, folds_at_once, groups


def run(config: Config, programs: Programs | None = None) -> dict[str, Any]:
    """Run the folds asked for and report on all that are done; returns what ``metrics.json`` holds.

    ``programs`` are those of a run that differs in seed and folder alone; None compiles them. Of
    several processes (``experiments.process.hosts``) the first alone writes and returns something.

    Raises:
        ConfigError: for settings that cannot work, or a run folder of another configuration.
        DataError: for faults of the data.
    """
    devices = select_accelerator(config.accelerator)
    if config.compilation_cache:
        keep_compiled(config.data.cache / "compiled")
    programs = programs or compile_programs(config, devices)
    output = config.output
    assert output is not None, "complete() names the run folder"
    with hosts.first_alone("open the run folder and the data set"):
        source = None
        if hosts.is_first():
            refuse_other_run(output, config)
            source = open_source(config)
    if source is None:
        source = open_source(config)  # built by now, if its folder is that of process 0
    folds = make_folds(config, source)
    hosts.must_agree(
        "configuration, data and folds",
        digest_of(config, source, folds),
        "Start all of them with the same options, on copies of the same data.",
    )
    with contextlib.ExitStack() as held:
        with hosts.first_alone("open the run folder"):
            if hosts.is_first():
                with naming_path(output):
                    output.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(output))
                refuse_other_run(output, config)
                remove_temporary_files(output)
                open_run(output, config, source, folds)
        return run_folds(config, devices, programs, source, folds)


def open_source(config: Config) -> loading.CaseSource:
    """The run's data set, checked, and built where it has not been."""
    with naming_path(config.data.cache.expanduser(), "build the data set"):
        validate.check(config.data, log)
        return loading.build(config.data)


def digest_of(config: Config, source: loading.CaseSource, folds: splits.Folds) -> str:
    """SHA-256 of what processes of one run have in common."""
    asked = {
        key: value
        for key, value in flatten(to_json(config)).items()
        if key not in ("distributed.process_id", "data.cache", "data.path", "folds_file", "output")
    }
    facts = [asked, source.fingerprint, folds.sha256]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def run_folds(
    config: Config,
    devices: Sequence[Device],
    programs: Programs,
    source: loading.CaseSource,
    folds: splits.Folds,
) -> dict[str, Any]:
    """The folds asked for that are not done, and the report, in an open and locked run folder."""
    output = config.output
    assert output is not None, "complete() names the run folder"
    positive = sum(info.positive for info in source.info)
    log(
        f"{len(source)} cases, {positive} with {config.data.target}, "
        f"{folds_in_words(config, folds)}; {devices[0].device_kind} x {len(devices)}; "
        f"run folder {output}"
    )
    at_once = folds_at_once(config, devices)
    where, why = feed.residency(config, source, num_folds=at_once)
    log(
        ("batches from the host" if where == "host" else "cases resident on the device")
        + f": {why}"
        + ("" if programs.several is None else f"; {programs.steps_per_call} steps in each call")
        + ("" if at_once == 1 else f"; up to {at_once} folds side by side")
    )
    selected = range(config.num_folds) if config.folds is None else config.folds
    todo = hosts.of_first(np.array([not is_done(output, fold) for fold in selected]))
    left = []
    for fold, wanted in zip(selected, todo, strict=True):
        if wanted:
            directory = output / f"fold_{fold}"
            left.append(Fold(fold, folds.training(fold), folds.validation[fold], directory))
        else:
            log(f"fold {fold + 1}/{config.num_folds}: done before")
    for group in groups(left, at_once):
        run_group(config, programs, source, group)
    if not hosts.is_first():
        return {}
    done = [fold for fold in range(config.num_folds) if is_done(output, fold)]
    return finish(config, output, mean_shape.run(config, source, folds, done))


def folds_in_words(config: Config, folds: splits.Folds) -> str:
    """How many folds of what, and which group each of them leaves out, in their order."""
    over = f"by {config.group_by}" if config.group_by else "over patients"
    names = f" ({', '.join(folds.names)})" if folds.names else ""
    return f"{len(folds)} folds {over}{names}"


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
    config: Config, programs: Programs, source: loading.CaseSource, group: Sequence[Fold]
) -> None:
    """Train the folds of a group side by side, and predict and measure them one after another.

    Of several processes, all train and the first does the rest.
    """
    for fold in group if hosts.is_first() else ():
        with naming_path(fold.directory):
            fold.directory.mkdir(exist_ok=True)
    first = any(fold.number == (config.folds or [0])[0] for fold in group)
    with profiled(config.profile if first and hosts.is_first() else None):
        trained = train_folds(config, programs, source, group)
    if hosts.is_first():
        for fold, (params, summary) in zip(group, trained, strict=True):
            measure_fold(config, programs, source, fold, params, summary)


def measure_fold(
    config: Config,
    programs: Programs,
    source: loading.CaseSource,
    fold: Fold,
    params: Any,
    summary: dict[str, Any],
) -> None:
    """Predict and measure what is not done yet; ``metrics.json``, written last, ends the fold."""
    directory, validation = fold.directory, fold.validation
    title = f"fold {fold.number + 1}/{config.num_folds}"
    tensorboard.write_events(directory / "history.csv", directory / "tensorboard")
    started = time.perf_counter()
    weights = weights_sha256(params)
    found = {case_id: stored_rows(directory, case_id, weights) for case_id in validation}
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
            rows = predict_and_measure(config, programs, params, case, fold.number, directory)
            store_rows(directory, case.case_id, weights, rows, config.data.classes)
            found[case.case_id] = rows
    rows = [row for rows in found.values() for row in rows or ()]
    shutil.rmtree(directory / "figures", ignore_errors=True)
    for case_id in cases_to_show(rows, config.predict.figures):
        save_figure(config, programs, params, source[case_id], directory)
    summary["predict_s"] = round(time.perf_counter() - started, 2)
    summary["peak_memory_gb"] = round(peak_memory_bytes(jax.local_devices()[0]) / 1e9, 2)
    write_json(directory / "metrics.json", {"metric_per_case": rows, "summary": summary})
    log(
        f"{title}: {config.train.steps} steps in {summary['train_s']:.0f} s "
        f"({summary['steps_per_s']:.2f} steps/s, first step {summary['first_step_s']:.0f} s, "
        f"{summary['input_wait_share']:.1%} of the time waiting for input, "
        f"peak memory {summary['peak_memory_gb']:.1f} GB)"
        f", loss {summary['loss'] or np.nan:.3f}; {len(validation)} cases predicted in "
        f"{summary['predict_s']:.0f} s; {outcome(rows)}"
    )


def outcome(rows: Sequence[dict[str, Any]]) -> str:
    """Mean Dice of a fold's positive cases in words, and what to do where nothing is ever found."""
    dice = [row["dice"] for row in rows if row["dice"] is not None]
    if not dice:
        return "no positive case, no Dice"
    words = f"Dice {np.mean(dice):.3f} over {len(dice)}"
    if any(row["volume_predicted_ml"] for row in rows):
        return words
    return (
        f"{words}; no voxel of any case is found. The network may have learnt that nothing is "
        "right for most crops: use a lower --train.optimizer.learning-rate or --loss.smooth"
    )


def predict_and_measure(
    config: Config, programs: Programs, params: Any, case: Case, fold: int, directory: Path
) -> list[dict[str, Any]]:
    """Predict a case, save mask and probabilities in its T2W frame, and measure them there."""
    classes = config.data.classes
    probability = preprocessing.to_original(
        predict_case(programs.predict, params, case, config, config.network.num_classes), case
    )
    mask = to_mask(probability, config.predict.threshold)
    affine = case.original_affine
    foreground = probability if len(classes) == 1 else probability[..., 1:]
    for path, array in zip(
        prediction_files(directory, case.case_id, classes),
        [mask, *np.moveaxis(foreground, -1, 0)],
        strict=True,
    ):
        with naming_path(path):
            volume_io.write_nifti(path, array, affine, case_id=case.case_id)
    measured = case_metrics(mask, case.original_truth, spacing_of(affine), classes=classes)
    identity: dict[str, Any] = {
        "case_id": case.case_id,
        "patient_id": case.patient_id,
        "fold": fold,
    }
    if config.data.target == lesions.TARGET:
        identity |= {"detection": lesions.detect(foreground[..., 0], case.original_truth)}
    return [identity | {"class": name} | values for name, values in measured.items()]


def weights_sha256(params: Any) -> str:
    """Hash of the weights, by name."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(value).tobytes())
    return digest.hexdigest()


def finish(config: Config, output: Path, baseline: dict[str, Any]) -> dict[str, Any]:
    """Gather the folds that are done into ``metrics.json``, the CSV and the report; print them.

    The report comes last: should it fail, the results are on disk and on the screen.
    """
    done = {}
    for fold in range(config.num_folds):
        file = output / f"fold_{fold}" / "metrics.json"
        if file.exists():
            done[fold] = read_json(file)
    rows = [row for record in done.values() for row in record["metric_per_case"]]
    metrics = summary.summarise(rows, folds=list(done)) | {
        "target": config.data.target,
        "classes": list(config.data.classes),
        "threshold": config.predict.threshold,
        "checkpoint": "ema" if config.train.average_decay else "last",
        "num_folds": config.num_folds,
        "folds_done": list(done),
        "baseline_mean_shape": baseline,
        "best_checkpoint": {fold: record["summary"]["best"] for fold, record in done.items()},
        "fold_summaries": {fold: record["summary"] for fold, record in done.items()},
    }
    with naming_path(output / "metrics.json"):
        run_folder.write_metrics(metrics, output / "metrics.json", output / "metrics.csv")
    log(summary.format_summary(metrics))
    shape = baseline["mean_dice"]
    if shape is not None:
        log(f"baseline that ignores the image (mean training shape): Dice {shape:.3f}")
    missing = [str(fold) for fold in range(config.num_folds) if fold not in done]
    if missing:
        log(f"folds still to run: {' '.join(missing)} (the same command with --folds, or without)")
    with naming_path(output / "report.html"):
        html = page.write_report(output)
    log(f"report: {html}")
    return metrics
