"""Augmentation by property, and its resampling against scipy."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from cmsad_jax.augmentation import (
    AugmentationConfig,
    augment,
    sample_linear,
    sample_nearest,
    source_positions,
)
from cmsad_jax.types import ConfigError

PROBABILITIES = [
    field.name
    for field in dataclasses.fields(AugmentationConfig)
    if field.name.endswith("_probability")
]
INTENSITY = ["blur", "bias", "contrast", "gamma", "noise"]
ALWAYS = AugmentationConfig(**dict.fromkeys(PROBABILITIES, 1.0))
SPACES = pytest.mark.parametrize("space", [(12, 10), (3, 12, 10)], ids=["2d", "3d"])

# Compiling is most of the work here: take the quick way.
compiled = jax.jit(
    augment,
    static_argnames="config",
    compiler_options={"xla_backend_optimization_level": 0},
)


def only(*effects, **options) -> AugmentationConfig:
    """These effects always, no other ever."""
    chosen = {name: float(name.removesuffix("_probability") in effects) for name in PROBABILITIES}
    return AugmentationConfig(**chosen, **options)


def make_keys(count, seed=0):
    words = np.random.default_rng(seed).integers(2**32, size=(count, 2), dtype=np.uint32)
    return jax.random.wrap_key_data(jnp.array(words))


def make_batch(space, count=4):
    """Images and labels of five classes that are a function of the first modality."""
    image = np.random.default_rng(9).normal(size=(count, *space, 3)).astype(np.float32)
    labels = np.digitize(image[..., 0], [-1.0, 0.0, 1.0, 2.0]).astype(np.int32)
    return jnp.array(image), jnp.array(labels)


@SPACES
def test_no_effect_is_the_identity(space):
    image, labels = make_batch(space)
    moved, moved_labels = compiled(image, labels, keys=make_keys(4), config=only())
    np.testing.assert_array_equal(moved, image)
    np.testing.assert_array_equal(moved_labels, labels)


def test_effects_that_are_not_drawn_change_nothing():
    image, labels = make_batch((3, 12, 10))
    rare = AugmentationConfig(**dict.fromkeys(PROBABILITIES, 1e-9))
    moved, moved_labels = compiled(image, labels, keys=make_keys(4), config=rare)
    np.testing.assert_array_equal(moved, image)
    np.testing.assert_array_equal(moved_labels, labels)


@SPACES
def test_flip_mirrors_left_and_right_of_image_and_labels_and_undoes_itself(space):
    image, labels = make_batch(space)
    flip = only("flip")
    once, once_labels = compiled(image, labels, keys=make_keys(4), config=flip)
    np.testing.assert_array_equal(once, image[..., ::-1, :])
    np.testing.assert_array_equal(once_labels, labels[..., ::-1])
    twice, twice_labels = compiled(once, once_labels, keys=make_keys(4, seed=1), config=flip)
    np.testing.assert_array_equal(twice, image)
    np.testing.assert_array_equal(twice_labels, labels)


def test_flip_happens_to_the_stated_share_of_examples():
    image = jnp.broadcast_to(jnp.arange(4.0)[:, None], (1000, 2, 4, 1))
    config = dataclasses.replace(only(), flip_probability=0.25)
    labels = jnp.zeros((1000, 2, 4), jnp.int32)
    moved, _ = compiled(image, labels, keys=make_keys(1000), config=config)
    assert (moved[:, 0, 0, 0] == 3).sum() == pytest.approx(250, abs=60)


@SPACES
def test_every_effect_together_keeps_shape_type_and_classes(space):
    image, labels = make_batch(space)
    moved, moved_labels = compiled(image, labels, keys=make_keys(4), config=ALWAYS)
    assert (moved.shape, moved.dtype) == (image.shape, image.dtype)
    assert (moved_labels.shape, moved_labels.dtype) == (labels.shape, labels.dtype)
    assert np.isfinite(moved).all()
    assert set(np.unique(moved_labels)) <= set(np.unique(labels)) | {0}
    assert not np.array_equal(moved, image)


def test_absent_modalities_stay_zero_and_do_not_change_the_others():
    image, labels = make_batch((3, 12, 10))
    present = jnp.array([[True, True, False], [False, True, True], [True] * 3, [False] * 3])
    shape = (4, 1, 1, 1, 3)
    image = jnp.where(present.reshape(shape), image, 0.0)
    moved, _ = compiled(image, labels, keys=make_keys(4), config=ALWAYS, present=present)
    assert np.isfinite(moved).all()
    np.testing.assert_array_equal((moved != 0).any(axis=(1, 2, 3)), present)
    unmasked, _ = compiled(image, labels, keys=make_keys(4), config=ALWAYS)
    np.testing.assert_array_equal(moved, jnp.where(present.reshape(shape), unmasked, 0.0))


def test_permuting_the_batch_with_its_keys_permutes_the_outputs():
    image, labels = make_batch((3, 12, 10))
    keys, order, config = make_keys(4), np.array([2, 0, 3, 1]), AugmentationConfig()
    moved, moved_labels = compiled(image, labels, keys=keys, config=config)
    again, again_labels = compiled(image[order], labels[order], keys=keys[order], config=config)
    np.testing.assert_allclose(again, moved[order], atol=1e-6)
    np.testing.assert_array_equal(again_labels, moved_labels[order])
    alone, _ = compiled(image[1:2], labels[1:2], keys=keys[1:2], config=config)
    np.testing.assert_allclose(alone[0], moved[1], atol=1e-6)


@pytest.mark.slow
def test_eager_and_compiled_agree():
    image, labels = make_batch((3, 12, 10), count=2)
    config = only("flip", "affine", "gamma", "noise")
    eager, eager_labels = augment(image, labels, keys=make_keys(2), config=config)
    fast, fast_labels = compiled(image, labels, keys=make_keys(2), config=config)
    np.testing.assert_allclose(eager, fast, atol=1e-4)  # positions round differently by 1e-6
    assert (np.asarray(eager_labels) != np.asarray(fast_labels)).mean() < 0.01


def test_a_slice_is_treated_as_a_volume_of_one_slice():
    image, labels = make_batch((12, 10))
    flat, flat_labels = compiled(image, labels, keys=make_keys(4), config=ALWAYS)
    deep, deep_labels = compiled(image[:, None], labels[:, None], keys=make_keys(4), config=ALWAYS)
    np.testing.assert_allclose(deep[:, 0], flat, atol=1e-6)
    np.testing.assert_array_equal(deep_labels[:, 0], flat_labels)


def test_keys_decide():
    image, labels = make_batch((12, 10))
    same = jnp.broadcast_to(image[:1], image.shape), jnp.broadcast_to(labels[:1], labels.shape)
    moved, _ = compiled(*same, keys=make_keys(4), config=ALWAYS)
    again, _ = compiled(*same, keys=make_keys(4), config=ALWAYS)
    np.testing.assert_array_equal(moved, again)
    assert (np.ptp(moved, axis=0) > 0).mean() > 0.9


def smooth_volume(space=(2, 15, 12)):
    d, h, w = np.meshgrid(*(np.arange(n) for n in space), indexing="ij")
    return (np.sin(h / 4 + d) + np.cos(w / 3)).astype(np.float32)


def random_affine(seed):
    rng = np.random.default_rng(seed)
    angle, scale = rng.uniform(-0.5, 0.5), rng.uniform(0.8, 1.25)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    return matrix.astype(np.float32), rng.uniform(-3, 3, 2).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_resampling_equals_scipy(seed):
    volume = smooth_volume()
    matrix, shift = random_affine(seed)
    centre = (np.array(volume.shape[1:]) - 1) / 2
    offset = centre - matrix @ centre + shift

    def expected(array, order):
        return np.stack(
            [
                ndimage.affine_transform(
                    plane, matrix, offset, order=order, mode="grid-constant", cval=0
                )
                for plane in array
            ]
        )

    positions = source_positions((15, 12), jnp.array(matrix), jnp.array(shift))
    linear = sample_linear(jnp.array(volume), positions)
    np.testing.assert_allclose(linear, expected(volume, 1), atol=1e-5)
    labels = (volume > 0.5).astype(np.int32) + (volume > 1).astype(np.int32)
    nearest = sample_nearest(jnp.array(labels), positions)
    np.testing.assert_array_equal(nearest, expected(labels, 0))


def test_affine_moves_labels_with_the_image():
    """Labels are the columns, the image their number: both must name the same source voxel."""
    columns = jnp.broadcast_to(jnp.arange(1, 34), (2, 33, 33))[None]
    image = columns[..., None].astype(jnp.float32)
    moved, moved_labels = compiled(image, columns, keys=make_keys(1), config=only("affine"))
    inside = np.asarray(moved_labels[..., 1:-1, 1:-1] > 0) & (moved[..., 1:-1, 1:-1, 0] > 2)
    difference = abs(moved[..., 0] - moved_labels)[..., 1:-1, 1:-1][inside]
    assert inside.mean() > 0.6
    assert np.mean(difference <= 0.5 + 1e-4) > 0.97  # all but those interpolated with the border
    assert (moved_labels != columns).any()


def test_rotation_scale_and_translation_stay_within_their_ranges():
    """The centroid of a blob gives the shift, its area the scale."""
    h, w = np.meshgrid(np.arange(65) - 32, np.arange(65) - 32, indexing="ij")
    blob = np.exp(-(h**2 + w**2) / (2 * 6.0**2)).astype(np.float32)
    image = jnp.broadcast_to(blob[None, ..., None], (200, 65, 65, 1))
    config = only("affine", scale=(0.8, 1.25), translation_voxels=3.0)
    labels = jnp.zeros((200, 65, 65), jnp.int32)
    moved = np.asarray(compiled(image, labels, keys=make_keys(200), config=config)[0])[..., 0]
    mass = moved.sum(axis=(1, 2))
    scale = np.sqrt(mass / blob.sum())
    assert 0.79 < scale.min() < 0.84
    assert 1.2 < scale.max() < 1.26
    # A source shift of at most 3, seen magnified by the scale and turned by up to 15 degrees.
    limit = 3 * scale * (np.cos(np.pi / 12) + np.sin(np.pi / 12)) + 0.01
    for axis in (h, w):
        centre = (moved * axis).sum(axis=(1, 2)) / mass
        assert (abs(centre) < limit).all()
        assert abs(centre).max() > 2


def test_misalignment_shifts_the_other_modalities_against_the_first():
    image, labels = make_batch((3, 12, 10))
    config = only("misalignment")
    moved, moved_labels = compiled(image, labels, keys=make_keys(4), config=config)
    np.testing.assert_array_equal(moved[..., 0], image[..., 0])
    np.testing.assert_array_equal(moved_labels, labels)
    assert (moved[..., 1:] != image[..., 1:]).mean() > 0.9
    ramp = jnp.broadcast_to(jnp.arange(20.0)[:, None, None], (50, 20, 20, 3))
    shifted, _ = compiled(
        ramp, jnp.zeros(ramp.shape[:3], jnp.int32), keys=make_keys(50), config=config
    )
    shift = np.asarray(shifted - ramp)[:, 10, 10]  # linear: the shift along h itself
    assert (abs(shift) <= 2.0).all()
    assert abs(shift[:, 1]).max() > 1.5
    assert abs(shift[:, 1] - shift[:, 2]).max() > 0.5  # each modality its own


@pytest.mark.parametrize("effect", INTENSITY)
def test_intensity_effects_change_the_image_alone(effect):
    image, labels = make_batch((3, 12, 10))
    moved, moved_labels = compiled(image, labels, keys=make_keys(4), config=only(effect))
    np.testing.assert_array_equal(moved_labels, labels)
    change = np.asarray(moved - image)
    assert (abs(change).max(axis=(1, 2, 3)) > 1e-3).all()  # every example and modality


def test_blur_keeps_the_mean_of_a_point_and_flattens_it():
    point = jnp.zeros((1, 3, 31, 31, 1)).at[0, 1, 15, 15, 0].set(1.0)
    labels = jnp.zeros((1, 3, 31, 31), jnp.int32)
    config = only("blur", blur_sd_voxels=(1.5, 1.5))
    moved = np.asarray(compiled(point, labels, keys=make_keys(1), config=config)[0])[0, ..., 0]
    expected = ndimage.gaussian_filter(np.asarray(point[0, 1, ..., 0]), 1.5, truncate=9)
    np.testing.assert_allclose(moved[1], expected, atol=1e-6)
    assert moved[[0, 2]].max() == 0  # in plane only


def test_bias_is_a_smooth_factor_of_at_most_its_amplitude():
    image = jnp.ones((20, 3, 16, 16, 1)).at[:, 0, 0, 0].set(0.0)  # minimum 0: a pure factor
    labels = jnp.zeros((20, 3, 16, 16), jnp.int32)
    config = only("bias", bias_amplitude=0.3)
    moved = np.asarray(compiled(image, labels, keys=make_keys(20), config=config)[0])
    field = np.log(moved[:, 1:])
    assert abs(field).max() <= 0.3 + 1e-6
    assert abs(field).max() > 0.15
    assert abs(np.diff(field, axis=2)).max() < 0.1


def test_gamma_keeps_the_range_and_the_order():
    image, labels = make_batch((3, 12, 10))
    moved, _ = compiled(image, labels, keys=make_keys(4), config=only("gamma"))
    for before, after in zip(np.asarray(image), np.asarray(moved), strict=True):
        for m in range(3):
            x, y = before[..., m].ravel(), after[..., m].ravel()
            assert y.min() == pytest.approx(x.min(), abs=1e-5)
            assert y.max() == pytest.approx(x.max(), abs=1e-5)
            assert (np.diff(y[np.argsort(x)]) >= -1e-6).all()


def test_contrast_is_a_factor_and_a_shift_within_their_ranges():
    image, labels = make_batch((3, 12, 10), count=50)
    moved, _ = compiled(image, labels, keys=make_keys(50), config=only("contrast"))
    x = np.asarray(image).reshape(50, -1, 3)
    y = np.asarray(moved).reshape(50, -1, 3)
    for e in range(50):
        for m in range(3):
            factor, shift = np.polyfit(x[e, :, m], y[e, :, m], 1)
            assert 0.8 - 1e-4 <= factor <= 1.25 + 1e-4
            assert abs(shift) <= 0.2 + 1e-4


def test_noise_has_at_most_its_standard_deviation():
    image, labels = make_batch((3, 32, 32), count=30)
    moved, _ = compiled(image, labels, keys=make_keys(30), config=only("noise", noise_sd=0.5))
    sd = np.asarray(moved - image).std(axis=(1, 2, 3))
    assert sd.max() < 0.52
    assert sd.max() > 0.4
    assert sd.min() < 0.1


def test_half_precision_images_stay_so():
    image, labels = make_batch((12, 10))
    moved, _ = jax.eval_shape(
        lambda image: augment(image, labels, keys=make_keys(4), config=ALWAYS),
        image.astype(jnp.bfloat16),
    )
    assert moved.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"flip_probability": 1.5},
            "augmentation.flip_probability must be between 0 and 1; got 1.5. The default is 0.5.",
        ),
        (
            {"scale": (1.2, 0.8)},
            "augmentation.scale must be a range of positive numbers, the smaller first; "
            "got (1.2, 0.8).",
        ),
        ({"gamma": (0.0, 1.0)}, "augmentation.gamma must be a range of positive numbers"),
        ({"noise_sd": -0.1}, "augmentation.noise_sd must be 0 or more; got -0.1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        AugmentationConfig(**options)


def test_elastic_bends_image_and_labels_alike_within_its_limit():
    rows, columns = jnp.meshgrid(jnp.arange(24.0), jnp.arange(24.0), indexing="ij")
    image = jnp.tile(jnp.stack([rows, columns], -1), (4, 1, 1, 1))
    labels = jnp.tile((columns > 11).astype(jnp.int32), (4, 1, 1))
    config = only("elastic", elastic_voxels=2.0, elastic_nodes=3)
    moved, moved_labels = compiled(image, labels, keys=make_keys(4), config=config)
    inner = np.s_[:, 3:-3, 3:-3]  # where nothing enters from beyond the border
    shift = np.asarray(moved - image)[inner]
    assert np.abs(shift).max() <= 2.0 + 1e-4
    assert np.abs(shift).max() > 0.5
    assert np.abs(np.diff(shift, axis=1)).max() < 1.0, "smooth: nothing folds"
    assert shift.std((1, 2)).min() > 0.05, "no mere translation"
    clear = np.abs(np.asarray(moved[..., 1]) - 11.5)[inner] > 0.01
    agree = (np.asarray(moved[..., 1]) > 11.5)[inner] == np.asarray(moved_labels)[inner]
    assert agree[clear].mean() > 0.99


def test_what_follows_the_modalities_moves_with_the_first_and_keeps_its_values():
    """The prior of a cascade."""
    volume = np.random.default_rng(0).random((3, 2, 12, 10)).astype(np.float32)
    image, labels = np.stack([volume] * 3, -1), np.zeros(volume.shape, int)
    keys, present = make_keys(3), np.ones((3, 2), bool)
    moving = only("flip", "affine", "elastic", "misalignment")
    moved, _ = compiled(image, labels, keys=keys, config=moving, present=present)
    assert np.abs(moved[..., 0] - moved[..., 1]).max() > 0.1, "the second is misaligned"
    changed, _ = compiled(image, labels, keys=keys, config=ALWAYS, present=present)
    np.testing.assert_allclose(changed[..., 2], moved[..., 0], atol=1e-6)
    assert np.abs(changed[..., 2] - changed[..., 0]).max() > 0.1
    with pytest.raises(ConfigError, match="got 2 entries and 1 channels"):
        augment(image[..., :1], labels, keys=keys, config=ALWAYS, present=present)
