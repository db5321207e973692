"""Where attention lies: by hand, and of runs with random weights against the network itself."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmsad_jax.modules import CMSAD
from cmsad_jax.modules.network import apply
from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.serving import loading, splits
from experiments import attention
from experiments.prediction.windows import scaled_image
from experiments.studies import revisit
from experiments.training.checkpoints import load_params
from tests import oracles
from tests.experiments.untrained_run import make_untrained_run, revisitable, tiny_config

QUARTERS = np.array([[[4.0, 2.0], [1.0, 1.0]]])
FIRST = np.array([[[True, False], [False, False]]])


def test_measures_by_hand():
    assert attention.lift(QUARTERS, FIRST) == 2
    assert attention.lift(QUARTERS, ~FIRST) == pytest.approx(2 / 3)
    assert attention.auroc(QUARTERS, FIRST) == 1
    assert attention.auroc(QUARTERS, ~FIRST) == 0
    assert attention.auroc(QUARTERS, np.array([[[False, True], [True, False]]])) == 3 / 8
    assert attention.variation(QUARTERS) == pytest.approx(np.sqrt(1.5) / 2)
    assert attention.distance(QUARTERS, QUARTERS) == 0
    assert attention.distance(QUARTERS, 7 * QUARTERS) == pytest.approx(0)
    assert attention.distance(1.0 * FIRST, 1.0 * ~FIRST) == pytest.approx(2)


def test_no_attention_is_no_focus():
    nothing = np.zeros((1, 2, 2))
    assert attention.lift(nothing, FIRST) == 1
    assert attention.auroc(nothing, FIRST) == 0.5
    assert attention.variation(nothing) == 0
    assert attention.distance(nothing, nothing) == 0


def test_spread_is_the_mean_over_all_pairs_of_patients():
    rng = np.random.default_rng(0)
    maps, others = rng.random((5, 2, 3, 4)), rng.random((2, 2, 3, 4))
    first, second = attention.Spread(), attention.Spread()
    for i, q in enumerate(maps):
        first.add(f"patient{i}", q)
        first.add(f"patient{i}", rng.random(q.shape))  # another visit
    for i, q in enumerate(others):
        second.add(f"other{i}", 1000 * q)
    pairs = [*itertools.combinations(maps, 2), tuple(others)]
    expected = np.mean([attention.distance(*pair) for pair in pairs])
    assert attention.mean_distance([first, second]) == pytest.approx(expected)
    one = attention.Spread()
    one.add("alone", maps[0])
    assert attention.mean_distance([one]) is None
    same = attention.Spread()
    same.add("a", maps[0])
    same.add("b", 3 * maps[0])
    assert attention.mean_distance([same]) == pytest.approx(0, abs=1e-12)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """One window covers the grid, so that the network itself gives the whole map."""
    config = tiny_config()
    preprocess = dataclasses.replace(config.data.preprocess, spacing_mm=(6.0, 6.0, 6.0))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            target="gland",
            phantom=PhantomOptions(num_cases=4),
            preprocess=preprocess,
            cache=tmp_path_factory.mktemp("cache"),
        ),
        train=dataclasses.replace(config.train, crop=config.data.preprocess.size),
        predict=dataclasses.replace(config.predict, flip=False),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("runs") / "a"
    make_untrained_run(folder, config)
    return revisitable(folder, loading.build(config.data))


def test_command_measures_every_modality_and_stage(run, config, tmp_path, capsys):
    file = tmp_path / "out.json"
    attention.main([str(run), "--accelerator=cpu", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "only 4 positive patients" in printed
    record = json.loads(file.read_text("utf-8"))
    assert [(row["modality"], row["stage"]) for row in record["focus"]] == [
        ("t2w", 0),
        ("t2w", 1),
        ("adc", 0),
        ("adc", 1),
    ]
    source, network = loading.build(config.data), CMSAD(config.network)
    features = jax.jit(lambda params, x: apply(network, params, x).features)
    lifts, distances, maps = [], [], {}
    for fold, case_ids in enumerate(splits.Folds.load(run / "folds.json").validation):
        params = load_params(run, fold)
        for case_id in case_ids:
            case = source[case_id]
            found = features(params, jnp.asarray(scaled_image(case))[None])
            t2w, adc = (oracles.attention_energy(found[name][0])[0] for name in ("t2w", "adc"))
            maps.setdefault(fold, []).append((t2w, adc))
            target = case.label > 0
            lifts.append(t2w[target].mean() / t2w.mean())
            unit = [q / np.linalg.norm(q) for q in (t2w, adc)]
            distances.append(2 - 2 * (unit[0] * unit[1]).sum())
        maps[fold] = [*zip(*maps[fold], strict=True)]
    for m, row in enumerate((0, 2)):
        spread = np.mean(
            [
                attention.distance(*pair)
                for of_fold in maps.values()
                for pair in itertools.combinations(of_fold[m], 2)
            ]
        )
        assert record["focus"][row]["between_patients"] == pytest.approx(spread, rel=1e-4)
        assert record["focus"][row]["before_training"] > 0
        assert isinstance(record["focus"][row]["collapsed"], bool)
    assert len(lifts) == record["focus"][0]["num_cases"] == 4
    assert record["focus"][0]["lift"] == pytest.approx(np.mean(lifts), rel=1e-4)
    (of_stage_0, of_stage_1) = record["agreement"]
    assert of_stage_0["modalities"] == ["t2w", "adc"]
    assert of_stage_0["distance"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert f"| {run} | t2w and adc | 1 | 4 | {of_stage_1['distance']:.3f} |" in printed


@pytest.mark.parametrize(("own", "collapsed"), [(0.02, True), (0.8, False)])
def test_maps_that_hardly_depend_on_the_patient_have_collapsed(
    run, monkeypatch, capsys, own, collapsed
):
    rng = np.random.default_rng(0)
    pattern, turns = rng.random((6, 16, 16, 4)), itertools.cycle([own, 1.0])

    def made(program, params, case, config, num_outputs):
        share = next(turns)  # of the trained network, then of the untrained one
        shape = (*case.label.shape, num_outputs)
        return (1 - share) * np.resize(pattern, shape) + share * rng.random(shape)

    monkeypatch.setattr(attention, "through_windows", made)
    focus, _ = attention.measure(run, "cpu")
    assert {row.collapsed for row in focus} == {collapsed}
    assert all(0 < row.between_patients < row.before_training for row in focus)
    monkeypatch.setattr(attention, "measure", lambda *_: (focus, []))
    attention.main([str(run), "--accelerator=cpu"])
    assert ("| collapsed |" in capsys.readouterr().out) == collapsed


def test_what_has_no_attention_is_refused(run, config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="at least one run must be given"):
        attention.main([])
    fusion = dataclasses.replace(config.network.fusion, kind="early")
    network = dataclasses.replace(config.network, fusion=fusion)
    make_untrained_run(tmp_path / "early", dataclasses.replace(config, network=network))
    with pytest.raises(ConfigError, match=r"an encoder for each modality; .* has fusion early"):
        attention.main([str(tmp_path / "early")])
    monkeypatch.setattr(revisit.FinishedRun, "cases", lambda run, devices: iter(()))
    with pytest.raises(DataError, match=r"must have both target and background; of .* none has"):
        attention.main([str(run), "--accelerator=cpu"])
