"""Several models that predict as one."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import cmsad_jax.export
from cmsad_jax.types import ConfigError
from data_pipelines.case import STORED_UNIT
from data_pipelines.preparing import preprocessing
from experiments import predict
from experiments.exporting.artifact import describe
from experiments.exporting.opening import open_models
from experiments.prediction.models import Models, data_config
from tests.data_pipelines.fabricate import raw_case, write_folder
from tests.experiments.test_predict import load
from tests.experiments.untrained_run import tiny_config

NOTHING = dict.fromkeys(("threshold", "overlap", "flip", "batch_size"))


def case_of(case_id="a", *, seed=0):
    raw = raw_case(case_id, seed=seed)
    images = {name: raw.images[name] for name in ("t2w", "adc")}
    return dataclasses.replace(raw, images=images, label=None)


def made(values, *, digest="0", grid=None, **description):
    """A model whose members give each voxel what is in ``values``, whatever they see."""

    def program(weights, windows, present):
        return np.full((*windows.shape[:-1], 1), weights["value"], np.float32)

    config = tiny_config()
    members = [f"fold_{n}" for n in range(len(values))]
    described = describe(config, members=members, provenance={}, metrics={}, license="MIT")
    described = dataclasses.replace(described, **description)
    if grid is not None:
        described = dataclasses.replace(described, preprocess={**described.preprocess, **grid})
    weights = tuple({"value": jnp.float32(value)} for value in values)
    digests = tuple(f"{digest}{n}" for n in range(len(values)))
    return cmsad_jax.export.Model(described, {"predict": program}, weights, "", "", digests)


def together(*models):
    return Models(models, tuple(data_config(model.description) for model in models))


def cases_of(models):
    """A case as each model is to see it."""
    cases, remarks = models.in_boxes(models.prepare(case_of()))
    assert remarks == ()
    return cases


def test_each_model_counts_once_and_spread_is_that_of_all_members():
    models = together(made([0.2, 0.4]), made([0.9], digest="1"))
    found = models.predict(cases_of(models))
    np.testing.assert_allclose(found.probability, (0.3 + 0.9) / 2, atol=1e-6)
    members, weights = np.array([0.2, 0.4, 0.9]), np.array([0.25, 0.25, 0.5])
    variance = weights @ (members - weights @ members) ** 2
    np.testing.assert_allclose(found.disagreement, np.sqrt(variance), atol=1e-6)
    assert models.description.members == ("model_1.fold_0", "model_1.fold_1", "model_2.fold_0")


def test_the_order_of_models_on_one_grid_changes_nothing():
    a, b, c = (made([value], digest=str(value)) for value in (0.1, 0.5, 0.7))
    cases = cases_of(together(a, b, c))
    first, second = (together(*order).predict(cases) for order in ((a, b, c), (c, a, b)))
    np.testing.assert_allclose(first.probability, second.probability, atol=1e-6)
    np.testing.assert_allclose(first.disagreement, second.disagreement, atol=1e-6)
    identities = {together(*order).sha256 for order in ((a, b), (b, a), (a, c), (a,), (b,))}
    assert len(identities) == 5, "the first says where is looked"
    assert together(a).sha256 == a.sha256


def test_a_model_of_another_grid_is_averaged_by_physical_position():
    """Its probability is linear in the position, so that linear interpolation changes nothing."""

    def brightness(weights, windows, present):
        return windows[..., :1]

    config = tiny_config()
    coarse = dataclasses.replace(
        made([0.0], digest="1", grid={"spacing_mm": (3.0, 2.0, 2.0), "size": (4, 8, 8)}),
        programs={"predict": brightness},
    )
    models = together(made([0.25]), coarse)
    cases = cases_of(models)
    assert cases[1].image.shape[:3] == (4, 8, 8) != cases[0].image.shape[:3]
    ramps = []
    for case in cases:
        index = np.indices(case.image.shape[:3])[::-1].reshape(3, -1)  # i, j, k
        x = (case.affine[:3, :3] @ index + case.affine[:3, 3:])[0].reshape(case.image.shape[:3])
        ramps.append(x)
    low, high = ramps[0].min() - 50, ramps[0].max() + 50
    units = [(x - low) / (high - low) for x in ramps]
    image = np.round(units[1] / STORED_UNIT)[..., None].repeat(len(config.data.modalities), -1)
    painted = (cases[0], dataclasses.replace(cases[1], image=image.astype(np.int16)))
    found = models.predict(painted).probability[..., 0]
    corners = np.stack(np.meshgrid(*(np.arange(n) for n in found.shape), indexing="ij"), -1)
    world = corners[..., ::-1] @ cases[0].affine[:3, :3].T + cases[0].affine[:3, 3]
    inverse = np.linalg.inv(cases[1].affine)
    there = world @ inverse[:3, :3].T + inverse[:3, 3]
    seen = ((there >= 0) & (there <= np.array([7, 7, 3]))).all(-1)
    outside = ((there < -0.5) | (there > np.array([7, 7, 3]) + 0.5)).any(-1)
    assert seen.any()
    assert outside.any()
    np.testing.assert_allclose(found[seen], (0.25 + units[0][seen]) / 2, atol=2 * STORED_UNIT)
    np.testing.assert_allclose(found[outside], 0.25, atol=1e-6)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"digest": "0"}, r"each model is averaged once; got that of .*b\.cmsad a second"),
        (
            {"modalities": ("t2w",)},
            r"must have the same modalities; got t2w, adc of .*a\.cmsad and",
        ),
        ({"target": "gland", "classes": ("gland",)}, "the same target; got lesion of .* and gland"),
        ({"threshold": 0.3}, r"applied with one threshold; got 0\.3, 0\.5\. Give --threshold, for"),
        ({"flip": True}, "applied with one flip; got False, True. Give --flip, for example"),
    ],
)
def test_models_that_cannot_be_averaged_are_refused(second, message, tmp_path, monkeypatch):
    known = {"a.cmsad": made([0.5], flip=False)}
    known["b.cmsad"] = made([0.5], **{"digest": "1", "flip": False} | second)
    monkeypatch.setattr(cmsad_jax.export, "load", lambda path: known[path.name])
    for name in known:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=message):
        open_models([tmp_path / name for name in known], None, NOTHING)


def test_command_averages_and_says_so(tmp_path, monkeypatch, capsys):
    known = {
        "a.cmsad": made([0.2], operating_point={}),
        "b.cmsad": made([0.9], digest="1", threshold=0.3),
    }
    monkeypatch.setattr(cmsad_jax.export, "load", lambda path: known[path.name])
    for name in known:
        (tmp_path / name).touch()
    write_folder(tmp_path / "in", case_of("p"))
    words = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--threshold=0.5"]
    models = [f"--model={tmp_path / name}" for name in known]
    predict.main([*models, *words])
    said = capsys.readouterr().out
    assert "the mean of 2 models: " in said
    record = json.loads((tmp_path / "out/predictions.json").read_text("utf-8"))
    assert [model["members"] for model in record["model"]["models"]] == [["fold_0"], ["fold_0"]]
    assert record["cases"][0]["highest_probability"]["lesion"] == pytest.approx(0.55, abs=1e-5)
    assert "lesion_probability" not in record["cases"][0], "learnt for one model alone"
    probability = load(tmp_path / "out/probabilities/p.nii.gz")
    np.testing.assert_allclose(probability[probability > 0].max(), 0.55, atol=1e-6)

    with pytest.raises(ConfigError, match="holds the results of one model and its settings"):
        predict.main([models[0], *words])
    with pytest.raises(ConfigError, match="attention maps are those of one model; got 2 models"):
        predict.main([*models, *words, "--attention"])
    with pytest.raises(ConfigError, match=r"a model must be given; got none\. Name a run"):
        predict.main(words)


def test_preparation_is_shared_by_models_of_one_grid(monkeypatch):
    made_of, prepared = preprocessing.preprocess_case, []

    def counted(raw, data, **options):
        prepared.append(data)
        return made_of(raw, data, **options)

    monkeypatch.setattr(preprocessing, "preprocess_case", counted)
    other = made([0.1], digest="2", grid={"spacing_mm": (3.0, 2.0, 2.0), "size": (4, 8, 8)})
    cases = together(made([0.1]), made([0.2], digest="1"), other).prepare(case_of())
    assert len(cases) == 3
    assert len(prepared) == 2
