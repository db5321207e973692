import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from cmsad_jax.losses.distance import distance_loss, signed_distance_mm
from cmsad_jax.modules import CMSAD, EncoderConfig, FusionConfig, NetworkConfig
from cmsad_jax.modules.network import apply, probabilities_of_distance
from cmsad_jax.training import LossConfig, loss_fn
from cmsad_jax.types import ConfigError
from tests.networks import init, tiny_batch, tiny_config


def by_scipy(mask, spacing, clip):
    """The same by another implementation; what has no other side is as far as can be told."""
    outside = distance_transform_edt(~mask, sampling=spacing) if mask.any() else np.inf
    inside = distance_transform_edt(mask, sampling=spacing) if not mask.all() else np.inf
    return np.clip(np.where(mask, -inside, outside), -clip, clip)


@pytest.mark.parametrize("spacing", [(3.0, 0.5, 0.5), (1.0, 1.0, 1.0), (0.7, 1.3)])
@pytest.mark.parametrize("clip", [4.0, 100.0])
def test_signed_distance_equals_scipy(spacing, clip):
    rng = np.random.default_rng(0)
    space = (5, 12, 10)[-len(spacing) :]
    labels = (rng.random((4, *space)) > 0.9).astype(np.int32)
    labels[1] = 0
    labels[2] = 1
    found = signed_distance_mm(labels, spacing_mm=spacing, clip_mm=clip)
    assert found.shape == (4, *space, 1)
    expected = [by_scipy(of_example > 0, spacing, clip) for of_example in labels]
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found[..., 0]) < 0, labels > 0)


def test_each_class_has_its_surface():
    labels = np.zeros((1, 6, 6), np.int32)
    labels[0, 1:3, 1:3], labels[0, 4, 4] = 1, 2
    found = signed_distance_mm(labels, spacing_mm=(1.0, 2.0), clip_mm=9.0, num_classes=2)
    for index in (0, 1):
        expected = by_scipy(labels[0] == index + 1, (1.0, 2.0), 9.0)
        np.testing.assert_allclose(found[0, ..., index], expected, atol=1e-5)


def test_loss_by_hand():
    labels = np.array([[[0, 0, 1]]], np.int32)  # 4 and 2 mm from it, and 2 within
    predicted = jnp.array([4.0, 0.0, -5.0]).reshape(1, 1, 3, 1)
    value = distance_loss(predicted, labels, spacing_mm=(1.0, 2.0), clip_mm=5.0)
    np.testing.assert_allclose(value, [(0 + 2 + 3) / 3 / 5], rtol=1e-6)


@pytest.mark.parametrize("sizes", [(1.0,), (1.0, 0.0)])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(ConfigError, match="size of a voxel along each axis of space, above 0"):
        signed_distance_mm(np.zeros((1, 4, 4), np.int32), spacing_mm=sizes, clip_mm=3.0)


def test_probability_of_a_distance_is_even_on_the_surface_and_high_inside():
    distance = jnp.array([-2.0, 0.0, 3.0])
    one = probabilities_of_distance(distance[:, None], 2.0)
    np.testing.assert_allclose(one[:, 0], 1 / (1 + np.exp(distance / 2)), rtol=1e-6)
    two = probabilities_of_distance(jnp.array([[-4.0, 3.0], [5.0, 6.0]]), 1.0)
    np.testing.assert_array_equal(two.argmax(-1), [1, 0])
    np.testing.assert_allclose(two.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_network_learns_the_distance_beside_the_mask(num_classes):
    batch = tiny_batch(batch=2, modalities=1)
    config = NetworkConfig(
        modalities=("t2w",),
        encoder=EncoderConfig((4,), ((3, 3, 3),), ((1, 1, 1),), (1,), block="plain"),
        fusion=FusionConfig(kind="mean"),
        deep_supervision=0,
        num_classes=num_classes,
        distance_clip_mm=6.0,
    )
    network, params = init(config, batch)
    loss = LossConfig(cross_modal_weight=0.0, self_weight=0.0, distance_weight=2.0)

    @jax.jit
    @jax.value_and_grad
    def objective(params):
        return loss_fn(
            params, batch, jnp.asarray(0), network=network, config=loss, spacing_mm=(3.0, 1.0, 1.0)
        )[0]

    value, gradient = objective(params)
    assert np.any(gradient["decoder"]["distance"]["kernel"] != 0)
    output = jax.jit(lambda params: apply(network, params, batch["image"]))(params)
    assert output.distance_mm.shape == (*batch["label"].shape, max(1, num_classes - 1))
    assert output.distance_mm.dtype == jnp.float32
    assert np.abs(output.distance_mm).max() <= 6
    without, _ = loss_fn(
        {**params, "decoder": {k: v for k, v in params["decoder"].items() if k != "distance"}},
        batch,
        jnp.asarray(0),
        network=CMSAD(dataclasses.replace(config, distance_clip_mm=None)),
        config=loss,
    )
    expected = distance_loss(
        output.distance_mm, batch["label"], spacing_mm=(3.0, 1.0, 1.0), clip_mm=6.0
    ).mean()
    np.testing.assert_allclose(value - without, 2 * expected, rtol=1e-4)


def test_a_distance_without_its_loss_or_the_size_of_a_voxel_is_refused():
    batch = tiny_batch(batch=1, modalities=1)
    config = tiny_config(modalities=("t2w",), distance_clip_mm=6.0)
    network, params = init(config, batch)
    loss = LossConfig(cross_modal_weight=0.0, self_weight=0.0)
    with pytest.raises(ConfigError, match="needs the size of a voxel; got no spacing_mm"):
        jax.eval_shape(
            lambda params: loss_fn(params, batch, jnp.asarray(0), network=network, config=loss),
            params,
        )
    with pytest.raises(ConfigError, match=r"and a weight of 0. Use --loss.distance-weight=1.0"):
        dataclasses.replace(loss, distance_weight=0.0).check(config)
    without = dataclasses.replace(config, distance_clip_mm=None)
    said = dataclasses.replace(loss, distance_weight=0.5).without_effect(without)
    assert "loss.distance_weight has no effect, as network.distance_clip_mm is None." in said
