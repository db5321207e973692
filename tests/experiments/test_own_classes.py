"""Classes, regions and ignored voxels of the user's own: in losses, metrics, candidates, models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax.modules.network import NetworkConfig, NetworkOutput
from cmsad_jax.training import LossConfig, loss_terms, segmentation_terms
from cmsad_jax.types import ConfigError
from data_pipelines.config import DataConfig, PreprocessConfig
from data_pipelines.targets import IGNORED
from experiments.exporting.artifact import describe
from experiments.exporting.model_card import classes_of, model_card
from experiments.measuring.cases import Rule, measure_case
from experiments.measuring.summary import summarise
from experiments.prediction.outputs import target_of_model
from experiments.settings.command_line import complete, parse
from experiments.settings.config import Config
from experiments.settings.stored import from_json, to_json

LABELS = ("whole=1+2", "tumour=2", "ignore=3")
RULE = Rule("organ", 0.5, LABELS, ("tumour",))


def config_of(**data) -> Config:
    return complete(Config(data=DataConfig(target="organ", labels=LABELS, **data)))


def test_configuration_follows_from_the_classes():
    config = parse(["--data.target=organ", "--data.labels", *LABELS, "--data.lesions", "tumour"])
    assert config.network.num_classes == 3
    assert config.loss.ignored_label == IGNORED
    assert config.data.classes == ("whole", "tumour")
    assert str(config.output) == "runs/small-phantom-organ"
    assert from_json(Config, to_json(config)) == config
    assert complete(Config()).loss.ignored_label is None


def test_stored_runs_without_classes_of_their_own_are_read():
    values = to_json(complete(Config()))
    for name in ("labels", "lesions"):
        del values["data"][name]
    del values["loss"]["ignored_label"]
    assert from_json(Config, values) == complete(Config())


def test_ignored_voxels_have_no_part_in_the_terms():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 2, 4, 4, 3)), jnp.float32)
    deep = jnp.asarray(rng.normal(size=(2, 2, 2, 2, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 3, (2, 2, 4, 4))).at[:, :, :2].set(IGNORED)
    config = LossConfig(ignored_label=IGNORED)

    def total(logits):
        output = NetworkOutput(logits, (deep,), {}, (), (), jnp.zeros(2))
        terms = segmentation_terms(output, labels, config)
        return sum(value.sum() for value in terms.values())

    gradient = np.asarray(jax.grad(total)(logits))
    assert (gradient[:, :, :2] == 0).all()
    assert (gradient[:, :, 2:] != 0).all()


def test_a_distance_is_not_learnt_where_voxels_are_ignored():
    network = NetworkConfig(distance_clip_mm=15.0)
    with pytest.raises(ConfigError, match="surface is not known where voxels are to be ignored"):
        LossConfig(ignored_label=IGNORED).check(network)
    LossConfig().check(network)


def test_the_label_teaches_where_none_of_it_is_ignored():
    """In the other examples it teaches nothing, and what is ignored in them moves no gradient."""
    rng = np.random.default_rng(0)
    features = {"t2w": [jnp.asarray(rng.normal(size=(2, 4, 4, 4, 3)), jnp.float32)]}
    logits = jnp.zeros((2, 4, 4, 4, 2))
    labels = np.zeros((2, 4, 4, 4), np.int32)
    labels[:, 1:3, 1:3, 1:3] = 1
    labels[1, 0, 0, 0] = IGNORED
    config = LossConfig(
        teachers=("label",), self_weight=0.0, stages=(0,), ignored_label=IGNORED, warmup_steps=0
    )
    of_stages = {name: tuple(stages) for name, stages in features.items()}
    output = NetworkOutput(
        logits, (), of_stages, of_stages["t2w"], (None,), correlation_loss=jnp.zeros(2)
    )
    present = jnp.ones((2, 1), bool)
    terms = loss_terms(output, jnp.asarray(labels), present, config=config, modalities=("t2w",))
    value = np.asarray(terms["label_distillation_loss"][2])
    assert value[0] > 0
    assert value[1] == 0


def case() -> tuple[np.ndarray, np.ndarray]:
    """An organ of 8 x 8 voxels with a tumour of 4 x 4 in it, certain but for one row of each."""
    truth = np.zeros((2, 12, 12), np.uint8)
    truth[:, 2:10, 2:10] = 1
    truth[:, 4:8, 4:8] = 2
    probability = np.zeros((2, 12, 12, 3), np.float32)
    probability[..., 0] = 0.9
    probability[..., 1] = 0.1
    found = truth.copy()
    found[:, 4] = np.where(truth[:, 4] == 2, 1, truth[:, 4])
    for part in (1, 2):
        here = found == part
        probability[here] = np.eye(3)[part] * 0.8 + 0.1
    return truth, probability


def test_regions_are_measured_as_unions():
    truth, probability = case()
    rows = {row.name: row for row in measure_case("c", "p", 0, probability, truth, (1,) * 3, RULE)}
    assert list(rows) == ["whole", "tumour"]
    assert rows["whole"].dice == 1.0  # a row of tumour that is called organ is of the whole
    assert rows["tumour"].dice == pytest.approx(2 * 12 / (12 + 16))
    assert rows["whole"].metrics["volume_truth_ml"] == pytest.approx(2 * 64 / 1000)
    assert rows["whole"].detection is None
    assert rows["tumour"].detection is not None
    assert rows["tumour"].detection.positive


def test_ignored_voxels_are_in_no_metric_and_no_candidate():
    truth, probability = case()
    truth[:, :, 6:] = IGNORED
    wild = probability.copy()
    wild[:, :, 6:] = np.eye(3)[2] * 0.98 + 0.01  # all tumour where nobody knows
    quiet = probability.copy()
    quiet[:, :, 6:] = np.eye(3)[0]
    rows, others = (
        measure_case("c", "p", 0, given, truth, (1.0,) * 3, RULE) for given in (wild, quiet)
    )
    assert [row.metrics for row in rows] == [row.metrics for row in others]
    assert rows[1].detection == others[1].detection
    assert rows[1].metrics["false_positive_volume_ml"] == 0
    assert rows[0].metrics["specificity"] == 1.0
    assert rows[1].detection is not None
    assert sum(count for count, *_ in rows[1].detection.voxels) == 2 * 12 * 6


def test_specificity_counts_no_ignored_background():
    truth = np.zeros((1, 4, 4), np.uint8)
    truth[:, 0] = IGNORED
    mask = np.zeros((1, 4, 4), np.uint8)
    mask[0, 1] = 1  # 4 of the 12 that count
    (row, _) = measure_case("c", "p", 0, mask, truth, (1.0,) * 3, RULE)
    assert row.metrics["specificity"] == pytest.approx(8 / 12)


def test_lesions_of_one_class_are_summed_up_beside_others():
    truth, probability = case()
    rows = [
        row
        for name in ("a", "b")
        for row in measure_case(name, name, 0, probability, truth, (1.0,) * 3, RULE)
    ]
    summary = summarise(rows, [0])
    assert summary.classes == ("whole", "tumour")
    assert summary.detection is not None
    assert summary.detection.num_lesions == 2
    plain = Rule("organ", 0.5, LABELS)
    rows = measure_case("a", "a", 0, probability, truth, (1.0,) * 3, plain)
    assert summarise(rows, [0]).detection is None


def test_models_know_their_classes():
    described = describe(config_of(), members=("fold_0",), provenance={}, metrics={}, license="x")
    assert described.classes == ("whole", "whole.tumour")
    assert described.num_outputs == 3
    target = target_of_model(described)
    assert target.classes == ("whole", "tumour")
    assert target.to_file(np.array([0, 1, 2])).tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="must give what its target has; got whole and"):
        target_of_model(dataclasses.replace(described, classes=("whole",)))
    old = dataclasses.replace(described, labels=(), lesions=(), classes=("a", "b"))
    assert target_of_model(old).classes == ("a", "b")
    odd = dataclasses.replace(described, labels=("x",))
    with pytest.raises(ConfigError, match="target of the model cannot be"):
        target_of_model(odd)


def test_card_names_classes_and_units():
    config = config_of(preprocess=PreprocessConfig(scales=("adc=1200/500",)))
    facts = {"config": to_json(config), "environment": {}, "data_fingerprint": "0" * 64}
    described = describe(config, members=("fold_0",), provenance=facts, metrics={}, license="x")
    assert classes_of(described) == ("whole", "tumour")
    assert classes_of(dataclasses.replace(described, labels=())) == ("whole", "whole.tumour")
    card = " ".join(model_card(described, 1000).split())
    assert "Segments whole, tumour in images from t2w, adc, hbv" in card
    assert "sd 1, but for what keeps its unit (adc=1200/500: centre and width)" in card
    assert "A person who knows such images judges every result" in card
    figures = {"mean": {}, "detection": {"num_cases": 3, "auroc": 0.8}}
    with_lesions = dataclasses.replace(
        described, metrics=figures | {"mean": {"tumour": {}}}, lesions=("tumour",)
    )
    assert "| tumour | AUROC of cases | 0.800 |" in model_card(with_lesions, 1000)
