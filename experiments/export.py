"""A finished run as one file that JAX runs without Flax and without this project's network.

``python -m experiments.export RUN --output model.cmsad`` packs the folds' weights (the moving
averages of the last checkpoints, to which the run's figures belong), the programs for cpu, cuda and
tpu, and all that surrounds them. ``cmsad_jax.export`` says what the file holds and reads it.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from cmsad_jax import export
from cmsad_jax.named_weights import flatten_weights, to_safetensors, unflatten_weights
from cmsad_jax.types import ConfigError
from experiments.prediction.windows import attention_window, predict_window
from experiments.process.accelerator import select_accelerator
from experiments.process.console import log, run_main
from experiments.process.storage import read_json
from experiments.settings.config import Config, window
from experiments.settings.options import REGISTRY
from experiments.settings.stored import from_json
from experiments.training.checkpoints import load_params

UNSTATED_LICENSE = (
    "The terms of use of these weights were not stated when they were exported. Ask whoever made "
    "them. Weights may be bound by the terms of the data that they were trained on (those of "
    "PI-CAI are CC BY-NC 4.0)."
)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Pack a finished run into one file: programs, weights, preprocessing, provenance, card."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder of python -m experiments.cv."""
    output: Path = Path("model.cmsad")
    """File to write."""
    folds: tuple[int, ...] | None = None
    """Folds that become the members of the ensemble. All of the run by default."""
    license: str = ""
    """Terms of use of the weights: a short name such as CC-BY-NC-4.0, or the path of a text."""
    safetensors: Path | None = None
    """Folder into which the weights are written as well, one safetensors file for each fold."""


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


def write_artifact(
    run: Path,
    target: Path | io.BytesIO,
    *,
    folds: Sequence[int] | None = None,
    license: str = "",
    platforms: Sequence[str] = export.PLATFORMS,
) -> export.Description:
    """Export ``run`` into a file or a buffer; returns what is said of it.

    Raises:
        ConfigError: no run, or folds that are not done.
    """
    config, record = read_run(run)
    chosen = run_members(run, config, folds)
    weights = [flatten_weights(load_params(run, fold)) for fold in chosen]
    programs = {}
    functions = {"predict": predict_window(config)}
    if config.network.fusion.kind != "early":
        finest = config.loss.distilled_stages(config.network.encoder.num_stages)[0]
        functions["attention"] = attention_window(config, (finest,))
    for name, function in functions.items():
        programs[name] = export.export_program(
            lambda flat, windows, present, function=function: function(
                unflatten_weights(flat), windows, present
            ),
            weights[0],
            window=window(config),
            num_modalities=len(config.data.modalities),
            platforms=platforms,
        )
    file = Path(license)
    text = file.read_text("utf-8") if license and file.is_file() else license or UNSTATED_LICENSE
    description = describe(
        config,
        members=[f"fold_{fold}" for fold in chosen],
        provenance={**_without_paths(record), "environment": _json(run / "environment.json")},
        metrics=_json(run / "metrics.json"),
        license=text.strip().splitlines()[0] if license else "unspecified",
    )
    card = model_card(description, sum(values.size for values in weights[0].values()))
    export.save(
        target,
        description=description,
        programs=programs,
        weights=weights,
        card=card,
        license_text=text.strip() + "\n",
    )
    return description


def describe(
    config: Config,
    *,
    members: Sequence[str],
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    license: str,
) -> export.Description:
    """What an artifact of a run says of itself."""
    kept = ("mean", "sd", "num_cases", "num_positive", "num_defined")
    return export.Description(
        modalities=config.data.modalities,
        target=config.data.target,
        classes=config.data.classes,
        window=window(config),
        preprocess=dataclasses.asdict(config.data.preprocess),
        overlap=config.predict.overlap,
        batch_size=config.predict.batch_size,
        flip=config.predict.flip,
        threshold=config.predict.threshold,
        allow_missing=config.data.allow_missing or config.train.modality_dropout > 0,
        members=tuple(members),
        provenance=provenance,
        metrics={key: metrics[key] for key in kept if key in metrics},
        license=license,
    )


def model_card(description: export.Description, num_parameters: int) -> str:
    """What a person should know before using the model, Markdown."""
    data = description.provenance["config"]["data"]
    environment = description.provenance["environment"]
    grid = description.preprocess
    low, high = grid["clip_percentiles"]
    rows = [
        f"| {name} | {metric} | {_figure(description.metrics, 'mean', name, metric)} "
        f"| {_figure(description.metrics, 'sd', name, metric)} "
        f"| {_figure(description.metrics, 'num_defined', name, metric)} |"
        for name in description.classes
        for metric in ("dice", "sensitivity", "precision", "hd95_mm", "false_positive_volume_ml")
    ]
    centre = "gland" if grid["centre"] == "gland" else "T2W image"
    rule = (
        f"a voxel above {description.threshold} belongs to the target"
        if len(description.classes) == 1
        else "a voxel belongs to the most probable class, background among them"
    )
    missing = "may be missing" if description.allow_missing else "must all be there"
    return f"""# Model card

Segments {", ".join(description.classes)} in prostate MRI from {", ".join(description.modalities)}
({missing}). **Research software, not a medical device: not for diagnosis or treatment.**

- **Model**: cross-modal self-attention distillation (CMSAD), a reconstruction from the abstract of
  arXiv 2011.03908; {num_parameters:,} weights for each of {len(description.members)} members
  ({", ".join(description.members)}), whose probabilities are averaged.
- **Input**: volumes resampled to {_times(grid["size"])} voxels (d h w) of
  {_times(grid["spacing_mm"])} mm around the centre of the {centre}, clipped to the percentiles
  {low:g} to {high:g}, scaled to mean 0 and sd 1. What lies outside that grid is not examined.
- **Output**: probabilities; {rule}.
- **Trained on**: data set `{data["name"]}`, fingerprint
  `{description.provenance["data_fingerprint"][:16]}`; commit `{environment.get("git_commit")}`,
  {environment.get("started", "date unknown")}, {environment.get("device", "device unknown")}.
- **Licence of the weights**: {description.license}.

## Cross-validated figures

Each case was measured by the member that had not seen it. The ensemble of all members has seen
every case of the training data: predictions on these are no test.

| class | metric | mean | sd | cases |
|---|---|---|---|---|
{chr(10).join(rows)}

## Use

```
python -m experiments.predict --model model.cmsad --input CASES --output PREDICTIONS
```

or, on arrays and with no other packages than jax, jaxtyping and flatbuffers,
`cmsad_jax.export.load("model.cmsad")`. The weights are `weights/*.safetensors` of this archive, a
zip file.
"""


def _without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run without the folders of the machine it ran on."""
    folders = ("output", "profile", "folds_file", "compilation_cache")
    config = {key: value for key, value in record["config"].items() if key not in folders}
    config["data"] = {k: v for k, v in config["data"].items() if k not in ("path", "cache")}
    return {**record, "config": config}


def _figure(metrics: Mapping[str, Any], statistic: str, name: str, metric: str) -> str:
    value = metrics.get(statistic, {}).get(name, {}).get(metric)
    if value is None:
        return "undefined"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    config = tyro.cli(
        ExportConfig, prog="python -m experiments.export", args=arguments, registry=REGISTRY
    )
    select_accelerator("auto")
    description = write_artifact(
        config.run, config.output, folds=config.folds, license=config.license
    )
    log(
        f"{config.output}: {', '.join(description.classes)} from "
        f"{', '.join(description.modalities)}, {len(description.members)} members, programs for "
        f"{', '.join(export.PLATFORMS)}, {config.output.stat().st_size / 1e6:.1f} MB"
    )
    if config.safetensors is not None:
        model = export.load(config.output)
        config.safetensors.mkdir(parents=True, exist_ok=True)
        for member, weights in zip(description.members, model.weights, strict=True):
            file = config.safetensors / f"{member}.safetensors"
            file.write_bytes(to_safetensors(weights))
            log(f"{file}: {len(weights)} arrays")


if __name__ == "__main__":
    run_main(main)
