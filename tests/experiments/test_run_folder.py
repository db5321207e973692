"""What is read again: runs of every schema, and what is refused with a way out."""

import ast
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

import experiments
from data_pipelines.faults import DataError
from data_pipelines.serving.splits import Folds
from experiments import compare, reproduce
from experiments.exporting import artifact
from experiments.measuring.masks import Metric
from experiments.measuring.mean_shape import MeanShape
from experiments.measuring.metrics import METRICS
from experiments.measuring.summary import summarise
from experiments.prediction.outputs import PredictionFolder, Settings
from experiments.process.storage import file_sha256
from experiments.reporting.page import write_report
from experiments.run_folder import SCHEMA, FoldResults, RunFolder, fold_title
from experiments.settings.command_line import complete
from experiments.settings.config import Config
from experiments.studies import cross_validation
from tests.experiments.fake_run import make_run

GOLDEN = Path(__file__).with_name("golden")
SCHEMAS = range(1, SCHEMA + 1)


@pytest.fixture(params=SCHEMAS)
def golden(request, tmp_path):
    """What an earlier version, or this one, left: a run, predictions, a step to repeat."""
    with tarfile.open(GOLDEN / f"run_{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def edit(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_every_schema_has_its_golden_run():
    assert {path.name for path in GOLDEN.iterdir()} == {f"run_{n}.tar.xz" for n in SCHEMAS}


def test_a_golden_run_is_read_whole(golden):
    run = RunFolder(golden / "run")
    results, config = run.read_results(), run.read_config()
    assert (results.target, results.classes, results.threshold) == ("lesion", ("lesion",), 0.5)
    assert results.folds_done == (0, 1, 2) == tuple(run.members(config, None))
    assert results.summary.num_cases == 10
    assert results.summary.num_defined["lesion"]["dice"] == 3
    assert summarise(results.summary.metric_per_case, results.folds_done) == results.summary
    assert results.baseline_mean_shape.num_cases == 3
    assert config.train.steps == 2
    assert len(run.read_record().data_fingerprint) == 64
    assert run.read_environment().versions["jax"]
    assert [fold for fold, _ in run.begun()] == [0, 1, 2]
    folds = run.read_folds()
    for fold in range(3):
        of_fold = run.fold(fold).read_results()
        assert of_fold.summary == results.fold_summaries[fold]
        assert [row.case_id for row in of_fold.metric_per_case] == list(folds.validation[fold])
        for case_id in folds.validation[fold]:
            record = run.fold(fold).read_case(case_id)
            assert record.rows == tuple(
                row for row in of_fold.metric_per_case if row.case_id == case_id
            )
            mask = f"masks/{case_id}.nii.gz"
            assert record.files[mask] == file_sha256(run.fold(fold).mask(case_id))
            assert run.fold(fold).stored_rows(case_id, "other weights") is None


def test_a_golden_run_is_reported_compared_and_exported(golden, capsys):
    run = RunFolder(golden / "run")
    before = run.table.read_text("utf-8")
    text = write_report(run).with_suffix(".md").read_text("utf-8")
    summary = run.read_results().summary
    assert f"| Dice | {summary.mean['lesion']['dice']:.3f} |" in text
    assert "All 3 folds are done." in text
    assert "| Fold 2 | 3 |" in text
    compare.main([str(run.path), str(run.path)])
    assert "+0.0000" in capsys.readouterr().out
    figures = artifact.figures(run.read_results(), range(3))
    assert figures["mean"]["lesion"]["dice"] == summary.mean["lesion"]["dice"]
    run.write_results(run.read_results())
    assert run.table.read_text("utf-8") == before
    assert json.loads(run.metrics.read_text("utf-8"))["schema"] == SCHEMA


def test_golden_predictions_and_a_golden_step_are_read(golden):
    predictions = PredictionFolder(golden).read()
    a, b = predictions.cases
    assert a.modalities == ("t2w", "adc")
    assert a.highest_probability["lesion"] > 0.5
    assert "must be a readable image" in b.error
    assert predictions.facts.model.members == ("fold_0", "fold_1")
    assert predictions.facts.settings == Settings(0.5, 0.5, True, 1)
    assert PredictionFolder(golden).earlier(predictions.facts) == predictions
    recording = reproduce.read(golden / "not_finite_00000002.npz")
    assert (recording.fold, recording.step, len(recording.case_ids)) == (0, 2, 2)
    assert recording.config.data.phantom.num_cases == 10
    assert recording.batch["key"].shape == (2, 2)


def test_candidates_of_the_first_schema_are_not_taken_for_those_of_today(tmp_path):
    with tarfile.open(GOLDEN / "run_1.tar.xz") as archive:
        archive.extract("predictions.json", tmp_path, filter="data")
    edit(tmp_path / "predictions.json", lambda content: content.update(complete=False))
    predictions = PredictionFolder(tmp_path).read()
    assert [case.candidates for case in predictions.cases] == [None, None]
    assert predictions.complete, "an interrupted command begins anew"


FILES = {
    "config.json": lambda root: RunFolder(root / "run").read_config(),
    "environment.json": lambda root: RunFolder(root / "run").read_environment(),
    "folds.json": lambda root: RunFolder(root / "run").read_folds(),
    "metrics.json": lambda root: RunFolder(root / "run").read_results(),
    "fold_1/metrics.json": lambda root: RunFolder(root / "run").fold(1).read_results(),
    "fold_1/cases/{case}.json": lambda root: RunFolder(root / "run").fold(1).read_case(case(root)),
    "../predictions.json": lambda root: PredictionFolder(root).read(),
}


def case(root):
    return RunFolder(root / "run").read_folds().validation[1][0]


@pytest.mark.parametrize("name", FILES)
def test_files_of_later_versions_are_refused(golden, name):
    file = golden / "run" / (name.format(case=case(golden)) if "{case}" in name else name)
    edit(file, lambda content: content.update(schema=99))
    with pytest.raises(DataError, match=r"has 99\. Use the version of cmsad-jax that wrote it"):
        FILES[name](golden)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("metrics.json", "num_missed"),
        ("fold_1/metrics.json", "summary"),
        ("fold_1/cases/{case}.json", "weights"),
        ("../predictions.json", "model"),
        ("config.json", "config"),
    ],
)
def test_files_that_lack_something_are_refused(golden, name, key):
    file = golden / "run" / name.format(case=case(golden))
    edit(file, lambda content: content.pop(key))
    message = rf"must be as it was written; .* has no '(model|{key}|sha256)'\. Restore it"
    with pytest.raises(DataError, match=message):
        FILES[name](golden)


def test_a_step_of_a_later_version_is_refused(golden):
    file = golden / "not_finite_00000002.npz"
    with np.load(file) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    facts = json.loads(str(held.pop("facts"))) | {"schema": 99}
    np.savez(file, allow_pickle=False, facts=json.dumps(facts), **held)
    with pytest.raises(DataError, match=r"has 99\. Use the version of cmsad-jax"):
        reproduce.read(file)


def test_a_fold_measured_without_a_metric_is_refused_before_training(golden, monkeypatch):
    run = RunFolder(golden / "run")
    config, folds = run.read_config(), run.read_folds()

    class Source:
        fingerprint = run.read_record().data_fingerprint
        info = ()

    run.open(config, Source(), folds)
    monkeypatch.setitem(METRICS, "tubes", counted())
    with pytest.raises(DataError, match=r"fold_0.metrics\.json: every row .* without tubes"):
        run.open(config, Source(), folds)
    record = run.fold(0).path / "cases"
    assert all(run.fold(0).stored_rows(file.stem, "any") is None for file in record.iterdir())


def counted():
    return Metric(
        "tubes",
        "Tubes",
        lambda masks: float(masks.num_predicted) if masks.num_truth else None,
        "number of voxels of P",
        "T is empty",
        "Tb.",
        "voxels",
        1,
        per_fold=True,
        headline=True,
    )


def test_a_metric_is_added_in_one_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METRICS, "tubes", counted())
    run = RunFolder(make_run(tmp_path / "run", num_folds=2, history=False))
    results = run.read_results()
    for fold, summary in results.fold_summaries.items():
        rows = tuple(row for row in results.summary.metric_per_case if row.fold == fold)
        run.fold(fold).write_results(FoldResults(rows, summary))
    config = complete(Config(num_folds=2, output=run.path))
    found = cross_validation.finish(config, run, MeanShape(0.1, 6))
    mean = found.summary.mean["lesion"]["tubes"]
    assert mean == np.mean(
        [row.metrics["tubes"] for row in found.summary.metric_per_case if row.positive]
    )
    assert f"tubes                      {mean:>9.3f}" in capsys.readouterr().out
    header, *lines = run.table.read_text("utf-8").splitlines()
    assert header.endswith(",volume_predicted_ml,tubes")
    assert float(lines[1].split(",")[-1]) == found.summary.metric_per_case[1].metrics["tubes"]
    text, page = (path.read_text("utf-8") for path in (run.report_markdown, run.report_html))
    assert f"| Tubes (voxels) | {mean:.1f} |" in text
    assert text.count("| Tb. (voxels) |") == 2  # fold by fold, case by case
    assert "<small>Mean lesion Tubes (voxels)</small>" in page
    assert artifact.figures(run.read_results(), range(2))["mean"]["lesion"]["tubes"] == mean


NAMES = re.compile(
    r"fold_(\d*|\*)$|(metrics|folds|config|environment|predictions)\.json$|(metrics|history)\.csv$"
    r"|report\.(html|md)$|not_finite_$|masks$|probabilities$|checkpoints$|tensorboard$|figures$"
)
OWNERS = {"run_folder.py", "prediction/outputs.py"}


def strings(file):
    """Texts in a file that are no documentation, of f-strings the fixed parts."""
    tree = ast.parse(file.read_text("utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if text and id(node) not in documentation:
            yield node.value


def test_no_other_file_names_what_lies_in_a_run_folder():
    root = Path(experiments.__file__).parent
    found = {
        (str(file.relative_to(root)), text)
        for file in root.rglob("*.py")
        if str(file.relative_to(root)) not in OWNERS
        for text in strings(file)
        if NAMES.match(text)
    }
    a_word_in_names_of_labels = ("prediction/inputs.py", "masks")
    assert found == {a_word_in_names_of_labels}


def test_folds_are_counted_from_0_as_their_folders_are(tmp_path):
    assert fold_title(0, 5) == "fold 0 (1 of 5)"
    assert RunFolder(tmp_path).fold(0).path.name == "fold_0"


def test_published_folds_carry_no_number_and_later_ones_are_refused(tmp_path):
    folds = Folds((("a",), ("b",)))
    folds.save(tmp_path / "folds.json")
    assert Folds.load(tmp_path / "folds.json") == folds
    edit(tmp_path / "folds.json", lambda content: content.pop("schema"))
    assert Folds.load(tmp_path / "folds.json") == folds
    edit(tmp_path / "folds.json", lambda content: content.update(schema="new"))
    with pytest.raises(DataError, match=r"fold files of schema 3 and before .* has 'new'\. Use"):
        Folds.load(tmp_path / "folds.json")


def test_a_report_of_earlier_results_is_none_of_these(tmp_path):
    """As a kill between results and report leaves it: what is done is then reported again."""
    run = RunFolder(make_run(tmp_path / "run", num_folds=2, figures=False))
    assert not run.is_reported
    write_report(run)
    assert run.is_reported
    later = run.report_html.stat().st_mtime_ns + 10**9
    os.utime(run.metrics, ns=(later, later))
    assert not run.is_reported
    earlier = later - 2 * 10**9
    os.utime(run.metrics, ns=(earlier, earlier))
    assert run.is_reported
