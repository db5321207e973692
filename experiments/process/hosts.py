"""Several processes in one run, one for each host or device: how they start, and how they agree.

Process 0 reads and writes the run folder; the others train with it, each on its own part of every
batch. With one process every function here does nothing.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cmsad_jax.types import ConfigError
from experiments.process.console import RunError
from experiments.process.signals import share_signals
from experiments.settings.config import DistributedConfig

T = TypeVar("T")

_ANNOUNCED = {
    "SLURM_NTASKS": "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE": "OMPI_MCA_orte_hnp_uri",
}
"""Number of processes that a launcher has started, and what is there only if it has."""

_LONGEST_WAIT_S = 7 * 24 * 3600
"""For process 0, which predicts and writes alone: JAX ends the others if it dies."""

_numbers = itertools.count()


def join(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Make this process one of several, if it is; before JAX computes anything.

    Raises:
        ConfigError: the settings are not complete, or the processes do not find each other.
    """
    given = {
        "coordinator_address": config.coordinator,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
    }
    if None in given.values() and set(given.values()) != {None}:
        raise ConfigError(
            "processes that are started by hand need --distributed.coordinator, "
            f"--distributed.num-processes and --distributed.process-id; got {config.coordinator}, "
            f"{config.num_processes} and {config.process_id}. Give all three, or none."
        )
    announced = any(
        int(environment.get(count, "1")) > 1 and sign in environment
        for count, sign in _ANNOUNCED.items()
    )
    if config.coordinator is None and not (
        config.launcher == "detect" or (config.launcher == "auto" and announced)
    ):
        return
    if sys.platform == "win32":
        raise ConfigError(
            "several processes in one run stop by POSIX signals; got Windows. Use Linux or WSL, or "
            "--distributed.launcher=none for one process."
        )
    arguments: dict[str, Any] = {} if config.coordinator is None else given
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            "the processes of a run must find each other; got from JAX: "
            f"{(str(error).splitlines() or [repr(error)])[0]} "
            "Check the address, number and identities of the processes, "
            "or use --distributed.launcher=none for one process."
        ) from error
    share_signals()


def is_first() -> bool:
    """Whether this is process 0, or the only one."""
    return jax.process_index() == 0


def part() -> tuple[int, int]:
    """Which process this is, of how many: its part of every batch."""
    return jax.process_index(), jax.process_count()


def wait() -> None:
    """Go on when all processes are here, however long process 0 works alone before.

    Through JAX's coordinator: a collective operation between CPUs gives up after half a minute.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.sync_global_processes(
            f"cmsad-{next(_numbers)}",
            timeout=_LONGEST_WAIT_S,
            processes=set(range(jax.process_count())),
        )


def broadcast_from_first(values: T) -> T:
    """Numbers and arrays as process 0 has them; those of the others give shapes and types."""
    if jax.process_count() == 1:
        return values
    wait()
    return multihost_utils.broadcast_one_to_all(values)


@contextlib.contextmanager
def first_alone(purpose: str) -> Iterator[None]:
    """Inside, process 0 does something (``is_first``) that it alone can do, or fail to do.

    Raises:
        RunError: in the other processes, if it failed; its error is raised in process 0.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        failed = bool(broadcast_from_first(np.asarray(failed)))
    if failed:
        raise RunError(
            f"process 0 must be able to {purpose}; it was not. Correct what it says, and start all "
            "processes again."
        )


def must_agree(what: str, digest: str, remedy: str) -> None:
    """Raise ``ConfigError`` in every process unless ``digest`` (hexadecimal) is one for all."""
    if jax.process_count() == 1:
        return
    wait()
    mine = np.frombuffer(bytes.fromhex(digest)[:16], np.uint8).astype(np.int32)
    found = multihost_utils.process_allgather(mine)
    others = [i for i, theirs in enumerate(found) if not np.array_equal(theirs, found[0])]
    if others:
        raise ConfigError(
            f"all processes of a run must have the same {what}; that of process "
            f"{', '.join(map(str, others))} differs from that of process 0. {remedy}"
        )
