"""Train step and inference are lowered for accelerators on a machine that has none."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from cmsad_jax.augmentation import AugmentationConfig
from cmsad_jax.modules import CMSAD, EncoderConfig
from cmsad_jax.modules.network import apply, probabilities
from cmsad_jax.training import LossConfig, OptimizerConfig, TrainState, train_step, train_steps
from tests.networks import tiny_batch, tiny_config

CONFIG = dataclasses.replace(
    tiny_config(modalities=("t2w", "adc"), dtype="bfloat16", rematerialize=True),
    encoder=EncoderConfig(
        channels=(4, 6),
        kernels=((1, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (2, 2, 2)),
        blocks=(1, 1),
    ),
)


@pytest.fixture(scope="module")
def abstract():
    """Shapes of a state and a batch: nothing is computed."""
    network, batch = CMSAD(CONFIG), jax.tree.map(jnp.asarray, tiny_batch(batch=4, modalities=2))
    optimizer = OptimizerConfig().optimizer(10)

    def fresh(key):
        params = network.init(key, batch["image"])["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

    return network, optimizer, jax.eval_shape(fresh, jax.random.key(0)), batch


def test_train_step(abstract):
    network, optimizer, state, batch = abstract
    step = partial(
        train_step,
        network=network,
        optimizer=optimizer,
        loss=LossConfig(correlation_weight=0.1),
        augmentation=AugmentationConfig(),
        modality_dropout=0.1,
        average_decay=0.9,
        accumulation=2,
        rolled=True,
    )
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 2), batch)
    traced = jax.jit(partial(train_steps, step=step), donate_argnums=0).trace(state, stacked)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.convolution" in text
        assert "bf16" in text
        assert "tf.aliasing_output" in text or "jax.buffer_donor" in text, "the state is donated"


def test_inference(abstract):
    network, _, state, batch = abstract

    def predict(params, image, present):
        return probabilities(apply(network, params, image, present).logits)

    traced = jax.jit(predict).trace(state.params, batch["image"], batch["present"])
    for platform in ("tpu", "cuda"):
        assert "stablehlo.convolution" in traced.lower(lowering_platforms=(platform,)).as_text()
