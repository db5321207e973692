"""A finished run as one file that JAX runs without Flax and without this project's network.

``python -m experiments.export RUN --output model.cmsad`` packs the folds' weights (the moving
averages of the last checkpoints, to which the run's figures belong), the programs for cpu, cuda and
tpu, and all that surrounds them. ``cmsad_jax.export`` says what the file holds and reads it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from cmsad_jax import export
from cmsad_jax.named_weights import to_safetensors
from cmsad_jax.types import ConfigError
from data_pipelines.files import atomic_file
from data_pipelines.short_help import program
from experiments.exporting.artifact import write_artifact
from experiments.process.accelerator import select_accelerator
from experiments.process.console import log, run_main
from experiments.settings.config import FoldsAsked
from experiments.settings.options import REGISTRY


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Pack a finished run into one file: programs, weights, preprocessing, provenance, card."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder of python -m experiments.cv."""
    output: Path = Path("model.cmsad")
    """File to write."""
    folds: FoldsAsked = None
    """Folds that become the members; all: the network of all cases. Each fold by default."""
    license: str = ""
    """Terms of use of the weights: a short name such as CC-BY-NC-4.0, or the path of a text."""
    safetensors: Path | None = None
    """Folder into which the weights are written as well, one safetensors file for each fold."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    config = tyro.cli(
        ExportConfig, prog=program("experiments.export"), args=arguments, registry=REGISTRY
    )
    if config.output.is_dir():
        raise ConfigError(
            f"an artifact is one file; got the folder {config.output}. Name a file in it: "
            f"--output={config.output / 'model.cmsad'}."
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
        for member, weights in zip(description.members, model.weights, strict=True):
            file = config.safetensors / f"{member}.safetensors"
            with atomic_file(file) as partial:
                partial.write_bytes(to_safetensors(weights))
            log(f"{file}: {len(weights)} arrays")


if __name__ == "__main__":
    run_main(main)
