"""A run folder with checkpoints of random weights, as if ``experiments.cv`` had left it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cmsad_jax.modules import CMSAD, EncoderConfig, FusionConfig
from cmsad_jax.training import TrainState
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.serving import loading, splits
from experiments.measuring.summary import summarise
from experiments.run_folder import Results, RunFolder
from experiments.settings.command_line import complete
from experiments.settings.config import Config, TrainConfig
from experiments.settings.stored import to_json
from experiments.training.checkpoints import Checkpoints
from tests.experiments.fake_run import row_of
from tests.networks import random_params

ENCODER = EncoderConfig(
    channels=(4, 6),
    kernels=((1, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (2, 2, 2)),
    blocks=(1, 1),
)


def tiny_config(*, modality_dropout: float = 0.0) -> Config:
    """Two folds, T2W and ADC, windows of 4 x 8 x 8 on a grid of 6 x 16 x 16."""
    config = Config(
        num_folds=2,
        data=DataConfig(
            modalities=("t2w", "adc"),
            preprocess=PreprocessConfig(spacing_mm=(3.0, 1.0, 1.0), size=(6, 16, 16)),
        ),
        train=TrainConfig(crop=(4, 8, 8), modality_dropout=modality_dropout),
    )
    network = dataclasses.replace(
        config.network, encoder=ENCODER, fusion=FusionConfig(hidden=4), head_bias=0.0
    )
    return complete(dataclasses.replace(config, network=network))


def make_untrained_run(folder: Path, config: Config, *, done: int = 2) -> list[dict[str, Any]]:
    """Write the run; returns the weights of each fold that is done."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"config": to_json(config), "data_fingerprint": "0123abcd"}), encoding="utf-8"
    )
    (folder / "environment.json").write_text(json.dumps({"git_commit": "abc123"}), encoding="utf-8")
    optimizer = config.train.optimizer.optimizer(config.train.steps)
    members = []
    for fold in range(done):
        directory = folder / f"fold_{fold}"
        image = jnp.zeros((1, *config.train.crop, len(config.data.modalities)))
        average = random_params(CMSAD(config.network), image, seed=fold)
        other = random_params(CMSAD(config.network), image, seed=100 + fold)
        checkpoints = Checkpoints(directory / "checkpoints", config, fold=fold)
        step = jnp.asarray(config.train.steps, jnp.int32)
        checkpoints.save("last", TrainState(step, other, average, optimizer.init(other)))
        checkpoints.close()
        (directory / "metrics.json").write_text("{}", encoding="utf-8")
        members.append(average)
    rows = [row_of(name, dice=dice) for name, dice in (("a", 0.0), ("b", 0.5), ("c", 1.0))]
    RunFolder(folder).write_results(Results(summarise(rows, [0])))
    return members


def revisitable(folder: Path, source: loading.CaseSource) -> Path:
    """Let the run be one on ``source``, with two folds of it; returns the folder."""
    record = json.loads((folder / "config.json").read_text("utf-8"))
    record["data_fingerprint"] = source.fingerprint
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    splits.make_folds(source.info, num_folds=2).save(folder / "folds.json")
    return folder
