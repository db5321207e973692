"""The voxel baseline, on voxels small enough to solve by hand and on a tiny data set."""

import numpy as np
import pytest
from scipy import ndimage

from cmsad_jax.types import ConfigError
from data_pipelines.case import CaseInfo
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.faults import DataError
from data_pipelines.phantom.options import PhantomOptions
from experiments import voxel_baseline
from experiments.settings.config import Config
from experiments.voxel_baseline import (
    BACKGROUND_VOXELS,
    BLURS_MM,
    best_threshold,
    choose_threshold,
    features,
    fit,
    gland_masks,
    training_sample,
)


def test_best_threshold_is_that_of_the_highest_mean_dice():
    first = (np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, False, False, False]))
    second = (np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, True, False, False]))
    # above 2: Dice 1 and 2/3; above 1: 2/3 and 1; the second case alone is best above 1.
    assert 2 <= best_threshold([first]) < 3
    assert 1 <= best_threshold([second]) < 2
    assert 1 <= best_threshold([first, second, second]) < 2


def test_an_enclosed_foreground_is_told_by_its_intensities():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(8000, 2)).astype(np.float32)
    label = (image**2).sum(axis=1) < 0.5
    classify = fit(image[:4000], label[:4000], np.ones(4000), seed=0)
    found = classify(image[4000:])
    assert found.min() >= 0
    assert found.max() <= 1
    marked, truth = found > 0.5, label[4000:]
    assert 2 * (marked & truth).sum() / (marked.sum() + truth.sum()) > 0.95


def test_weights_make_the_sample_stand_for_all_voxels():
    rng = np.random.default_rng(0)
    label = np.zeros(10 * BACKGROUND_VOXELS, bool)
    label[:50] = True
    image, drawn, weight = training_sample([(rng.normal(size=(label.size, 3)), label)], rng)
    assert image.shape == (50 + BACKGROUND_VOXELS, 3)
    assert drawn.sum() == 50
    assert weight[drawn].sum() == 50
    assert weight[~drawn].sum() == pytest.approx(label.size - 50)


def test_features_are_intensities_blurs_in_mm_and_position():
    spacing, shape = (3.0, 2.0, 2.0), (6, 8, 10)
    image = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)
    gland = np.zeros(shape, bool)
    gland[1:4, 2:7, 3:8] = True
    found = features(image, spacing, gland).reshape(*shape, -1)
    assert found.shape[-1] == 2 * (1 + len(BLURS_MM)) + 4
    np.testing.assert_array_equal(found[..., :2], image)
    for i, sd_mm in enumerate(BLURS_MM):
        sd = [sd_mm / step for step in spacing]
        for m in range(2):
            blurred = ndimage.gaussian_filter(image[..., m], sd, mode="nearest")
            np.testing.assert_allclose(found[..., 2 * (i + 1) + m], blurred, atol=1e-5)
    np.testing.assert_allclose(found[2, 4, 5, -4:], [0, 0, 0, -6])  # two slices from outside
    np.testing.assert_allclose(found[3, 6, 7, -4:-1], [1 / 1.5, 2 / 2.5, 2 / 2.5], rtol=1e-6)
    assert found[2, 7, 5, -1] == pytest.approx(2.0)  # a row beyond the last of the gland
    for without in (None, np.zeros(shape, bool)):
        placed = features(image, spacing, without).reshape(*shape, -1)[..., -3:]
        np.testing.assert_allclose(placed[0, 0, 0], [-7.5, -7, -9])
        np.testing.assert_allclose(placed[-1, -1, -1], [7.5, 7, 9])


class Memory(dict):
    """Cases of voxels, standing in for ``Described``."""


def cases_of(num: int, rng: np.random.Generator) -> tuple[Memory, list[CaseInfo]]:
    """Cases with two kinds of foreground voxels, of which training shows which one counts."""
    described = Memory()
    for i in range(num):
        image = rng.normal(size=(500, 2)).astype(np.float32)
        described[f"c{i}"] = image, image[:, 0] > 1
    return described, [CaseInfo(f"c{i}", f"p{i}", True) for i in range(num)]


def test_threshold_is_chosen_on_patients_that_the_ensemble_has_not_seen(monkeypatch):
    described, infos = cases_of(6, np.random.default_rng(0))
    fitted, scored = [], []

    def fit_cases(described, training, *, seed):
        known = {info.case_id for info in training}
        fitted.append(known)

        def classify(image):
            (case_id,) = (k for k, (other, _) in described.items() if other is image)
            scored.append(case_id)
            assert case_id not in known
            return np.where(described[case_id][1], 0.7, 0.3)

        return classify

    monkeypatch.setattr(voxel_baseline, "fit_cases", fit_cases)
    assert 0.3 <= choose_threshold(described, infos, seed=0) < 0.7
    assert sorted(scored) == sorted(described)
    assert [len(known) for known in fitted] == [4, 4, 4]


def test_one_positive_patient_is_predicted_by_itself():
    described, infos = cases_of(1, np.random.default_rng(0))
    assert 0 < choose_threshold(described, infos, seed=0) < 1


def test_training_patients_without_foreground_are_refused():
    infos = [CaseInfo("c0", "p0", False), CaseInfo("c1", "p1", False)]
    with pytest.raises(DataError, match=r"must hold the target; got 2 cases.*Use more cases"):
        choose_threshold(Memory(), infos, seed=0)


def test_several_classes_are_refused():
    config = Config(data=DataConfig(target="zones"))
    with pytest.raises(ConfigError, match=r"one class.*got pz, tz\. Use --data\.target=lesion"):
        voxel_baseline.run(config)


def test_without_masks_of_the_gland_position_is_that_on_the_grid(tmp_path, monkeypatch, capsys):
    def refuse(config):
        assert config.target == "gland"
        raise DataError("a case must have a label; got none.")

    monkeypatch.setattr(voxel_baseline.loading, "build", refuse)
    assert gland_masks(DataConfig(cache=tmp_path)) is None
    printed = capsys.readouterr().out
    assert "no masks of the gland (a case must have a label; got none.)" in printed
    assert gland_masks(DataConfig(target="gland")) is None  # it would be the answer
    assert not capsys.readouterr().out


def test_a_run_measures_probabilities_in_the_frame_of_t2w(tmp_path, monkeypatch):
    """With the truth for probabilities, what is found is the truth, but for the coarser grid."""
    config = Config(
        num_folds=2,
        folds=(1,),
        data=DataConfig(phantom=PhantomOptions(num_cases=5), cache=tmp_path),
    )
    monkeypatch.setattr(voxel_baseline, "gland_masks", lambda data: None)
    source = voxel_baseline.loading.build(config.data)
    monkeypatch.setattr(voxel_baseline, "choose_threshold", lambda *args, **kwargs: 0.5)
    labels = {case_id: source.arrays(case_id).label.ravel() for case_id in source.case_ids}

    def fit_cases(described, training, *, seed):
        def classify(image):
            (case_id,) = (i for i in labels if np.array_equal(described[i][0], image))
            return 0.2 + 0.6 * labels[case_id]

        return classify

    monkeypatch.setattr(voxel_baseline, "fit_cases", fit_cases)
    found = voxel_baseline.run(config)
    for row in found.metric_per_case:
        assert row.detection is not None
        assert row.detection.positive == row.positive
        if row.positive:
            assert row.dice is not None
            assert row.dice > 0.8
            assert row.detection.confidence == pytest.approx(0.8, abs=0.1)
    assert found.detection is not None
    assert found.detection.auroc == 1.0


@pytest.mark.slow
def test_a_run_measures_each_case_of_the_folds_asked_for_once(tmp_path):
    coarse = PreprocessConfig(spacing_mm=(6.0, 6.0, 6.0), size=(8, 16, 16))
    config = Config(
        num_folds=2,
        folds=(1,),
        data=DataConfig(phantom=PhantomOptions(num_cases=5), cache=tmp_path, preprocess=coarse),
    )
    found = voxel_baseline.run(config)
    (fold,) = found.per_fold
    assert fold.fold == 1
    assert found.num_cases == fold.num_cases == len(found.metric_per_case)
    assert found.num_positive["lesion"] >= 1
    assert found.detection is not None
    assert voxel_baseline.run(config) == found
