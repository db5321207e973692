"""The voxel-wise baseline, on voxels small enough to solve by hand."""

import numpy as np
import pytest

from experiments.voxel_baseline import (
    BACKGROUND_VOXELS,
    Variant,
    best_dice,
    fit,
    format_table,
    training_sample,
    variants,
)


def test_best_threshold_is_that_of_the_highest_mean_dice():
    first = (np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, False, False, False]))
    second = (np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, True, False, False]))
    # threshold 3: Dice 1 and 2/3; threshold 2: 2/3 and 1. Both means are 5/6; the second case
    # alone is best at 2.
    assert best_dice([first, second]).mean() == pytest.approx(5 / 6)
    np.testing.assert_allclose(best_dice([second]), [1.0])


def ring(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    image = rng.normal(size=(4000, 2)).astype(np.float32)
    return image, (image**2).sum(axis=1) < 0.5


@pytest.mark.parametrize("balanced", [False, True])
def test_products_are_needed_where_the_foreground_is_enclosed(balanced):
    image, label = ring(np.random.default_rng(0))
    dice = {}
    for products in (False, True):
        variant = Variant(("t2w", "adc"), products=products, balanced=balanced)
        decide = fit(image, label, np.ones(label.size), variant)
        dice[products] = best_dice([(decide(image), label)])[0]
    assert dice[True] > 0.98
    assert dice[False] < 0.6


def test_weights_make_the_sample_stand_for_all_voxels():
    rng = np.random.default_rng(0)
    label = np.zeros(10 * BACKGROUND_VOXELS, bool)
    label[:50] = True
    image, drawn, weight = training_sample([(rng.normal(size=(label.size, 3)), label)], rng)
    assert image.shape == (50 + BACKGROUND_VOXELS, 3)
    assert drawn.sum() == 50
    assert weight[drawn].sum() == 50
    assert weight[~drawn].sum() == pytest.approx(label.size - 50)


def test_all_inputs_come_first_and_the_best_of_all_is_named():
    found = variants(("t2w", "adc"))
    assert [v.modalities for v in found[::4]] == [("t2w", "adc"), ("t2w",), ("adc",)]
    assert len(variants(("t2w",))) == 4
    table = format_table({v: 0.1 * i for i, v in enumerate(found)})
    assert table.splitlines()[-1] == "best of 12 voxel-wise logistic regressions: Dice 1.100"
