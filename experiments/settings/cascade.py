"""The first network of a cascade as a run of its own, whose settings follow from the second's."""

import dataclasses
from pathlib import Path

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from experiments.settings.command_line import complete
from experiments.settings.config import CascadeConfig, Config

STEPS_FACTOR = 3
"""How many times as many updates the first network has as the second, unless told otherwise.

It is small, and the second believes what it wrongly takes for gland: with as many updates as the
second it found the phantom's glands at a Dice of 0.87, with three times as many at 0.92, and of
the false lesions outside of them a third or less was left (``experiments/RESULTS.md``)."""


def first_config(config: Config, output: Path) -> Config:
    """The completed configuration of the first network of a cascade.

    It finds ``cascade.target`` on a grid of the same extent and larger voxels, in crops of whole
    planes; it starts from no given weights and learns no distance, and is kept in ``output``. The
    rest is as the second's.

    Raises:
        ConfigError: for a target that the data cannot have, or a grid too coarse for the network.
    """
    try:
        return _first_config(config, output)
    except (ConfigError, DataError) as error:
        raise ConfigError(
            "the first network of a cascade must be one that can be trained; got "
            f"--cascade.target={config.cascade.target} --cascade.coarser "
            f"{' '.join(map(str, config.cascade.coarser))}: {error} "
            "Or change these two, such as --cascade.target=gland --cascade.coarser 1 2 2."
        ) from error


def _first_config(config: Config, output: Path) -> Config:
    cascade, data, train = config.cascade, config.data, config.train
    grid, coarser = data.preprocess, cascade.coarser
    size = _divided(grid.size, coarser)
    crop = (min(train.crop[0], size[0]), *size[1:])
    same = cascade.target == data.target
    return complete(
        dataclasses.replace(
            config,
            output=output,
            plan=None,
            folds_file=None,
            init=None,
            group_by=None,
            profile=None,
            cascade=CascadeConfig(),
            data=dataclasses.replace(
                data,
                target=cascade.target,
                labels=data.labels if same else (),
                lesions=data.lesions if same else (),
                preprocess=dataclasses.replace(
                    grid,
                    size=size,
                    spacing_mm=tuple(
                        mm * times for mm, times in zip(grid.spacing_mm, coarser, strict=True)
                    ),
                ),
            ),
            network=dataclasses.replace(config.network, prior=False, distance_clip_mm=None),
            predict=dataclasses.replace(config.predict, mask_from="probability"),
            train=dataclasses.replace(
                train, crop=crop, steps=cascade.steps or STEPS_FACTOR * train.steps
            ),
        )
    )


def _divided(sizes: tuple[int, ...], by: tuple[int, ...]) -> tuple[int, int, int]:
    d, h, w = (-(-n // times) for n, times in zip(sizes, by, strict=True))
    return d, h, w
