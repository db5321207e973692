import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest

from cmsad_jax.modules import CMSAD, FusionConfig
from cmsad_jax.modules.baselines import (
    count_operations,
    count_parameters,
    match_parameters,
    residual_encoder_unet,
    unet,
)
from cmsad_jax.training import LossConfig, TrainState, train_step
from tests.networks import TINY_2D, TINY_3D, init, tiny_batch, tiny_config

SPACE = (4, 16, 16)


@pytest.mark.parametrize("baseline", [unet, residual_encoder_unet])
def test_baselines_train_by_the_same_step(baseline):
    batch = tiny_batch(batch=1)
    network, params = init(baseline(tiny_config()), batch)
    optimizer = optax.sgd(1e-2)
    state = TrainState(np.int32(0), params, params, optimizer.init(params))
    loss = LossConfig(warmup_steps=0, cross_modal_weight=0.0, self_weight=0.0, label_weight=0.0)
    step = jax.jit(partial(train_step, network=network, optimizer=optimizer, loss=loss))
    after, metrics = step(state, batch)
    assert set(metrics) == {
        "loss",
        "dice_loss",
        "cross_entropy_loss",
        "gradient_norm",
        "skipped",
    }
    assert np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, params)
    assert all(jax.tree.leaves(moved))


def test_unet_has_plain_convolutions_of_the_stacked_modalities():
    _, params = init(unet(tiny_config()), tiny_batch(batch=1))
    encoder = params["encoder"]
    assert len(encoder) == 2 * 2
    assert encoder["stage0_block0"]["Conv_0"]["kernel"].shape == (1, 3, 3, 3, 4)
    assert set(encoder["stage1_block0"]) == {"Conv_0", "Normalization_0"}  # no shortcut
    assert {"block0", "block0_1"} <= set(params["decoder"])
    assert not any(name.startswith("fusion") for name in params)


def test_residual_encoder_has_the_blocks_of_nnunet():
    config = residual_encoder_unet(tiny_config())
    assert config.encoder.blocks == (1, 3)
    assert config.decoder_block == "plain"
    deep = dataclasses.replace(
        TINY_3D,
        channels=(2,) * 8,
        kernels=((3, 3, 3),) * 8,
        strides=((1, 1, 1),) * 8,
        blocks=(1,) * 8,
    )
    deeper = residual_encoder_unet(dataclasses.replace(tiny_config(), encoder=deep))
    assert deeper.encoder.blocks == (1, 3, 4, 6, 6, 6, 6, 6)


def test_counted_parameters_are_those_of_the_network():
    batch = tiny_batch(batch=1)
    _, params = init(tiny_config(), batch)
    expected = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count_parameters(tiny_config(), SPACE) == expected


def test_counted_operations_of_one_convolution_by_hand():
    encoder = dataclasses.replace(
        TINY_2D, channels=(8,), kernels=((3, 3),), strides=((1, 1),), blocks=(1,), block="plain"
    )
    config = dataclasses.replace(
        tiny_config(),
        modalities=("t2w",),
        encoder=encoder,
        fusion=FusionConfig(kind="early"),
        deep_supervision=0,
    )
    voxels = 32 * 32
    # 3 x 3 from 1 to 8 channels, the border's taps into the padding apart, and 1 x 1 to the logit.
    convolutions = 2 * 8 * (3 * 32 - 2) ** 2 + 2 * 8 * voxels
    counted = count_operations(config, (32, 32))
    assert convolutions <= counted <= convolutions + 30 * 8 * voxels  # normalisation, activation


@pytest.mark.parametrize("modalities", [("t2w",), ("t2w", "adc", "hbv")])
def test_widths_are_scaled_until_the_parameters_match(modalities):
    wide = dataclasses.replace(TINY_2D, channels=(16, 24))
    full = dataclasses.replace(tiny_config(rank=2), encoder=wide)
    target = count_parameters(full, (32, 32))
    baseline = unet(dataclasses.replace(full, modalities=modalities))
    matched = match_parameters(baseline, target, (32, 32))
    assert count_parameters(matched, (32, 32)) == pytest.approx(target, rel=0.06)
    assert match_parameters(full, target, (32, 32)) == full
    assert CMSAD(matched).config.encoder.blocks == baseline.encoder.blocks
