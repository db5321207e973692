"""Tiny networks and batches that several tests share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cmsad_jax.modules import CMSAD, EncoderConfig, FusionConfig, NetworkConfig

TINY_3D = EncoderConfig(
    channels=(4, 6),
    kernels=((1, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (2, 2, 2)),
    blocks=(1, 1),
)
TINY_2D = EncoderConfig(
    channels=(4, 6), kernels=((3, 3),) * 2, strides=((1, 1), (2, 2)), blocks=(1, 1)
)


def tiny_config(
    *, rank: int = 3, fusion: str = "scff", scff_stages: tuple[int, ...] | None = None, **changes
) -> NetworkConfig:
    """A network of two stages, the least that has more than one of everything."""
    encoder = TINY_3D if rank == 3 else TINY_2D
    how = FusionConfig(kind=fusion, hidden=4, stages=scff_stages)
    return NetworkConfig(encoder=encoder, fusion=how, **changes)


def tiny_batch(*, batch: int = 2, rank: int = 3, modalities: int = 3, seed: int = 0) -> dict:
    """Random images with a bright cuboid that is the label, in the layout of a train step."""
    rng = np.random.default_rng(seed)
    space = (4, 16, 16)[-rank:]
    label = np.zeros((batch, *space), np.int32)
    label[(slice(None), *(slice(n // 4, n // 2) for n in space))] = 1
    image = rng.normal(size=(batch, *space, modalities)) + 2 * label[..., None]
    return {
        "image": image.astype(np.float32),
        "label": label,
        "present": np.ones((batch, modalities), bool),
        "key": rng.integers(0, 2**32, (batch, 2), np.uint32),
    }


def init(config: NetworkConfig, batch: dict) -> tuple[CMSAD, dict]:
    """A network and random weights, drawn by NumPy: nothing is compiled."""
    network = CMSAD(config)
    return network, random_params(network, jnp.asarray(batch["image"]))


def random_params(module: nn.Module, *inputs, seed: int = 0) -> dict:
    """Weights of the shapes that ``module`` asks for: scales 1, biases small, kernels He-normal."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        values = rng.normal(size=leaf.shape)
        if name == "kernel":
            values *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif name == "bias":
            values *= 0.1
        else:
            values = np.ones(leaf.shape)
        return jnp.asarray(values, jnp.float32)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)
