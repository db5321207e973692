"""How processes find each other and agree; ``test_cv_arrangements.py`` lets two train."""

import numpy as np
import pytest

from cmsad_jax.types import ConfigError
from experiments.process import hosts
from experiments.process.console import RunError
from experiments.settings.config import DistributedConfig


@pytest.fixture
def joined(monkeypatch):
    """Arguments with which JAX was asked to find the other processes."""
    calls = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda **given: calls.append(given))
    return calls


SLURM = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:2"}


@pytest.mark.parametrize(
    ("config", "environment", "calls"),
    [
        (DistributedConfig(), {}, []),
        (DistributedConfig(), SLURM, [{}]),
        (DistributedConfig(), MPI, [{}]),
        (DistributedConfig(), SLURM | {"SLURM_NTASKS": "1"}, []),
        (DistributedConfig(), {"SLURM_NTASKS": "8"}, []),  # a batch script without srun
        (DistributedConfig(launcher="none"), SLURM, []),
        (DistributedConfig(launcher="detect"), {}, [{}]),
        (
            DistributedConfig(coordinator="a:1", num_processes=2, process_id=0),
            {},
            [{"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}],
        ),
    ],
)
def test_several_processes_where_asked_for_or_announced(joined, config, environment, calls):
    hosts.join(config, environment)
    assert joined == calls


def test_half_an_address_is_refused(joined):
    with pytest.raises(ConfigError, match=r"got a:1, None and 0. Give all three, or none"):
        hosts.join(DistributedConfig(coordinator="a:1", process_id=0), {})
    assert not joined


def test_processes_that_do_not_find_each_other_are_told(monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match=r"find each other; got from JAX: coordinator_address sh"):
        hosts.join(DistributedConfig(launcher="detect"), {})


def test_one_process_is_the_first_and_waits_for_none():
    assert hosts.is_first()
    assert hosts.part() == (0, 1)
    hosts.wait()
    hosts.must_agree("data", "00", "")
    with pytest.raises(ZeroDivisionError), hosts.first_alone("divide"):
        _ = 1 / 0


def test_where_process_0_fails_the_others_end(monkeypatch):
    monkeypatch.setattr(hosts, "broadcast_from_first", lambda failed: np.asarray(True))
    with (
        pytest.raises(RunError, match="process 0 must be able to open it; it was not"),
        hosts.first_alone("open it"),
    ):
        pass
