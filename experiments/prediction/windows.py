"""Whole volumes through a network that sees windows: probabilities, attention, masks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cmsad_jax import kernels
from cmsad_jax.inference import sliding_window
from cmsad_jax.modules.network import CMSAD, apply, probabilities
from data_pipelines.case import STORED_UNIT, Case
from experiments.settings.config import Config, window

Params: TypeAlias = "Mapping[str, Params | np.ndarray | jax.Array]"
"""Weights of a network, by the names of its modules."""


def predict_window(config: Config) -> Callable[..., jax.Array]:
    """``Programs.predict`` of a configuration, not yet jitted."""
    network = CMSAD(config.network)

    def predict(params, windows, present):
        return probabilities(apply(network, params, windows, present).logits)

    return predict


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


def scaled_image(case: Case) -> np.ndarray:
    """Stored intensities of a case as float32."""
    return case.image.astype(np.float32) * STORED_UNIT


def predict_case(
    program: Callable[..., jax.Array], params: Params, case: Case, config: Config, num_outputs: int
) -> np.ndarray:
    """``d h w k`` output of ``Programs.predict`` or ``.attention`` on a whole reference grid."""
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
    )
