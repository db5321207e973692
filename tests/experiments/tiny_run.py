"""Runs of a tiny network on a few phantom cases, for tests of whole runs."""

import contextlib
import csv
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from cmsad_jax.modules import EncoderConfig
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.serving import loading
from experiments import reproduce
from experiments.settings.command_line import complete
from experiments.settings.config import Config, PredictConfig, TrainConfig
from experiments.studies import cross_validation
from experiments.training.programs import compile_programs

ENCODER = EncoderConfig(
    channels=(4, 6),
    kernels=((1, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2)),
    blocks=(1, 1),
)


def tiny(output: Path, cache: Path, **data) -> Config:
    """Three folds of two steps on a coarse grid."""
    config = Config(
        accelerator="cpu",
        output=output,
        num_folds=3,
        data=DataConfig(
            phantom=PhantomOptions(num_cases=10),
            cache=cache,
            preprocess=PreprocessConfig(spacing_mm=(3, 3, 3), size=(12, 32, 32)),
            **data,
        ),
        train=TrainConfig(steps=2, batch_size=2, crop=(8, 32, 32), validations=1),
        predict=PredictConfig(figures=1),
    )
    fusion = dataclasses.replace(config.network.fusion, stages=(1,))  # half the program
    network = dataclasses.replace(config.network, encoder=ENCODER, fusion=fusion)
    return complete(dataclasses.replace(config, network=network))


@contextlib.contextmanager
def shared_programs():
    """Runs of one network share their programs: to compile them is most of a run's time."""
    kept = {}

    def programs(config: Config, devices):
        train = dataclasses.replace(config.train, checkpoint_every=1, max_skipped=1)
        train = dataclasses.replace(train, steps_per_call=None)
        key = config.network, config.loss, train, config.data.modalities, config.parallel
        if key not in kept:
            kept[key] = compile_programs(config, devices)
        if config.train.steps_per_call is None:
            return kept[key]
        asked = compile_programs(config, devices)
        return dataclasses.replace(
            kept[key], several=asked.several, steps_per_call=asked.steps_per_call
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_validation, "compile_programs", programs)
        patch.setattr(reproduce, "compile_programs", programs)
        yield


def history(output: Path, fold: int = 0) -> list[dict[str, str]]:
    """Curves of a fold, but for the speed."""
    with (output / f"fold_{fold}" / "history.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.pop("examples_per_s") is not None]


def poisoned(monkeypatch, *steps: int, calls: int | None = None) -> None:
    """Let the batches of these steps hold a value that is not a number, in the first ``calls``."""
    original, number = loading.train_batches, itertools.count(1)

    def batches(source, case_ids, sampling):
        spoilt = calls is None or next(number) <= calls
        for step, batch in enumerate(original(source, case_ids, sampling), sampling.start_step + 1):
            if step in steps and spoilt:
                batch["image"][0] = np.nan
            yield batch

    monkeypatch.setattr(loading, "train_batches", batches)
