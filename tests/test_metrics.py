import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax import metrics


@functools.partial(jax.jit, static_argnames="class_index")
def every_score(prediction, labels, class_index=1):
    return [
        score(jnp.asarray(prediction), jnp.asarray(labels), class_index=class_index)
        for score in (metrics.dice_score, metrics.sensitivity, metrics.precision)
    ]


def test_four_voxels_by_hand():
    labels = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    prediction = np.array([[1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    nan = np.nan
    expected = ([2 / 5, 1, 0, nan, nan], [1 / 2, 1, 0, nan, nan], [1 / 3, 1, nan, nan, nan])
    for p in (prediction, prediction > 0):
        np.testing.assert_allclose(every_score(p, labels), expected, rtol=1e-6)


def test_classes_are_told_apart():
    labels = np.array([[0, 1, 2, 2]])
    prediction = np.array([[0, 2, 2, 2]])
    np.testing.assert_allclose(every_score(prediction, labels, 1), [[0], [0], [np.nan]])
    np.testing.assert_allclose(
        every_score(prediction, labels, 2), [[4 / 5], [1], [2 / 3]], rtol=1e-6
    )


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 2, 4, 5)])
def test_shapes_and_batch_order(shape):
    rng = np.random.default_rng(0)
    p, t = (rng.random((2, *shape)) < 0.4).astype(np.int32)
    for found, flipped, flat in zip(
        every_score(p, t),
        every_score(p[::-1], t[::-1]),
        every_score(p.reshape(3, -1), t.reshape(3, -1)),
        strict=True,
    ):
        assert found.shape == (3,)
        np.testing.assert_array_equal(flipped, found[::-1])
        np.testing.assert_array_equal(flat, found)
