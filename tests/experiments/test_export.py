"""From a run folder to an artifact: what goes in, what is said, what is refused."""

import dataclasses
import errno
import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import cmsad_jax.export
from cmsad_jax.named_weights import flatten_weights
from cmsad_jax.types import ConfigError
from data_pipelines.case import CaseInfo
from data_pipelines.faults import DataError
from experiments import export
from experiments.exporting import artifact, model_card
from experiments.measuring.summary import summarise
from experiments.measuring.training_data import from_provenance, gather
from experiments.process.records import write_record
from experiments.run_folder import RunFolder, RunRecord
from experiments.settings.config import Config
from experiments.settings.stored import from_json, to_json
from tests.experiments.fake_run import make_run
from tests.experiments.untrained_run import make_untrained_run, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, make_untrained_run(folder, tiny_config())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("exported")
    arguments = [str(run[0]), "--output", str(folder / "model.cmsad"), "--license", "CC-BY-NC-4.0"]
    export.main([*arguments, "--safetensors", str(folder / "weights"), "--folds", "1"])
    return folder


def test_artifact_holds_the_averaged_weights_of_the_chosen_folds(exported, run):
    model = cmsad_jax.export.load(exported / "model.cmsad")
    expected = flatten_weights(run[1][1])
    (weights,) = model.weights
    also = safetensors.numpy.load_file(exported / "weights/fold_1.safetensors")
    assert weights.keys() == also.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value)
        np.testing.assert_array_equal(also[name], value)


def test_artifact_says_what_surrounds_the_weights(exported):
    model = cmsad_jax.export.load(exported / "model.cmsad")
    facts = model.description
    config = tiny_config()
    assert facts.modalities == ("t2w", "adc")
    assert facts.window == config.train.crop
    assert tuple(facts.preprocess["size"]) == config.data.preprocess.size
    assert (facts.threshold, facts.allow_missing) == (0.5, False)
    assert facts.members == ("fold_1",)
    assert facts.metrics == {}, "the run measured fold 0 alone"
    assert facts.provenance["environment"]["git_commit"] == "abc123"
    assert facts.provenance["config"]["train"]["steps"] == config.train.steps
    assert facts.license == "CC-BY-NC-4.0"
    assert model.license_text == "CC-BY-NC-4.0\n"
    text = json.dumps(facts.provenance)
    assert "cache" not in text, "folders of the machine are nobody's business"


def test_card_says_what_a_person_must_know(exported):
    card = cmsad_jax.export.load(exported / "model.cmsad").card
    for words in (
        "not a medical device",
        "Segments lesion in prostate MRI from t2w, adc",
        "must all be there",
        "6 x 16 x 16 voxels",
        "percentiles\n  0.5 to 99.5",
        "a case that lacks one is refused; the model was never shown such a case.",
        "phantom, synthetic: drawn by this project's code, no patient",
        "None: the run holds no figures of these members.",
        "It has never seen a patient.",
        "## Intended use",
        'pip install "cmsad-jax[experiments]"\ncmsad predict --model model.cmsad',
        "CC-BY-NC-4.0",
    ):
        assert words in card


def test_figures_are_of_the_members_alone(tmp_path):
    folder = RunFolder(make_run(tmp_path / "run", num_folds=3, figures=False, history=False))
    results = folder.read_results()
    of_all, of_one = (artifact.figures(results, members) for members in ((0, 1, 2), (1,)))
    assert of_all["mean"]["lesion"]["dice"] == results.summary.mean["lesion"]["dice"]
    rows = [row for row in results.summary.metric_per_case if row.fold == 1]
    own = summarise(rows, [1])
    assert of_one["mean"]["lesion"]["dice"] == own.mean["lesion"]["dice"]
    assert of_one["mean"]["lesion"]["dice"] != of_all["mean"]["lesion"]["dice"]
    assert of_one["num_cases"] == 6
    assert of_one["detection"]["average_precision"] == own.detection.average_precision
    assert tuple(of_one["interval"]["lesion"]["dice"]) == own.interval["lesion"]["dice"]
    config = {"data": {"name": "picai"}, "train": {"modality_dropout": 0.25}}
    description = dataclasses.replace(
        artifact.describe(
            tiny_config(modality_dropout=0.25),
            members=["fold_1"],
            provenance={"config": config, "data_fingerprint": "0", "environment": {}},
            metrics=of_one,
            license="",
            operating_point={
                "num_cases": 12, "num_lesions": 6, "least_confidence": 0.25, "threshold": 0.4
            },
        ),
    )  # fmt: skip
    trained_on = artifact._training_set(folder, [1])
    assert trained_on == model_card.TrainingSet((12,), (), ("",))
    card = model_card.model_card(description, 1, trained_on)
    low, high = own.interval["lesion"]["dice"]
    dice = own.mean["lesion"]["dice"]
    assert f"| lesion | dice | {dice:.3f} | {low:.3f} to {high:.3f} |" in card
    assert f"| lesion | AP of lesions | {own.detection.average_precision:.3f} |" in card
    assert f"| lesion | AUROC of cases | {own.detection.auroc:.3f} |" in card
    assert "12 for each member; 6 cases are measured below" in card
    assert "**Kind**: patients" in card
    assert "each was withheld from 25% of its training examples" in card
    assert "called from a confidence of 0.250 on" in card
    assert "never seen a patient" not in card
    assert "First weights" not in card
    grouped = model_card.TrainingSet(
        (5, 9, 7), ("RUMC", "ZGT", "PCNN"), ("starts from fold 0 of before: 7 of 9 arrays",) * 3
    )
    card = model_card.model_card(description, 1, grouped)
    assert "5 to 9 for each member" in card
    assert "RUMC, ZGT, PCNN" in card
    assert card.count("starts from fold 0 of before: 7 of 9 arrays. Cases of that training") == 1


def test_artifact_says_what_the_model_was_trained_on(run, tmp_path):
    older = artifact.write_artifact(run[0], io.BytesIO(), folds=[0])
    assert "training_data" not in older.provenance
    folder = shutil.copytree(run[0], tmp_path / "run")
    data = gather("picai", [CaseInfo("a", "p", True), CaseInfo("b", "p", False)], ("t2w", "adc"))
    write_record(RunFolder(folder).training_data, data, schema=1)
    newer = artifact.write_artifact(folder, io.BytesIO(), folds=[0])
    assert from_provenance(newer.provenance) == data


def test_card_follows_the_classes_and_the_grid(exported):
    description = cmsad_jax.export.load(exported / "model.cmsad").description
    card = model_card.model_card(description, 1)
    assert "around the centre of the T2W image" in card
    assert "a voxel above 0.5 belongs to the target" in card
    zones = dataclasses.replace(
        description,
        classes=("pz", "tz"),
        preprocess=description.preprocess | {"centre": "gland"},
    )
    card = model_card.model_card(zones, 1)
    assert "around the centre of the gland" in card
    assert "a voxel belongs to the most probable class, background among them" in card


def test_provenance_names_no_folder_of_the_machine(tmp_path):
    config = dataclasses.replace(tiny_config(), profile=tmp_path, folds_file=tmp_path)
    record = artifact._without_paths(RunRecord(to_json(config)))
    assert str(tmp_path) not in json.dumps(record.config)


def test_damaged_files_of_a_run_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"must be as it was written; .*config\.json"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "metrics.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"must be as it was written; .*metrics\.json"):
        RunFolder(tmp_path).read_results()


def test_training_with_dropout_or_missing_cases_allows_for_missing_modalities():
    def allowed(config):
        return artifact.describe(config, members=(), provenance={}, metrics={}, license="")

    config = tiny_config()
    incomplete = dataclasses.replace(config.data, allow_missing=True)
    assert not allowed(config).allow_missing
    assert allowed(tiny_config(modality_dropout=0.1)).allow_missing
    assert allowed(dataclasses.replace(config, data=incomplete)).allow_missing


def test_unfinished_folds_are_refused_with_a_way_out(tmp_path):
    make_untrained_run(tmp_path / "run", tiny_config(), done=1)
    with pytest.raises(ConfigError, match=r"lacks 1\. Run python -m .*, or pass --folds 0\."):
        export.main([str(tmp_path / "run"), "--output", str(tmp_path / "m.cmsad")])
    assert not (tmp_path / "m.cmsad").exists()


def test_a_full_disk_leaves_no_half_an_artifact(run, tmp_path, monkeypatch):
    class Full(zipfile.ZipFile):
        def writestr(self, entry, content):
            super().writestr(entry, content)
            if "weights" in entry.filename:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile, "ZipFile", Full)
    file = tmp_path / "model.cmsad"
    file.write_bytes(b"of before")
    with pytest.raises(OSError, match="cannot write: No space left") as stopped:
        export.main([str(run[0]), "--output", str(file), "--folds", "0"])
    assert stopped.value.filename == str(file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.cmsad"]
    assert file.read_bytes() == b"of before"


def test_a_folder_is_no_place_for_an_artifact(run, tmp_path):
    with pytest.raises(ConfigError, match=r"one file; got the folder .*--output=.*model\.cmsad"):
        export.main([str(run[0]), "--output", str(tmp_path)])


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a run folder must hold config.json; got none in"):
        export.main([str(tmp_path)])


def test_stored_configuration_comes_back_whole():
    for config in (tiny_config(), tiny_config(modality_dropout=0.5)):
        assert from_json(Config, to_json(config)) == config


def test_stored_configuration_of_another_version_is_refused_or_completed():
    values = to_json(tiny_config())
    del values["train"]["modality_dropout"]
    assert from_json(Config, values) == tiny_config()
    values["train"]["colour"] = "blue"
    with pytest.raises(ConfigError, match=r"got 'colour' in TrainConfig. Use the version"):
        from_json(Config, values)
