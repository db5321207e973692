"""The plan of crops: shares, balance and positions, each checked by counting."""

from collections import Counter

import numpy as np
import pytest

from data_pipelines.faults import DataError
from data_pipelines.serving.sampling import Sampling, SamplingPlan

SHAPE = (4, 9, 7)
CROP = (2, 5, 4)
NONE = np.array([], np.int32)


def voxels(*positions: tuple[int, int, int]) -> np.ndarray:
    return np.array([np.ravel_multi_index(p, SHAPE) for p in positions], np.int32)


CASES = [
    NONE,
    voxels((0, 0, 0), (3, 8, 6)),  # two corners: the crop must be pushed inside
    NONE,
    voxels((1, 4, 3)),
    NONE,
]

FIRST_RELEASE = [(4, (1, 2, 2)), (2, (1, 2, 0)), (1, (2, 4, 3)), (0, (1, 3, 3))]
FIRST_KEY = [1746192816, 3474647608]


def make_plan(cases=CASES, **options):
    settings = {"crop": CROP, "seed": 3, "foreground_share": 1 / 3, **options}
    return SamplingPlan(cases, SHAPE, Sampling(**settings, batch_size=2, num_steps=9))


def draw(plan, count):
    return [plan[i] for i in range(count)]


def holds(crop, voxel, size=CROP):
    return all(o <= v < o + s for o, v, s in zip(crop.offset, voxel, size, strict=True))


@pytest.mark.parametrize(
    ("share", "every_prefix"),
    [(1 / 3, lambda n: n // 3), (0.25, lambda n: n // 4), (0, lambda n: 0), (1, lambda n: n)],
)
def test_foreground_share_is_exact_in_every_prefix(share, every_prefix):
    drawn = [crop.foreground for crop in draw(make_plan(foreground_share=share), 60)]
    assert [sum(drawn[:n]) for n in range(61)] == [every_prefix(n) for n in range(61)]


def test_share_that_is_not_a_simple_fraction_is_kept_over_a_thousand_crops():
    drawn = draw(make_plan(foreground_share=0.117), 1000)
    assert sum(crop.foreground for crop in drawn) == 117


def test_foreground_crops_hold_a_foreground_voxel_and_others_go_anywhere():
    corners = {1: [(0, 0, 0), (3, 8, 6)], 3: [(1, 4, 3)]}
    drawn = draw(make_plan(), 600)
    for crop in drawn:
        assert all(0 <= o <= s - c for o, s, c in zip(crop.offset, SHAPE, CROP, strict=True))
        if crop.foreground:
            assert any(holds(crop, voxel) for voxel in corners[crop.case_index])
    random_offsets = {crop.offset for crop in drawn if not crop.foreground}
    assert len(random_offsets) == 3 * 5 * 4  # every position that fits


def test_foreground_voxels_are_drawn_evenly_and_jittered():
    drawn = draw(make_plan(foreground_share=1), 1200)
    of_corners = [crop for crop in drawn if crop.case_index == 1]
    at_origin = sum(crop.offset == (0, 0, 0) for crop in of_corners)
    assert at_origin == pytest.approx(300, abs=60)  # half of 600, five standard deviations
    inner = Counter(crop.offset for crop in drawn if crop.case_index == 3)
    assert set(inner) == {(d, h, w) for d in (0, 1) for h in range(5) for w in range(4)}


def test_both_streams_are_balanced_over_their_cases():
    drawn = draw(make_plan(), 300)
    foreground = Counter(crop.case_index for crop in drawn if crop.foreground)
    anywhere = Counter(crop.case_index for crop in drawn if not crop.foreground)
    assert foreground == {1: 50, 3: 50}
    assert anywhere == dict.fromkeys(range(5), 40)


def test_every_round_of_random_crops_covers_every_case_in_a_new_order():
    order = [crop.case_index for crop in draw(make_plan(foreground_share=0), 50)]
    rounds = [tuple(order[i : i + 5]) for i in range(0, 50, 5)]
    assert all(sorted(once) == [0, 1, 2, 3, 4] for once in rounds)
    assert len(set(rounds)) > 5


def test_a_crop_depends_on_seed_and_index_alone():
    plan, again, other = make_plan(), make_plan(), make_plan(seed=4)
    backwards = [again[i] for i in reversed(range(40))][::-1]
    for crop, same in zip(draw(plan, 40), backwards, strict=True):
        assert (crop.case_index, crop.offset) == (same.case_index, same.offset)
        np.testing.assert_array_equal(crop.key, same.key)
    assert [c.offset for c in draw(plan, 40)] != [c.offset for c in draw(other, 40)]


def test_keys_differ_between_crops_and_seeds():
    keys = [tuple(crop.key) for seed in (0, 1) for crop in draw(make_plan(seed=seed), 500)]
    assert len(set(keys)) == 1000
    assert make_plan()[0].key.dtype == np.uint32


def test_values_are_those_of_the_first_release():
    """Runs are repeatable across versions: these must never change."""
    drawn = draw(make_plan(), 4)
    assert [(crop.case_index, crop.offset) for crop in drawn] == FIRST_RELEASE
    assert drawn[0].key.tolist() == FIRST_KEY


def test_crop_may_be_the_whole_volume_or_one_slice():
    assert make_plan(crop=SHAPE)[0].offset == (0, 0, 0)
    slices = draw(make_plan(crop=(1, 9, 7), foreground_share=1), 40)
    assert {crop.offset for crop in slices} == {(0, 0, 0), (3, 0, 0), (1, 0, 0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"crop": (6, 9, 7)},
            r"crop must fit into the volume; got crop \(6, 9, 7\) and volume \(4, 9, 7\). "
            "Use --train.crop 4 9 7",
        ),
        ({"crop": (0, 5, 5)}, "crop must fit into the volume; .* Use --train.crop 1 5 5"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"foreground_share": 1.5}, "foreground share must be between 0 and 1; got 1.5"),
        ({"cases": []}, "there must be a case to train on; got none"),
        (
            {"cases": [NONE, NONE]},
            "foreground crops need a training case with foreground; got 2 cases without any. "
            ".*--train.foreground-share 0",
        ),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        make_plan(**options)


def test_no_positive_case_is_needed_without_foreground_crops():
    assert not make_plan(cases=[NONE, NONE], foreground_share=0)[0].foreground
