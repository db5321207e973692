"""The baseline that ignores the image, on cases small enough to solve by hand."""

import numpy as np
import pytest

from experiments.measuring.mean_shape import MeanShape, average, mean_shape


def test_mean_shape_fits_the_cases_best():
    # frequencies 1, 2/3, 1/3: mean Dice of the first voxel alone is (1 + 2/3 + 1/2) / 3, of two
    # (2/3 + 1 + 4/5) / 3, of three (1/2 + 4/5 + 1) / 3
    known = [np.array([0]), np.array([0, 1]), np.array([0, 1, 2]), np.array([], int)]
    assert mean_shape(known, 4).tolist() == [True, True, False, False]
    assert not mean_shape([np.array([], int)], 3).any()


def test_mean_shape_is_that_of_whole_volumes():
    rng = np.random.default_rng(0)
    labels = rng.random((7, 60)) < rng.random(60)
    frequency = labels.mean(0)

    def mean_dice(threshold):
        mask = frequency >= threshold
        return np.mean(2 * (labels & mask).sum(1) / (labels.sum(1) + mask.sum()))

    best = max(mean_dice(threshold) for threshold in np.unique(frequency[frequency > 0]))
    found = mean_shape([np.flatnonzero(label) for label in labels], 60)
    assert mean_dice(frequency[found].min()) == pytest.approx(best)


def test_classes_have_equal_weight_whatever_the_number_of_their_cases():
    assert average([[0.8, 0.8, 0.8, 0.8], [0.2], []]) == MeanShape(pytest.approx(0.5), 5)
    assert average([[], []]) == MeanShape(None, 0)
