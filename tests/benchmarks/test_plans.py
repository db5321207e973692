"""Data sets that are drawn for comparing plans, and the comparison itself on a few steps."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import made_sets, plans
from data_pipelines.config import PreprocessConfig
from data_pipelines.serving import loading
from experiments.measuring.summary import summarise
from experiments.settings.command_line import parse
from tests.experiments.fake_run import row_of

SPACE = {"brain": (64, 64, 64), "heart": (12, 96, 96), "slices": (1, 128, 128)}


@pytest.mark.parametrize("name", made_sets.SETS)
def test_cases_hold_all_classes_and_are_the_same_for_the_same_seed(name):
    made = made_sets.SETS[name]
    images, label = made.draw(np.random.default_rng((3, 0)))
    again, same = made.draw(np.random.default_rng((3, 0)))
    other, _ = made.draw(np.random.default_rng((3, 1)))
    assert tuple(images) == made.modalities
    assert label.shape == SPACE[name]
    assert {*np.unique(label)} == {0, *range(1, len(made.labels) + 1)}
    np.testing.assert_array_equal(label, same)
    for modality, image in images.items():
        assert image.shape == label.shape
        assert np.isfinite(image).all()
        np.testing.assert_array_equal(image, again[modality])
        assert (image != other[modality]).any()


def test_what_is_drawn_is_read_by_the_builder_of_own_folders(tmp_path):
    made = dataclasses.replace(made_sets.SETS["slices"], num_cases=2)
    made.write(tmp_path / "data", 3)
    config = parse([*made.options(tmp_path / "data"), f"--data.cache={tmp_path / 'cache'}"])
    assert config.data.classes == ("spot",)
    source = loading.build(
        dataclasses.replace(
            config.data, preprocess=PreprocessConfig(spacing_mm=(5, 1, 1), size=(1, 128, 128))
        )
    )
    assert source.case_ids == ("case_000", "case_001")
    _, label = made.draw(np.random.default_rng((3, 1)))
    np.testing.assert_array_equal(source["case_001"].original_truth, label)


def _summary(dice: list[float]):
    rows = [row_of(f"case_{n}", dice=value) for n, value in enumerate(dice)]
    return summarise(rows, [0])


def test_presets_are_compared_with_the_plan_on_the_same_cases():
    runs = {
        plans.AUTO: _summary([0.8, 0.6, 0.7]),
        "small": _summary([0.7, 0.5, 0.6]),
        "light": _summary([0.9, 0.6, 0.6]),
    }
    auto, small, light = plans.compared("mine", runs)
    assert (auto.preset, auto.num_cases, auto.auto_less) == ("auto", 3, None)
    assert auto.dice == pytest.approx(0.7)
    assert small.auto_less == pytest.approx(0.1)
    assert small.auto_less_interval == pytest.approx((0.1, 0.1))
    assert light.auto_less == pytest.approx(0.0)
    assert "| mine | small" in plans.table([auto, small]).replace("  ", " ")


@pytest.mark.slow
def test_plan_and_preset_are_trained_on_a_set_that_is_drawn(tmp_path, monkeypatch, capsys):
    few = dataclasses.replace(made_sets.SETS["slices"], num_cases=4)
    monkeypatch.setitem(made_sets.SETS, "slices", few)
    arguments = ["--sets=slices", "--steps=2", "--num-folds=2", f"--output={tmp_path / 'runs'}"]
    plans.main([*arguments, "--json", str(tmp_path / "rows.json")])
    found = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    assert [row["preset"] for row in found["rows"]] == ["auto", "small"]
    assert all(row["num_cases"] == 4 for row in found["rows"])
    assert (tmp_path / "runs" / "slices" / "plan.json").exists()
    capsys.readouterr()
    plans.main(arguments)
    assert "is done" not in capsys.readouterr().out
