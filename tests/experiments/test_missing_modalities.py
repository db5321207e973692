"""What the lack of a modality costs, of runs with random weights and of Dice given by hand."""

import dataclasses
import json
import runpy
import sys

import jax
import numpy as np
import pytest

from cmsad_jax.types import ConfigError
from data_pipelines.case import spacing_of
from data_pipelines.faults import DataError
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.preparing import preprocessing
from data_pipelines.serving import loading, splits
from experiments import missing_modalities
from experiments.measuring.metrics import case_metrics, to_mask
from experiments.prediction.windows import predict_case
from experiments.training.checkpoints import load_params
from experiments.training.programs import compile_programs
from tests.experiments.untrained_run import make_untrained_run, revisitable, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_config()
    data = dataclasses.replace(
        config.data,
        target="gland",
        phantom=PhantomOptions(num_cases=4),
        cache=tmp_path_factory.mktemp("cache"),
    )
    sliding = dataclasses.replace(config.predict, overlap=0.0, flip=False)
    return dataclasses.replace(config, data=data, predict=sliding)


@pytest.fixture(scope="module")
def source(config):
    return loading.build(config.data)


@pytest.fixture(scope="module", autouse=True)
def programs(config):
    """Compiled once for all runs of this module."""
    kept = compile_programs(config, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(missing_modalities, "compile_programs", lambda config, devices: kept)
        yield kept


def make_run(folder, config, source, **options):
    make_untrained_run(folder, config, **options)
    return revisitable(folder, source)


@pytest.fixture(scope="module")
def run(tmp_path_factory, config, source):
    return make_run(tmp_path_factory.mktemp("runs") / "a", config, source)


def test_each_case_is_predicted_by_its_own_fold_without_each_modality(
    run, config, source, programs
):
    dice, patients = missing_modalities.measure(run, "cpu")
    assert dice.keys() == {(name, "gland") for name in ("nothing", "t2w", "adc")}
    assert patients == {info.case_id: info.patient_id for info in source.info}
    folds = splits.Folds.load(run / "folds.json")
    for fold, case_ids in enumerate(folds.validation):
        params = load_params(run, fold)
        for case_id in case_ids:
            case = source[case_id]
            for channel, without in ((None, "nothing"), (0, "t2w"), (1, "adc")):
                present, image = np.ones(2, bool), case.image.copy()
                if channel is not None:
                    present[channel], image[..., channel] = False, 0
                poorer = dataclasses.replace(case, image=image, present=present)
                probability = preprocessing.to_original(
                    predict_case(programs.predict, params, poorer, config), case
                )
                measured = case_metrics(
                    to_mask(probability, 0.5),
                    case.original_truth,
                    spacing_of(case.original_affine),
                    ("gland",),
                )
                expected = measured["gland"]["dice"]
                assert dice[without, "gland"][case_id] == pytest.approx(expected, abs=1e-6)
    means = [np.mean([*values.values()]) for values in dice.values()]
    assert len(set(np.round(means, 4))) == 3, "each modality matters to this network"


@pytest.mark.slow
def test_command_compares_two_runs_and_writes_json(run, config, source, tmp_path, capsys):
    other = make_run(
        tmp_path / "b",
        dataclasses.replace(config, train=dataclasses.replace(config.train, modality_dropout=0.2)),
        source,
    )
    for fold in (0, 1):  # the same weights: no difference
        (other / f"fold_{fold}/checkpoints").rename(tmp_path / f"old_{fold}")
        (other / f"fold_{fold}/checkpoints").symlink_to(run / f"fold_{fold}/checkpoints")
    file = tmp_path / "out.json"
    missing_modalities.main([str(run), str(other), "--accelerator=cpu", "--json", str(file)])
    printed = capsys.readouterr().out
    assert f"| {run} | nothing | gland | 4 |" in printed
    assert f"| {run} - {other} | adc | gland | 4 | +0.000 | +0.000 to +0.000 | 1 | 1 |" in printed
    assert "only 4 positive patients" in printed
    record = json.loads(file.read_text("utf-8"))
    assert [row["without"] for row in record["dice"]] == ["nothing", "t2w", "adc"] * 2
    assert [row["difference"] for row in record["differences"]] == [0, 0]


PATIENTS = {"p": "p", "q": "q", "r": "r"}
HARDY = {
    ("nothing", "x"): {"p": 0.8, "q": 0.7, "r": 0.6},
    ("adc", "x"): {"p": 0.7, "q": 0.6, "r": 0.5},
}
FRAIL = {
    ("nothing", "x"): {"p": 0.9, "q": 0.8, "r": 0.6},
    ("adc", "x"): {"p": 0.4, "q": 0.4, "r": 0.3},
}


def test_loss_is_paired_with_all_modalities():
    everything, adc = missing_modalities.summarise("frail", FRAIL, PATIENTS)
    assert everything.loss is everything.loss_interval is None
    assert everything.dice == pytest.approx(2.3 / 3)
    assert adc.dice == pytest.approx(1.1 / 3)
    assert adc.loss == pytest.approx(0.4)
    assert adc.loss_interval == pytest.approx((0.3, 0.5))


def test_losses_of_two_runs_are_paired_on_cases():
    (row,) = missing_modalities.compare_losses("hardy", HARDY, "frail", FRAIL, PATIENTS)
    assert row.difference == pytest.approx(-0.3)
    assert row.interval == pytest.approx((-0.4, -0.2))
    assert row.p == 0.25  # 2 / 2 ** 3: all three signs alike
    one = {key: {"p": values["p"]} for key, values in HARDY.items()}
    (alone,) = missing_modalities.compare_losses("one", one, "one", one, PATIENTS)
    assert alone.interval is alone.p is alone.corrected_p is None
    assert "| one - one | adc | x | 1 | +0.000 |  |  |  |" in missing_modalities.format_table(
        missing_modalities.summarise("one", one, PATIENTS), [alone]
    )


def test_what_a_case_lacks_is_not_withheld(source):
    case = source[source.case_ids[0]]
    both = dict(missing_modalities.withheld(case, ("t2w", "adc")))
    assert {name: poorer.present.tolist() for name, poorer in both.items()} == {
        "nothing": [True, True],
        "t2w": [False, True],
        "adc": [True, False],
    }
    alone = dataclasses.replace(case, present=np.array([True, False]))
    assert [name for name, _ in missing_modalities.withheld(alone, ("t2w", "adc"))] == ["nothing"]


def test_runs_that_cannot_be_evaluated_are_refused(run, config, source, tmp_path):
    with pytest.raises(ConfigError, match="at least one run must be given"):
        missing_modalities.main([])
    with pytest.raises(ConfigError, match=r"must hold config\.json"):
        missing_modalities.main([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"every fold must be done; .* lacks 1"):
        missing_modalities.main([str(make_run(tmp_path / "half", config, source, done=1))])
    fewer = {key: {"p": 0.5} for key in HARDY}
    with pytest.raises(DataError, match="same modalities, classes and positive cases; those of a"):
        missing_modalities.compare_losses("a", HARDY, "b", fewer, PATIENTS)

    def changed(name, change):
        folder = tmp_path / name
        folder.mkdir()
        for path in run.iterdir():
            (folder / path.name).symlink_to(path)
        record = json.loads((run / "config.json").read_text("utf-8"))
        change(record)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
        return str(folder)

    def single(record):
        record["config"]["data"]["modalities"] = ["t2w"]

    def other_data(record):
        record["data_fingerprint"] = "0123"

    with pytest.raises(ConfigError, match=r"two modalities or more to do without one; .* has t2w"):
        missing_modalities.main([changed("single", single)])
    with pytest.raises(DataError, match="got others from phantom"):
        missing_modalities.main([changed("data", other_data)])
    negative = tmp_path / "negative"
    changed("negative", lambda record: None)
    (negative / "folds.json").unlink()
    splits.Folds((("x",), ("y",))).save(negative / "folds.json")
    with pytest.raises(DataError, match="at least one case must be positive"):
        missing_modalities.main([str(negative)])


def test_former_name_warns_and_does_the_same(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["experiments.missing", "--help"])
    monkeypatch.delitem(sys.modules, "experiments.missing_modalities")
    with pytest.warns(FutureWarning, match="experiments.missing_modalities"):
        runpy.run_module("experiments.missing", run_name="__main__")
    assert "usage: python -m experiments.missing_modalities" in capsys.readouterr().out
