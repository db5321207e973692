"""What a whole run takes, from what a stretch of it took."""

import dataclasses

import pytest

from benchmarks import cv
from experiments.settings.presets import PRESETS


def test_hours_of_a_run_follow_from_steps_looks_and_cases():
    train = dataclasses.replace(PRESETS["small"].train, steps=7200, validations=10)
    config = dataclasses.replace(PRESETS["small"], train=train, num_folds=5)
    found = {"steps_per_s": 10.0, "predict_s": 1.0, "measure_s": 3.0, "first_step_s": 60.0}
    # 5 x 7200 / 10 s of steps; 10 looks at 28 of 100 cases; 100 cases of 3 s; one compilation
    seconds = 3600 + 280 + 300 + 60
    assert cv.extrapolated_hours(config, found, 100) == pytest.approx(seconds / 3600)


def test_preset_is_measured_on_phantom_cases(tmp_path):
    config = cv.measured_config("slice2d", tmp_path, 7, "device", 5)
    assert (config.data.name, config.data.phantom.num_cases) == ("phantom", 7)
    assert (config.data.cache, config.data.residency) == (tmp_path, "device")
    assert config.train == PRESETS["slice2d"].train
    assert config.folds_at_once == 5
