"""The memory of a training step from the shapes of a network, where it cannot be compiled.

One number for each platform: bytes of temporaries over those of one copy of all that the encoders'
blocks give out. They come of whole steps that XLA compiled for chips that were not there
(``volume3d``: two crops of 20 x 160 x 160; ``slice2d``: 16 slices of 192 x 192; bfloat16).
"""

import math
from collections.abc import Sequence

from cmsad_jax.modules.encoder import EncoderConfig
from experiments.settings.config import Config, window

COPIES = {"gpu": 23.0, "tpu": 24.0, "cpu": 23.0}
"""Of the outputs of all blocks. On one H100, volume3d took 11.4 GB with its weights, and this gives
11.4; on one v5e 10.0, and this 11.7; on 16 v5e, slice2d took 7.2 GB a chip, and this gives 7.0."""

REMATERIALIZED = 0.5
"""What is left of them where blocks are computed again; a cautious guess, not measured."""

BYTES_PER_WEIGHT = 16
"""Weights, their average, and two moments, in float32."""


def step_bytes(config: Config, platform: str, num_devices: int = 1) -> int:
    """Memory of one training step on each device."""
    network, train = config.network, config.train
    return bytes_of(
        network.encoder,
        window(config),
        num_modalities=len(config.data.modalities),
        examples=math.ceil(train.batch_size / num_devices / train.accumulation),
        itemsize=2 if network.dtype == "bfloat16" else 4,
        rematerialize=network.rematerialize,
        platform=platform,
    )


def bytes_of(
    encoder: EncoderConfig,
    space: Sequence[int],
    *,
    num_modalities: int,
    examples: int,
    itemsize: int,
    rematerialize: bool,
    platform: str,
) -> int:
    """The same of an encoder for each modality, for so many examples at once."""
    copies = COPIES[platform] * (REMATERIALIZED if rematerialize else 1)
    moving = copies * examples * num_modalities * outputs(encoder, space) * itemsize
    return round(moving + BYTES_PER_WEIGHT * weights(encoder, num_modalities))


def outputs(encoder: EncoderConfig, space: Sequence[int]) -> int:
    """Numbers that the blocks of an encoder give out for one example."""
    shapes = encoder.stage_shapes(tuple(space))
    return sum(
        math.prod(shape) * channels * blocks
        for shape, channels, blocks in zip(shapes, encoder.channels, encoder.blocks, strict=True)
    )


def weights(encoder: EncoderConfig, num_modalities: int) -> int:
    """About how many weights a network has: its encoders, and a decoder like one of them."""
    before, total = 1, 0
    for channels, kernel, blocks in zip(
        encoder.channels, encoder.kernels, encoder.blocks, strict=True
    ):
        total += math.prod(kernel) * (before * channels + (2 * blocks - 1) * channels**2)
        before = channels
    return total * (num_modalities + 1)
