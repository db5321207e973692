"""Baselines of the field as configurations of the same network, and their sizes.

They are trained by the same step as CMSAD, so that a comparison differs in the network alone.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cmsad_jax.modules.encoder import EncoderConfig
from cmsad_jax.modules.network import CMSAD, NetworkConfig, apply

_RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)


def unet(config: NetworkConfig) -> NetworkConfig:
    """A plain U-Net of the stacked modalities: two convolutions a stage, no shortcuts.

    Stages, kernels and strides are those of ``config`` (Ronneberger et al., MICCAI 2015, with the
    instance normalisation, leaky ReLU and strided convolutions of nnU-Net).

    Examples:
        >>> unet(NetworkConfig()).fusion.kind
        'early'
    """
    encoder = dataclasses.replace(
        config.encoder, block="plain", blocks=(2,) * config.encoder.num_stages
    )
    return dataclasses.replace(
        config,
        encoder=encoder,
        fusion=dataclasses.replace(config.fusion, kind="early"),
        decoder_block="plain",
        decoder_blocks=2,
    )


def residual_encoder_unet(config: NetworkConfig) -> NetworkConfig:
    """A residual-encoder U-Net of the stacked modalities, in the style of nnU-Net's ResEnc presets.

    1, 3, 4, 6, 6, ... residual blocks a stage in the encoder, one plain convolution in the decoder
    (Isensee et al., MICCAI 2024). Stages, kernels and strides are those of ``config``.

    Examples:
        >>> residual_encoder_unet(NetworkConfig()).encoder.blocks
        (1, 3, 4, 6)
    """
    num_stages = config.encoder.num_stages
    blocks = (_RESIDUAL_BLOCKS + (6,) * num_stages)[:num_stages]
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, block="residual", blocks=blocks),
        fusion=dataclasses.replace(config.fusion, kind="early"),
        decoder_block="plain",
        decoder_blocks=1,
    )


def light(config: NetworkConfig) -> NetworkConfig:
    """The network with separable convolutions, a quarter wider: few weights, few operations.

    Depthwise, then pointwise convolutions (Howard et al., arXiv 1704.04861) in encoder and decoder.
    """
    channels = tuple(round(1.25 * c) for c in config.encoder.channels)
    encoder = dataclasses.replace(config.encoder, channels=channels, block="separable")
    return dataclasses.replace(config, encoder=encoder, decoder_block="separable")


def in_plane(encoder: EncoderConfig) -> EncoderConfig:
    """The encoder as one of slices: what its kernels and strides do in plane."""
    return dataclasses.replace(
        encoder,
        kernels=tuple(kernel[-2:] for kernel in encoder.kernels),
        strides=tuple(stride[-2:] for stride in encoder.strides),
    )


def count_parameters(config: NetworkConfig, space: tuple[int, ...]) -> int:
    """Number of weights of a network for images of shape ``space``; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, *space, config.num_channels), jnp.float32)
    shapes = jax.eval_shape(CMSAD(config).init, jax.random.key(0), image)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def count_operations(config: NetworkConfig, space: tuple[int, ...]) -> float:
    """Floating-point operations of one forward pass over ``space``, as XLA counts them.

    In the formulation for GPUs, wherever it is called: XLA counts the body of a loop once, and the
    correlation on CPUs is a loop.
    """
    network = CMSAD(config)
    image = jax.ShapeDtypeStruct((1, *space, config.num_channels), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    traced = jax.jit(lambda params, image: apply(network, params, image).logits).trace(
        params, image
    )
    cost = traced.lower(lowering_platforms=("cuda",)).cost_analysis()
    assert isinstance(cost, dict)
    return float(cost["flops"])


def match_parameters(config: NetworkConfig, target: int, space: tuple[int, ...]) -> NetworkConfig:
    """``config`` with all widths scaled by one factor, so that its weights number about ``target``.

    Widths are whole numbers, so small networks are matched within some per cent. The nearest of a
    few fixed-point steps is taken (the number grows about with the square of the width).
    """

    def scaled(factor: float) -> NetworkConfig:
        channels = tuple(max(2, round(factor * c)) for c in config.encoder.channels)
        return dataclasses.replace(
            config, encoder=dataclasses.replace(config.encoder, channels=channels)
        )

    factor, best = 1.0, config
    count = least = count_parameters(config, space)
    for _ in range(5):
        if count == target:
            break
        factor *= math.sqrt(target / count)
        candidate = scaled(factor)
        count = count_parameters(candidate, space)
        if abs(count - target) < abs(least - target):
            best, least = candidate, count
    return best
