"""Whole volumes through a network that sees windows: probabilities, attention, masks."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cmsad_jax import kernels
from cmsad_jax.inference import sliding_window
from cmsad_jax.modules.network import (
    CMSAD,
    NetworkOutput,
    apply,
    probabilities,
    probabilities_of_distance,
)
from data_pipelines.case import STORED_UNIT, Case
from experiments.prediction.cascade import as_background, beyond_margin
from experiments.settings.config import Config, window

Params: TypeAlias = "Mapping[str, Params | np.ndarray | jax.Array]"
"""Weights of a network, by the names of its modules."""


def predict_window(config: Config) -> Callable[..., jax.Array]:
    """``Programs.predict`` of a configuration, not yet jitted."""
    network = CMSAD(config.network)

    def predict(params, windows, present):
        return probabilities_of(config, apply(network, params, windows, present))

    return predict


def probabilities_of(config: Config, output: NetworkOutput) -> jax.Array:
    """Probabilities ``b *window k``, from the logits or from the distance as a run asks for."""
    if config.predict.mask_from == "distance" and output.distance_mm is not None:
        return probabilities_of_distance(output.distance_mm, config.predict.distance_width_mm)
    return probabilities(output.logits)


def attention_window(config: Config, stages: Sequence[int]) -> Callable[..., jax.Array]:
    """Attention energies of some stages, not yet jitted: modalities first, their stages within."""
    network = CMSAD(config.network)

    def attention(params, windows, present):
        features = apply(network, params, windows, present).features
        maps = [
            kernels.attention_energy(
                features[name][stage],
                kind=config.loss.attention.kind,
                exponent=config.loss.attention.exponent,
            )
            for name in config.data.modalities
            for stage in stages
        ]
        return jnp.stack([kernels.resize_map(q, window(config)) for q in maps], -1)

    return attention


def drawn_window(config: Config) -> Callable[..., jax.Array]:
    """Standard deviation of the probability over draws of attention across slices, not yet jitted.

    The draws of a window go through the network as one batch, and are the same at every call.
    """
    network, count = CMSAD(config.network), config.predict.draws

    def drawn(params, windows, present):
        def repeated(x):
            every = jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:]))
            return every.reshape(-1, *x.shape[1:])

        keys = jax.random.split(jax.random.key(0), count)
        keys = jnp.broadcast_to(keys, (windows.shape[0], count)).reshape(-1)
        output = apply(network, params, repeated(windows), repeated(present), None, keys)
        found = probabilities_of(config, output)
        return found.reshape(-1, count, *found.shape[1:]).std(1)

    return drawn


def weights_window(config: Config) -> Callable[..., jax.Array]:
    """Weights of the modalities, not yet jitted: the mean over the stages, at every voxel alike."""
    network = CMSAD(config.network)

    def weights(params, windows, present):
        found = apply(network, params, windows, present).modality_weights
        mean = jnp.stack([each for each in found if each is not None]).mean(0)
        ones = (1,) * (windows.ndim - 2)
        count = mean.shape[-1]
        return jnp.broadcast_to(mean.reshape(-1, *ones, count), (*windows.shape[:-1], count))

    return weights


def scaled_image(case: Case) -> np.ndarray:
    """Stored intensities of a case as float32."""
    return case.image.astype(np.float32) * STORED_UNIT


def predict_case(
    program: Callable[..., jax.Array], params: Params, case: Case, config: Config
) -> np.ndarray:
    """Probabilities ``d h w k`` of a whole reference grid by ``Programs.predict``.

    In a cascade the case is the box, and beyond the margin around what was found is background.
    """
    probability = through_windows(program, params, case, config, config.network.num_classes)
    margin_mm = config.cascade.margin_mm
    if not config.cascade.target or margin_mm is None:
        return probability
    return as_background(probability, beyond_margin(case, margin_mm))


def through_windows(
    program: Callable[..., jax.Array], params: Params, case: Case, config: Config, num_outputs: int
) -> np.ndarray:
    """``d h w k`` output of one of ``Programs`` on a whole reference grid."""
    space = window(config)
    return sliding_window(
        partial(program, params),
        scaled_image(case),
        case.present,
        window=space,
        num_classes=num_outputs,
        overlap=config.predict.overlap,
        batch_size=config.predict.batch_size,
        flip_axes=(len(space) - 1,) if config.predict.flip else (),
        prior=config.network.prior,
    )


def weights_sha256(params: Params) -> str:
    """Hash of the weights, by name."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(value).tobytes())
    return digest.hexdigest()
