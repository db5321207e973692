from itertools import pairwise

import numpy as np
import pytest

from cmsad_jax.inference import (
    entropy,
    importance,
    predict_ensemble,
    sliding_window,
    window_starts,
)
from cmsad_jax.types import ConfigError


def identity(windows, present):
    return windows[..., :1]


@pytest.mark.parametrize("size", [5, 8, 9, 16, 23])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_windows_cover_the_axis_and_stay_inside(size, overlap):
    starts = window_starts(size, 8, overlap)
    covered = {voxel for start in starts for voxel in range(start, start + 8)}
    assert covered >= set(range(size))
    if size > 8:
        assert max(covered) == size - 1
        assert all(b - a <= 8 * (1 - overlap) + 0.5 for a, b in pairwise(starts))


def test_importance_is_symmetric_and_largest_in_the_middle():
    weight = importance((5, 9))
    np.testing.assert_allclose(weight, weight[::-1, ::-1])
    assert weight.argmax() == weight.size // 2
    assert weight.min() > 0


@pytest.mark.parametrize("space", [(4, 16, 16), (7, 21, 18), (2, 6, 30)])
@pytest.mark.parametrize("flips", [(), (2,), (1, 2)])
def test_local_function_comes_back_unchanged_whatever_the_windows(space, flips):
    image = np.random.default_rng(0).normal(size=(*space, 2)).astype(np.float32)
    result = sliding_window(
        identity,
        image,
        np.ones(2, bool),
        window=(4, 8, 8),
        num_classes=1,
        batch_size=3,
        flip_axes=flips,
    )
    np.testing.assert_allclose(result, image[..., :1], atol=1e-5)


def test_flips_are_averaged():
    def left_half(windows, present):
        result = np.zeros_like(windows[..., :1])
        result[..., :4, :] = 1
        return result

    image = np.zeros((2, 8, 8, 1), np.float32)
    result = sliding_window(
        left_half, image, np.ones(1, bool), window=(2, 8, 8), num_classes=1, flip_axes=(2,)
    )
    np.testing.assert_allclose(result, 0.5)


def test_slices_of_a_volume_go_through_a_2d_network():
    seen = []

    def predict(windows, present):
        seen.append((windows.shape, present.shape))
        return windows[..., :1]

    image = np.random.default_rng(0).normal(size=(3, 8, 8, 2)).astype(np.float32)
    result = sliding_window(
        predict, image, np.ones(2, bool), window=(8, 8), num_classes=1, batch_size=2
    )
    np.testing.assert_allclose(result, image[..., :1], atol=1e-6)
    assert set(seen) == {((2, 8, 8, 2), (2, 2))}


def test_overlap_outside_its_range_is_refused():
    with pytest.raises(ConfigError, match=r"overlap must be in \[0, 1\); got 1.0"):
        sliding_window(
            identity,
            np.zeros((2, 8, 8, 1), np.float32),
            np.ones(1, bool),
            window=(2, 8, 8),
            num_classes=1,
            overlap=1.0,
        )


def test_ensemble_is_mean_and_spread_of_its_members():
    image = np.random.default_rng(0).uniform(size=(3, 9, 9, 1)).astype(np.float32)
    members = [lambda x, p, power=power: x**power for power in (1, 2, 3, 5)]
    result = predict_ensemble(
        members, image, np.ones(1, bool), window=(2, 8, 8), num_classes=1, overlap=0.5
    )
    values = np.stack([image**power for power in (1, 2, 3, 5)])
    np.testing.assert_allclose(result.probability, values.mean(0), atol=1e-6)
    np.testing.assert_allclose(result.disagreement, values.std(0), atol=1e-6)


def test_members_that_agree_have_no_disagreement():
    image = np.full((2, 8, 8, 1), 0.999, np.float32)
    result = predict_ensemble(
        [identity] * 5, image, np.ones(1, bool), window=(2, 8, 8), num_classes=1
    )
    assert not result.disagreement.any()


def test_ensemble_without_members_is_refused():
    with pytest.raises(ConfigError, match="at least one member; got none"):
        predict_ensemble([], np.zeros((2, 8, 8, 1)), np.ones(1, bool), window=(2, 8, 8))


def test_entropy_is_0_where_certain_and_1_where_all_are_equal():
    binary = np.array([[0.0], [0.5], [1.0], [0.25]], np.float32)
    expected = [0, 1, 0, -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))]
    np.testing.assert_allclose(entropy(binary), expected, atol=1e-6)
    several = np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(entropy(several), [0, 1, 0], atol=1e-6)
