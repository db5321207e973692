"""Systems around the method as changes of a run: rows of ablations and of benchmarks.

What is known of each, and what is ours: docs/comparison.md.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

from cmsad_jax.modules import baselines
from cmsad_jax.modules.slices import Slices
from experiments.settings.config import CascadeConfig, Config, TrainConfig

SLICES_AT_ONCE = 6
"""Depth of the crops of a network with attention across slices (2.5D)."""

POSITIVE_CROPS = 0.6
"""Share of such crops that hold target, where none is asked for. About as many slices hold some
then as where they are drawn one by one (on the phantom 11 and 9 of 24); of deeper crops, and with
a third of them, the networks learn less (``experiments/RESULTS.md``)."""


def slices_alone(config: Config) -> Config:
    """A network of slices, which sees as many of them a step as the volumes of a batch hold."""
    depth, *plane = config.train.crop
    train = dataclasses.replace(
        config.train, crop=(1, *plane), batch_size=config.train.batch_size * depth
    )
    network = dataclasses.replace(
        config.network, encoder=baselines.in_plane(config.network.encoder)
    )
    return dataclasses.replace(config, network=network, train=train)


def across_slices(config: Config, kind: Slices) -> Config:
    """The same network with attention across the slices of a crop (2.5D).

    Crops are of ``SLICES_AT_ONCE``, or the fewer that are asked for, and as many as make up the
    same number of slices.
    """
    depth, *plane = config.train.crop
    slices = depth * config.train.batch_size
    depth = min(SLICES_AT_ONCE, depth if depth > 1 else config.data.preprocess.size[0])
    share = config.train.foreground_share
    train = dataclasses.replace(
        config.train,
        crop=(depth, *plane),
        batch_size=max(1, slices // depth),
        foreground_share=POSITIVE_CROPS if share == TrainConfig().foreground_share else share,
    )
    encoder = dataclasses.replace(baselines.in_plane(config.network.encoder), slices=kind)
    network = dataclasses.replace(config.network, encoder=encoder)
    return dataclasses.replace(config, network=network, train=train)


def with_distance(config: Config) -> Config:
    """The network that learns the signed distance to the surface beside the mask."""
    network = dataclasses.replace(config.network, distance_clip_mm=15.0)
    return dataclasses.replace(config, network=network)


def modality_weights(config: Config) -> Config:
    """The network that weighs each modality once for each example."""
    fusion = dataclasses.replace(config.network.fusion, kind="weighted")
    return dataclasses.replace(config, network=dataclasses.replace(config.network, fusion=fusion))


def light(config: Config) -> Config:
    """The network with separable convolutions."""
    return dataclasses.replace(config, network=baselines.light(config.network))


def cascaded(config: Config) -> Config:
    """The network in the box around the gland, which another one finds before."""
    return dataclasses.replace(config, cascade=CascadeConfig(target="gland"))


SYSTEMS: dict[str, Callable[[Config], Config]] = {
    "slice2d": slices_alone,
    "csam": partial(across_slices, kind="csam"),
    "cat": partial(across_slices, kind="cat"),
    "cascade": cascaded,
    "distance": with_distance,
    "modality-weights": modality_weights,
    "light": light,
}
"""By the name of its row."""

OF_ITS_OWN_SIZE = ("light",)
"""Rows that are about their size: neither widened to the weights of others, nor less distilled."""
