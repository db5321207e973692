"""Cross-validation as a whole: what it leaves, what it survives, and what it refuses."""

import csv
import dataclasses
import gzip
import io
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import nibabel as nib
import numpy as np
import pytest

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.serving import loading
from experiments import reproduce, run_folder
from experiments.exporting.artifact import write_artifact
from experiments.measuring.metrics import to_mask
from experiments.process.console import RunError
from experiments.process.storage import locked
from experiments.reporting import figures
from experiments.settings.command_line import complete
from experiments.studies import cross_validation
from experiments.training import loop
from experiments.training.checkpoints import Checkpoints, load_params
from experiments.training.programs import compile_programs
from tests.data_pipelines.fabricate import raw_case, write_folder
from tests.experiments.fake_run import row_of
from tests.experiments.test_tensorboard import read_events
from tests.experiments.tiny_run import ENCODER, history, poisoned, shared_programs, tiny


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with shared_programs():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """A run done in two goes: fold 1 first, then the rest."""
    output = tmp_path_factory.mktemp("runs") / "run"
    config = tiny(output, cache)
    first = cross_validation.run(dataclasses.replace(config, folds=(1,)))
    assert first.folds_done == (1,)
    marker = output / "fold_1" / "metrics.json"
    written = marker.stat().st_mtime_ns
    metrics = cross_validation.run(config)
    assert marker.stat().st_mtime_ns == written, "a fold that is done is not done again"
    return config, metrics


def test_every_patient_is_measured_once(finished):
    config, metrics = finished
    source = loading.build(config.data)
    measured = [row.case_id for row in metrics.summary.metric_per_case]
    assert sorted(measured) == sorted(source.case_ids)
    assert metrics.folds_done == (0, 1, 2)
    by_case = {info.case_id: info.positive for info in source.info}
    for row in metrics.summary.metric_per_case:
        assert (row.dice is not None) == by_case[row.case_id]


def test_one_network_of_all_cases(finished, tmp_path, capsys):
    config, _ = finished
    alone = dataclasses.replace(config, output=tmp_path / "alone", folds="all")
    assert cross_validation.run(alone) is None
    said = capsys.readouterr().out
    assert "the network of all cases: 2 steps in" in said
    assert "no case is held out" in said
    assert f"experiments.predict --model={alone.output} --folds all" in said
    folder = run_folder.RunFolder(alone.output)
    assert [path.name for path in sorted(alone.output.glob("fold_*"))] == ["fold_all"]
    artifact = io.BytesIO()
    description = write_artifact(alone.output, artifact, folds="all", platforms=["cpu"])
    assert description.members == ("fold_all",)
    assert description.metrics == {}
    with pytest.raises(ConfigError, match=r"lacks 0 1 2\. .* or pass --folds all"):
        folder.members(alone, None)
    with pytest.raises(ConfigError, match=r"lacks all\."):
        folder.members(alone, (999,))  # a fold's number, whatever stands for the network of all
    with pytest.raises(ConfigError, match=r"^cross_validate measures cases .* got --folds all"):
        cross_validation.cross_validate(alone)
    again = cross_validation.run(alone)
    assert again is None
    assert "the network of all cases: done before" in capsys.readouterr().out


def test_masks_lie_in_the_frame_of_the_original_t2w(finished):
    config, _ = finished
    source = loading.build(config.data)
    for fold in range(3):
        for path in (config.output / f"fold_{fold}" / "masks").iterdir():
            case = source[path.name.removesuffix(".nii.gz")]
            for image in (nib.load(path), nib.load(path.parents[1] / "probabilities" / path.name)):
                assert image.shape == case.original_shape[::-1]
                np.testing.assert_allclose(image.affine, case.original_affine, atol=1e-4)
            assert set(np.unique(nib.load(path).get_fdata())) <= {0.0, 1.0}


def test_run_folder_holds_config_versions_folds_curves_and_report(finished):
    config, metrics = finished
    output = config.output
    record = json.loads((output / "config.json").read_text("utf-8"))
    assert record["config"]["train"]["steps"] == 2
    assert record["data_fingerprint"] == loading.build(config.data).fingerprint
    data = json.loads((output / "training_data.json").read_text("utf-8"))
    assert (data["schema"], data["name"], data["synthetic"], data["num_cases"]) == (
        *(1, "phantom", True),
        metrics.summary.num_cases,
    )
    assert data["modalities"]["adc"]["num_cases"] == metrics.summary.num_cases
    environment = json.loads((output / "environment.json").read_text("utf-8"))
    assert environment["versions"]["jax"] == jax.__version__
    assert run_folder.RunFolder(output).read_results() == metrics
    with (output / "fold_0" / "history.csv").open(encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    assert [row["step"] for row in history] == ["1", "2"]
    assert float(history[-1]["cross_modal_distillation_loss"]) > 0
    assert history[-1]["validation_dice"] != ""
    assert "<html" in (output / "report.html").read_text("utf-8")
    assert (output / "report.md").is_file()
    assert metrics.summary.detection.num_cases == 10
    assert metrics.fold_summaries[0].peak_memory_gb > 0.1
    (events,) = (output / "fold_0" / "tensorboard").iterdir()
    assert "loss" in {event.tag for event in read_events(events)}
    with np.load(next((output / "fold_0" / "figures").iterdir())) as figure:
        assert figure["attention"].shape == (12, 32, 32, 3, 2)
        assert figure["attention"].max() > 200


def test_checkpoint_gives_the_weights_back(finished):
    config, _ = finished
    programs = compile_programs(config, jax.devices()[:1])
    like = programs.init(jax.random.key(1))
    checkpoints = Checkpoints(config.output / "fold_0" / "checkpoints", config)
    state = checkpoints.restore("last", like)
    checkpoints.close()
    assert int(state.step) == 2
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state.params, like.params)
    assert not all(jax.tree.leaves(same))


@pytest.mark.slow
def test_same_seed_gives_the_same_numbers(finished, tmp_path, cache):
    _, metrics = finished
    again = cross_validation.run(dataclasses.replace(tiny(tmp_path / "run", cache), folds=(0,)))
    rows = tuple(row for row in metrics.summary.metric_per_case if row.fold == 0)
    assert again.summary.metric_per_case == rows


class Killed(BaseException):
    """Stands for the end of the process: nothing in the project catches it."""


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        pytest.param(loop, "train_batches", 1, marks=pytest.mark.slow),
        pytest.param(loop, "reference_dice", 1, marks=pytest.mark.slow),
        (Checkpoints, "_write", 2),
        (cross_validation, "predict_and_measure", 2),
        pytest.param(cross_validation, "finish", 1, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str | int) else value.__name__.split(".")[-1],
)
def test_run_that_was_cut_off_ends_like_one_that_was_not(
    finished, tmp_path, cache, monkeypatch, owner, name, call
):
    reference, metrics = finished
    config = tiny(tmp_path / "run", cache)
    config = dataclasses.replace(
        config, folds=(0,), train=dataclasses.replace(config.train, checkpoint_every=1)
    )
    original, calls = getattr(owner, name), itertools.count(1)

    def cut_off(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut_off)
        with pytest.raises(Killed):
            cross_validation.run(config)
    again = cross_validation.run(config)
    rows = tuple(row for row in metrics.summary.metric_per_case if row.fold == 0)
    assert again.summary.metric_per_case == rows
    assert again.best_checkpoint[0] == metrics.best_checkpoint[0]
    for checkpoint in ("last", "best"):
        params = load_params(config.output, 0, checkpoint=checkpoint)
        before = load_params(reference.output, 0, checkpoint=checkpoint)
        assert cross_validation.weights_sha256(params) == cross_validation.weights_sha256(before)
    assert history(config.output) == history(reference.output)


def test_work_that_is_done_is_not_done_again(finished, tmp_path, cache, monkeypatch, capsys):
    config = dataclasses.replace(tiny(tmp_path / "run", cache), folds=(0,))
    shutil.copytree(finished[0].output, config.output)
    fold = config.output / "fold_0"
    (fold / "metrics.json").unlink()
    spoilt, *kept = sorted((fold / "masks").iterdir())
    spoilt.write_bytes(b"no mask")
    written = {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setattr(loop.loading, "train_batches", None)  # training would fail
    cross_validation.run(config)
    said = capsys.readouterr().out
    assert f"{len(kept)} of {len(kept) + 1} cases predicted before" in said
    assert "note: phantom holds synthetic images; what is learned is of no patient" in said
    assert {path: path.stat().st_mtime_ns for path in kept} == written
    assert nib.load(spoilt).header["descrip"].item().decode() == spoilt.name.split(".")[0]


def test_masks_of_other_weights_are_made_again(tmp_path):
    for kind in ("masks", "probabilities"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.nii.gz").write_bytes(b"1")
    folder, rows = run_folder.FoldFolder(tmp_path), (row_of("a", dice=0.5),)
    folder.store_case("a", "weights", rows, ("lesion",))
    assert folder.stored_rows("a", "weights") == rows
    assert folder.stored_rows("a", "others") is None
    (tmp_path / "masks" / "a.nii.gz").unlink()
    assert folder.stored_rows("a", "weights") is None


def test_step_that_is_not_finite_is_skipped_and_said(
    finished, tmp_path, cache, monkeypatch, capsys
):
    poisoned(monkeypatch, 1)
    config = dataclasses.replace(tiny(tmp_path / "run", cache), folds=(0,))
    metrics = cross_validation.run(config)
    assert metrics.fold_summaries[0].skipped_updates == 1
    assert "fold 0 (1 of 3): step 1: loss or gradient not finite, update skipped; cases p" in (
        capsys.readouterr().out
    )
    rows = history(config.output)
    assert rows[0]["loss"] == ""
    assert np.isfinite(float(rows[1]["loss"]))
    params = load_params(config.output, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_training_stops_when_nothing_is_finite_and_the_step_can_be_repeated(
    finished, tmp_path, cache, monkeypatch, capsys
):
    config = tiny(tmp_path / "run", cache)
    config = dataclasses.replace(
        config, folds=(0,), train=dataclasses.replace(config.train, max_skipped=2)
    )
    with monkeypatch.context() as patch:
        poisoned(patch, 1, 2)
        with pytest.raises(RunError, match="got 2 steps in a row"):
            cross_validation.run(config)
    file = config.output / "fold_0" / "not_finite_00000002.npz"
    recording = reproduce.read(file)
    assert recording.config == config
    assert recording.step == 2
    assert len(recording.case_ids) == 2
    capsys.readouterr()
    reproduce.main([str(file)])
    said = capsys.readouterr().out
    assert f"{recording.batch['image'][0].size} values not finite" in said
    assert said.endswith("reproduced\n")
    recording.batch["image"][:] = 0
    assert reproduce.repeat(recording)["skipped"] == 0
    assert cross_validation.run(config).folds_done == (0,)  # the step is not made again


@pytest.mark.slow
def test_a_single_step_that_is_not_finite_stops_where_none_may_be(
    finished, tmp_path, cache, monkeypatch
):
    config = tiny(tmp_path / "run", cache)
    config = dataclasses.replace(
        config, folds=(0,), train=dataclasses.replace(config.train, max_skipped=1)
    )
    with monkeypatch.context() as patch:
        poisoned(patch, 1)
        with pytest.raises(RunError, match="got 1 steps in a row"):
            cross_validation.run(config)
    recording = reproduce.read(config.output / "fold_0" / "not_finite_00000001.npz")
    assert recording.step == 1
    assert reproduce.repeat(recording)["skipped"] == 1
    (kept,) = (config.output / "fold_0" / "checkpoints" / "last").iterdir()
    assert int(kept.name) == 1  # the next step has not been made
    assert cross_validation.run(config).folds_done == (0,)


def test_recorded_step_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match="no file at"):
        reproduce.read(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", facts=np.array([{}], object))
    with pytest.raises(DataError, match="is a whole file of a stopped run"):
        reproduce.read(tmp_path / "a.npz")


def test_run_folder_in_use_is_refused(finished):
    config, _ = finished
    with (
        locked(config.output),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"),
    ):
        cross_validation.run(config)


def test_folder_of_a_run_killed_while_it_was_opened_is_taken(tmp_path, cache):
    for name in (".lock", "folds.json", ".config.json.123.tmp", "environment.json"):
        (tmp_path / name).write_text("", encoding="utf-8")
    run_folder.RunFolder(tmp_path).refuse_other(tiny(tmp_path, cache))


def test_damaged_file_of_a_run_is_named(tmp_path, cache):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"must be as it was written; .*config.json"):
        cross_validation.run(tiny(tmp_path, cache))


def test_names_in_file_headers_reach_no_artifact(finished, tmp_path, capsys):
    secret = "DOE^JANE"
    root = tmp_path / "data"
    for number in range(6):
        case = raw_case(f"case{number}", seed=number, positive=number % 2 == 0)
        data = write_folder(root, case)
        for path in (root / case.case_id).iterdir():
            image = nib.load(path)
            for field in ("descrip", "db_name", "intent_name", "aux_file"):
                image.header[field] = secret
            content = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
            comment = nib.nifti1.Nifti1Extension("comment", secret.encode())
            content.header.extensions.append(comment)
            nib.save(content, path)
    assert secret.encode() in gzip.decompress((root / "case0" / "t2w.nii.gz").read_bytes())
    config = tiny(tmp_path / "run", tmp_path / "cache")
    cross_validation.run(
        dataclasses.replace(
            config,
            folds=(0,),
            data=dataclasses.replace(data, preprocess=config.data.preprocess),
        )
    )
    said = capsys.readouterr()
    assert secret not in said.out + said.err
    for folder in (config.output, tmp_path / "cache"):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            if path.suffix == ".gz":
                content = gzip.decompress(content)
            assert secret.encode() not in content, path


def test_other_configuration_is_refused_with_the_difference(finished, cache):
    config, _ = finished
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    with pytest.raises(ConfigError, match=r"(?s)holds one configuration.*train.steps: 2 -> 3"):
        cross_validation.run(other)


def test_changed_data_are_refused(finished, tmp_path, cache):
    config, _ = finished
    copy = dataclasses.replace(config, output=tmp_path / "copy")
    shutil.copytree(config.output, copy.output)
    record = json.loads((copy.output / "config.json").read_text("utf-8"))
    record["data_fingerprint"] = "other"
    (copy.output / "config.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ConfigError, match="a run continues on the data and folds it began with"):
        cross_validation.run(copy)


def test_folder_with_other_files_is_refused(tmp_path, cache):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="must be new or hold a run"):
        cross_validation.run(tiny(tmp_path, cache))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_fewer_patients_than_folds_leaves_nothing_behind(tmp_path, cache):
    config = dataclasses.replace(tiny(tmp_path / "run", cache), num_folds=11)
    with pytest.raises(DataError, match="patients"):
        cross_validation.run(config)
    assert not (tmp_path / "run").exists()


def test_no_positive_case_is_refused(tmp_path, cache, monkeypatch):
    config = tiny(tmp_path / "run", cache)
    source = loading.build(config.data)
    source.info = tuple(dataclasses.replace(info, positive=False) for info in source.info)
    monkeypatch.setattr(loading, "open_source", lambda builder: source)
    with pytest.raises(DataError, match="at least one case must hold the target"):
        cross_validation.run(config)


def test_folds_file_with_another_number_of_folds_is_refused(tmp_path, cache):
    config = tiny(tmp_path / "run", cache)
    source = loading.build(config.data)
    ids = list(source.case_ids)
    patients = [info.patient_id for info in source.info]
    cut = next(i for i in range(5, 10) if patients[i] != patients[i - 1])
    halves = [
        {"train": ids[cut:], "val": ids[:cut]},
        {"train": ids[:cut], "val": ids[cut:]},
    ]
    file = tmp_path / "folds.json"
    file.write_text(json.dumps(halves), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"got 3 and 2. Use --num-folds=2"):
        cross_validation.run(dataclasses.replace(config, folds_file=file))


def test_centres_become_folds(tmp_path, cache):
    config = dataclasses.replace(tiny(tmp_path / "run", cache), group_by="center", num_folds=2)
    source = loading.build(config.data)
    source.info = tuple(
        dataclasses.replace(info, metadata={"center": "AB"[i % 2]})
        for i, info in enumerate(source.info)
    )
    folds = cross_validation.make_folds(config, source)
    assert [len(ids) for ids in folds.validation] == [5, 5]
    assert cross_validation.folds_in_words(config, folds, 10) == "2 folds by center (A, B)"
    drawn = dataclasses.replace(config, group_by=None)
    folds = cross_validation.make_folds(drawn, source)
    assert cross_validation.folds_in_words(drawn, folds, 10) == "2 folds over patients"
    words = cross_validation.folds_in_words(drawn, folds, 12)
    assert words == "2 folds over patients, 2 cases in no fold"
    with pytest.raises(ConfigError, match=r"that of groups; got 3 and 2. Use --num-folds=2"):
        cross_validation.make_folds(dataclasses.replace(config, num_folds=3), source)
    with pytest.raises(ConfigError, match="from a file or from groups; got both"):
        cross_validation.make_folds(dataclasses.replace(config, folds_file=tmp_path), source)


@pytest.mark.slow
def test_one_modality_two_classes_and_slices_run(tmp_path, cache, capsys):
    config = tiny(tmp_path / "run", cache, modalities=("t2w",), target="zones")
    flat = dataclasses.replace(ENCODER, kernels=((3, 3), (3, 3)), strides=((1, 1), (2, 2)))
    config = dataclasses.replace(
        config,
        folds=(0,),
        network=dataclasses.replace(config.network, encoder=flat),
        train=dataclasses.replace(config.train, crop=(1, 32, 32)),
    )
    metrics = cross_validation.run(complete(config))
    assert {row.name for row in metrics.summary.metric_per_case} == {"pz", "tz"}
    baseline = metrics.baseline_mean_shape
    assert baseline.mean_dice > 0.1
    measured = [row for row in metrics.summary.metric_per_case if row.dice is not None]
    assert baseline.num_cases == len(measured), "of the same fold alone"
    said = capsys.readouterr().out
    assert "note: There is no cross-modal distillation, as t2w is the only modality." in said


def test_fold_that_finds_nothing_anywhere_is_told_with_a_remedy():
    def rows(*found):
        return [
            row_of("a", dice=0.5 if positive else None, predicted_ml=volume)
            for positive, volume in found
        ]

    assert cross_validation.outcome(rows((True, 1.0), (False, 0.0))) == "Dice 0.500 over 1"
    assert cross_validation.outcome(rows((True, 0.0), (False, 0.2))) == "Dice 0.500 over 1"
    assert cross_validation.outcome(rows((False, 0.0))) == "no positive case, no Dice"
    said = cross_validation.outcome(rows((True, 0.0), (True, 0.0)))
    assert "no voxel of any case is found" in said
    assert "--train.optimizer.learning-rate" in said


def test_mask_of_one_and_of_several_classes():
    assert to_mask(np.array([[0.4], [0.6]]), 0.5).tolist() == [0, 1]
    assert to_mask(np.array([[0.5, 0.2, 0.3], [0.1, 0.2, 0.7]]), 0.5).tolist() == [0, 2]


def test_mistake_on_the_command_line_has_no_traceback(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.cv",
            "--data.name=picai",
            f"--data.path={tmp_path / 'nowhere'}",
            f"--output={tmp_path / 'run'}",
        ],
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_pooling_averages_blocks_and_the_remainder():
    image = np.arange(35.0).reshape(5, 7)
    pooled = figures.mean_pool(image, largest=4)
    assert pooled.shape == (3, 4)
    assert pooled[0, 0] == image[:2, :2].mean()
    assert pooled[2, 3] == image[4, 6]
    np.testing.assert_array_equal(figures.mean_pool(image[..., None], largest=4)[..., 0], pooled)
    np.testing.assert_array_equal(figures.mean_pool(image), image)
