"""Several runs at a time: what one process gives, and what a fault of one does to the others."""

import dataclasses
import subprocess
import sys

import pytest

from cmsad_jax.types import ConfigError
from data_pipelines.serving import loading
from experiments import ablation
from experiments.process.console import RunError
from experiments.run_folder import RunFolder
from experiments.studies import cross_validation, jobs
from tests.faults.job import tiny


def test_jobs_that_cannot_be_are_refused():
    assert jobs.how_many(3, "cpu") == 3
    assert 1 <= jobs.how_many(None, "cpu") <= len(jobs._cores())
    assert jobs.how_many(None, "gpu") == jobs.how_many(1, "gpu") == 1
    with pytest.raises(ConfigError, match="take turns on an accelerator; got --jobs=2 on gpu"):
        jobs.how_many(2, "gpu")
    with pytest.raises(ConfigError, match="jobs must be at least 1; got 0"):
        jobs.how_many(0, "cpu")


def test_every_job_has_a_core():
    assert jobs._shares([0, 1, 2, 3, 4], 2) == [[0, 2, 4], [1, 3]]
    assert jobs._shares([4, 7], 5) == [[4], [7], [4], [7], [4]]


def test_all_that_a_job_says_is_in_its_account(tmp_path):
    """What is written past Python's streams, and what Python says as it ends, too."""
    code = f"""
import atexit, os, sys
from pathlib import Path
from experiments.studies import cross_validation, jobs
from tests.faults.job import tiny

def run(config):
    print("said")
    os.write(2, b"written past\\n")
    atexit.register(lambda: print("at the end", file=sys.stderr))

cross_validation.run = run
jobs._run_apart(tiny(Path({str(tmp_path)!r}) / "seed_1", Path({str(tmp_path)!r}) / "cache"), [0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    account = (tmp_path / "seed_1.log").read_text("utf-8").splitlines()
    assert {"said", "written past", "at the end"} <= {*account}


@pytest.mark.slow
def test_processes_give_what_one_gives_and_their_fault_ends_all(tmp_path, capsys):
    def configs(folder):
        return [
            dataclasses.replace(
                tiny(tmp_path / folder / "full" / f"seed_{seed}", tmp_path / "cache", steps=2),
                folds=(0,),
                seed=seed,
                compilation_cache=True,
                folds_file=folds_file,
            )
            for seed in (1, 2)
        ]

    config = tiny(tmp_path, tmp_path / "cache")
    source = loading.build(config.data)
    folds_file = ablation.keep_folds(tmp_path, cross_validation.make_folds(config, source))
    jobs.run_here(configs("here"), lambda folder: f"done {folder}")
    jobs.run_in_processes(configs("there"), 2, lambda folder: f"done {folder}")
    said = capsys.readouterr().out.splitlines()
    for config in (*configs("here"), *configs("there")):
        assert said.count(f"done {config.output}") == 1
    losses = []
    for config in (*configs("here"), *configs("there")):
        assert jobs.is_done(config)
        losses.append(RunFolder(config.output).read_results().fold_summaries[0].loss)
    # sums over voxels are split among another number of cores
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
    account = (tmp_path / "there" / "full" / "seed_1.log").read_text("utf-8")
    assert "fold 0 (1 of 2): 2 steps in" in account
    assert "lesions:" not in account  # it is the gland that is segmented
    endless = dataclasses.replace(
        configs("later")[0], train=dataclasses.replace(config.train, steps=10**6)
    )
    other = dataclasses.replace(configs("there")[1], num_folds=3)
    with pytest.raises(
        RunError, match=r"ended with status 2 and said:\s+error: (?s:.*)folds: 2 -> 3"
    ):
        jobs.run_in_processes([endless, other], 2, str)
    assert not jobs.is_done(endless)
