"""One run arranged otherwise: several steps in a call, folds side by side, two processes."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from cmsad_jax.modules import FusionConfig
from cmsad_jax.training import LossConfig
from experiments.process.console import RunError
from experiments.process.signals import Interrupted, Stop
from experiments.run_folder import RunFolder
from experiments.settings.config import Config, PredictConfig
from experiments.studies import cross_validation
from experiments.training.checkpoints import load_params
from experiments.training.programs import compile_programs
from tests.experiments.tiny_run import history, poisoned, shared_programs, tiny
from tests.processes import start_two


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    with shared_programs():
        yield


def plain(output: Path, cache: Path) -> Config:
    """One fold of the network that compiles fastest."""
    config = tiny(output, cache)
    network = dataclasses.replace(config.network, fusion=FusionConfig(kind="early"))
    return dataclasses.replace(
        config,
        folds=(0,),
        network=network,
        loss=LossConfig(cross_modal_weight=0.0, self_weight=0.0, label_weight=0.0),
        predict=PredictConfig(figures=0, flip=False),
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """``plain`` in one process, one step a call."""
    config = plain(tmp_path_factory.mktemp("runs") / "alone", cache)
    cross_validation.run(config)
    return config


@pytest.mark.slow
def test_several_steps_in_a_call_give_the_same_losses(alone, tmp_path, cache, capsys):
    config = plain(tmp_path / "run", cache)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, residency="device"))
    train = dataclasses.replace(config.train, steps_per_call=2)
    cross_validation.run(dataclasses.replace(config, train=train))
    said = capsys.readouterr().out
    said_once = "cases resident on the device: 0.00 GB of cases, as asked for; 2 steps in each call"
    assert said.count(said_once) == 1
    before, after = history(alone.output), history(config.output)
    assert [row["step"] for row in after] == ["1", "2"]
    for one, other in zip(before, after, strict=True):
        for name in one.keys() - {"validation_dice"}:  # the same sums in another program
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-3, abs=1e-5)


def both(output: Path, cache: Path, **options) -> Config:
    """The folds 0 and 1 of ``plain``, side by side where nothing else is said."""
    config = plain(output, cache)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **options))
    return dataclasses.replace(config, folds=(0, 1), folds_at_once=2)


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory, cache):
    """Folds 0 and 1 of ``plain`` in one program, with a checkpoint after each step."""
    config = both(tmp_path_factory.mktemp("runs") / "side_by_side", cache, checkpoint_every=1)
    cross_validation.run(config)
    return config


def weights(config: Config, fold: int):
    """What a fold is evaluated with, as one array."""
    leaves = jax.tree.leaves(load_params(config.output, fold))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def assert_same_folds(one: Config, other: Config) -> None:
    """Equal but for the order of float32 sums.

    Losses and norms as in tests/test_parallel.py; AdamW divides by small moments, so that a weight
    with next to no gradient may go another way: together they differ by little of their move.
    """
    fresh = compile_programs(one, jax.devices()[:1]).init
    for fold in (0, 1):
        for row, same in zip(history(one.output, fold), history(other.output, fold), strict=True):
            for name in row.keys() - {"validation_dice"}:
                assert float(same[name]) == pytest.approx(float(row[name]), rel=1e-3, abs=1e-5)
        key = jax.random.fold_in(jax.random.key(one.seed), fold)
        before = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(fresh(key).params)])
        move = np.linalg.norm(weights(one, fold) - before)
        difference = np.linalg.norm(weights(one, fold) - weights(other, fold))
        assert difference < 1e-3 * move  # 1e-6 was found
        names = [
            sorted(
                str(path.relative_to(config.output))
                for kind in (".", "cases", "masks", "probabilities", "checkpoints")
                for path in (config.output / f"fold_{fold}" / kind).iterdir()
            )
            for config in (one, other)
        ]
        assert names[0] == names[1]


@pytest.mark.slow
def test_folds_side_by_side_are_those_in_turn(alone, side_by_side):
    in_turn = dataclasses.replace(alone, folds=(0, 1))
    metrics = cross_validation.run(in_turn)
    assert_same_folds(in_turn, side_by_side)
    found = RunFolder(side_by_side.output).read_results()
    assert found.folds_done == metrics.folds_done == (0, 1)
    for summary in found.fold_summaries.values():
        assert summary.folds_side_by_side == 2
    rows = (results.summary.metric_per_case for results in (metrics, found))
    for row, same in zip(*rows, strict=True):
        assert (row.case_id, row.fold) == (same.case_id, same.fold)
        assert same.dice == pytest.approx(row.dice, abs=1e-3)
        assert same.volume_predicted_ml == pytest.approx(row.volume_predicted_ml, rel=1e-3)


@pytest.mark.slow
def test_folds_stopped_side_by_side_go_on_side_by_side_or_in_turn(
    side_by_side, tmp_path, cache, monkeypatch, capsys
):
    def told(stop):
        stop.number = signal.SIGTERM
        return True

    config = both(tmp_path / "run", cache)
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "after_step", told)
        with pytest.raises(Interrupted):
            cross_validation.run(config)
    said = capsys.readouterr().out
    for fold in ("fold 0 (1 of 3)", "fold 1 (2 of 3)"):
        assert f"{fold}: saved after step 1 of 2" in said
    in_turn = dataclasses.replace(config, output=tmp_path / "in_turn", folds_at_once=1)
    shutil.copytree(config.output, in_turn.output)
    for again in (config, in_turn):
        again = dataclasses.replace(
            again, train=dataclasses.replace(again.train, checkpoint_every=1)
        )
        cross_validation.run(again)
    assert capsys.readouterr().out.count("going on after step 1 of 2") == 4
    for fold in (0, 1):
        np.testing.assert_array_equal(weights(config, fold), weights(side_by_side, fold))
        assert history(config.output, fold) == history(side_by_side.output, fold)
    assert_same_folds(side_by_side, in_turn)


@pytest.mark.slow
def test_a_fold_that_is_stuck_leaves_those_beside_it_as_they_were(
    side_by_side, tmp_path, cache, monkeypatch
):
    config = both(tmp_path / "run", cache, max_skipped=2)
    with monkeypatch.context() as patch:
        poisoned(patch, 1, 2, calls=1)
        with pytest.raises(RunError, match="got 2 steps in a row of fold 0 that"):
            cross_validation.run(config)
    assert (config.output / "fold_0" / "not_finite_00000002.npz").exists()
    assert not (config.output / "fold_1" / "not_finite_00000002.npz").exists()
    np.testing.assert_array_equal(weights(config, 1), weights(side_by_side, 1))
    assert cross_validation.run(config).folds_done == (0, 1)


ONE_OF_TWO = """
import sys
from pathlib import Path
from experiments.process import hosts
from experiments.settings.config import DistributedConfig
from experiments.studies import cross_validation
from tests.experiments.test_cv_arrangements import plain

process, port, output, cache = int(sys.argv[1]), *sys.argv[2:]
hosts.join(DistributedConfig("auto", f"127.0.0.1:{port}", 2, process))
results = cross_validation.run(plain(Path(output + str(process)), Path(cache)))
assert (results is not None) == (process == 0)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(alone, tmp_path, cache):
    running = start_two(ONE_OF_TWO, str(tmp_path / "run"), str(cache))
    said = []
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        said.append([line for line in out.splitlines() if not line.startswith("[Gloo]")])
    assert any(line.startswith("fold 0 (1 of 3): 2 steps") for line in said[0])
    assert not said[1]
    assert os.listdir(tmp_path) == ["run0"], "process 0 alone writes"
    for one, two in zip(history(alone.output), history(tmp_path / "run0"), strict=True):
        # Float32 sums in another order: see tests/test_parallel.py.
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-3)
        assert float(two["gradient_norm"]) == pytest.approx(float(one["gradient_norm"]), rel=1e-3)
    metrics = json.loads((tmp_path / "run0" / "metrics.json").read_text("utf-8"))
    assert metrics["folds_done"] == [0]
