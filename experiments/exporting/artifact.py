"""A finished run as one file: programs, weights, and all that surrounds them."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from cmsad_jax import export
from cmsad_jax.named_weights import Weights, flatten_weights, unflatten_weights
from data_pipelines.files import naming_path
from experiments.exporting.model_card import TrainingSet, model_card
from experiments.measuring.summary import summarise
from experiments.measuring.training_data import to_provenance
from experiments.prediction.windows import (
    attention_window,
    drawn_window,
    predict_window,
    weights_window,
)
from experiments.process.records import encode
from experiments.run_folder import Results, RunFolder, RunRecord, fold_name, training_cases
from experiments.settings.config import Config, FoldsAsked, box_of, window
from experiments.training.checkpoints import load_params

UNSTATED_LICENSE = (
    "The terms of use of these weights were not stated when they were exported. Ask whoever made "
    "them. Weights may be bound by the terms of the data that they were trained on (those of "
    "PI-CAI are CC BY-NC 4.0)."
)


def write_artifact(
    run: Path,
    target: Path | io.BytesIO,
    *,
    folds: FoldsAsked = None,
    license: str = "",
    platforms: Sequence[str] = export.PLATFORMS,
) -> export.Description:
    """Export ``run`` into a file or a buffer; returns what is said of it.

    Raises:
        ConfigError: no run, or folds that are not done.
    """
    folder = RunFolder(run)
    config, record = folder.read_config(), folder.read_record()
    chosen = folder.members(config, folds)
    weights = [flatten_weights(load_params(run, fold)) for fold in chosen]
    file = Path(license)
    text = file.read_text("utf-8") if license and file.is_file() else license or UNSTATED_LICENSE
    results = folder.read_results() if folder.metrics.is_file() else None
    description = describe(
        config,
        members=[fold_name(fold) for fold in chosen],
        provenance={
            **encode(_without_paths(record)),
            "environment": encode(folder.read_environment()),
            **_training_data(folder),
        },
        metrics=figures(results, chosen) if results else {},
        operating_point=encode(results.summary.operation.point)
        if results and results.summary.operation
        else {},
        license=text.strip().splitlines()[0] if license else "unspecified",
    )
    card = model_card(
        description,
        sum(values.size for values in weights[0].values()),
        _training_set(folder, chosen),
    )
    with naming_path(target) if isinstance(target, Path) else contextlib.nullcontext():
        export.save(
            target,
            description=description,
            programs=_programs(config, weights[0], platforms),
            weights=weights,
            card=card,
            license_text=text.strip() + "\n",
            first=_first(folder, folds, license, platforms) if config.cascade.target else None,
        )
    return description


def _first(run: RunFolder, folds: FoldsAsked, license: str, platforms: Sequence[str]) -> bytes:
    """The artifact of the first network of a cascade, of the same folds."""
    archive = io.BytesIO()
    write_artifact(run.first, archive, folds=folds, license=license, platforms=platforms)
    return archive.getvalue()


def _programs(config: Config, weights: Weights, platforms: Sequence[str]) -> dict[str, bytes]:
    """What ``functions_of`` gives, each serialised for weights of these names and shapes."""
    return {
        name: export.export_program(
            lambda flat, windows, present, function=function: function(
                unflatten_weights(flat), windows, present
            ),
            weights,
            window=window(config),
            num_modalities=len(config.data.modalities),
            num_channels=config.network.num_channels,
            platforms=platforms,
        )
        for name, function in functions_of(config).items()
    }


def functions_of(config: Config) -> dict[str, Callable[..., jax.Array]]:
    """What an artifact of a run can compute, by the name of its program."""
    functions = {"predict": predict_window(config)}
    if config.network.fusion.kind != "early":
        finest = config.loss.distilled_stages(config.network.encoder.num_stages)[0]
        functions["attention"] = attention_window(config, (finest,))
    if config.network.fusion.kind == "weighted":
        functions["modality_weights"] = weights_window(config)
    if config.network.encoder.draws:
        functions["drawn"] = drawn_window(config)
    return functions


def describe(
    config: Config,
    *,
    members: Sequence[str],
    provenance: Mapping[str, object],
    metrics: Mapping[str, object],
    license: str,
    operating_point: Mapping[str, object] | None = None,
) -> export.Description:
    """What an artifact of a run says of itself."""
    return export.Description(
        modalities=config.data.modalities,
        target=config.data.target,
        classes=config.data.definition.part_names,
        labels=config.data.labels,
        lesions=config.data.lesions,
        window=window(config),
        preprocess=dataclasses.asdict(config.data.preprocess),
        overlap=config.predict.overlap,
        batch_size=config.predict.batch_size,
        flip=config.predict.flip,
        threshold=config.predict.threshold,
        allow_missing=config.data.allow_missing or config.train.modality_dropout > 0,
        members=tuple(members),
        provenance=provenance,
        metrics=metrics,
        license=license,
        operating_point=operating_point or {},
        box=box_of(config) if config.cascade.target else (),
        margin_mm=config.cascade.margin_mm if config.cascade.target else None,
    )


def _training_set(folder: RunFolder, members: Sequence[int]) -> TrainingSet:
    """What the members were trained on, as far as the run's folds say."""
    if not folder.folds.is_file():
        return TrainingSet()
    folds = folder.read_folds()
    return TrainingSet(
        tuple(len(training_cases(folds, fold)) for fold in members),
        tuple(folds.names),
        tuple(
            folder.fold(fold).read_results().summary.started_from if folder.is_done(fold) else ""
            for fold in members
        ),
    )


def _training_data(folder: RunFolder) -> dict[str, object]:
    """What is known of the data, for the provenance; nothing of runs of before."""
    data = folder.read_training_data()
    return {} if data is None else {"training_data": to_provenance(data)}


def figures(results: Results, members: Sequence[int]) -> dict[str, object]:
    """What an artifact says of how well its members do, JSON values; nothing of other folds."""
    summary, rows = results.summary, results.summary.metric_per_case
    if {row.fold for row in rows} != {*members}:
        rows = tuple(row for row in rows if row.fold in members)
        if not rows:
            return {}
        summary = summarise(rows, sorted({row.fold for row in rows if row.fold is not None}))
    found = summary.detection
    detection = found and {
        "average_precision": found.average_precision,
        "auroc": found.auroc,
        "num_cases": found.num_cases,
        "num_lesions": found.num_lesions,
        "interval": {
            "average_precision": found.interval.average_precision,
            "auroc": found.interval.auroc,
        },
    }
    return encode(
        {
            "mean": summary.mean,
            "sd": summary.sd,
            "num_cases": summary.num_cases,
            "num_positive": summary.num_positive,
            "num_defined": summary.num_defined,
            "interval": summary.interval,
            "detection": detection,
        }
    )


def _without_paths(record: RunRecord) -> RunRecord:
    """The record of a run without the folders of the machine it ran on."""
    folders = ("output", "profile", "folds_file", "init", "compilation_cache")
    config = {key: value for key, value in record.config.items() if key not in folders}
    data = config["data"]
    assert isinstance(data, Mapping), "a configuration has a section of its data"
    config["data"] = {key: value for key, value in data.items() if key not in ("path", "cache")}
    return RunRecord(config, record.data_fingerprint, record.plan_sha256)
