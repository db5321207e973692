"""Several runs of ``experiments.cv``, one after another or some at a time.

On a processor each run is a process with cores of its own: two networks on a core each take less
time than one after the other on two.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

from cmsad_jax.types import ConfigError
from data_pipelines.process import end_with_parent
from data_pipelines.progress import progress
from experiments.process.accelerator import select_accelerator
from experiments.process.console import RunError, log, run_main
from experiments.run_folder import folder_of
from experiments.settings.config import Config, folds_asked
from experiments.training.programs import Programs, compile_programs


def how_many(asked: int | None, platform: str) -> int:
    """Runs at a time: as asked for; else one for each core and 4 GiB of memory, 1 on accelerators.

    Raises:
        ConfigError: fewer than one, or several on an accelerator.
    """
    if asked is not None and asked < 1:
        raise ConfigError(f"jobs must be at least 1; got {asked}. Use --jobs=1 or more.")
    if platform != "cpu":
        if asked not in (None, 1):
            raise ConfigError(
                f"runs take turns on an accelerator; got --jobs={asked} on {platform}. "
                "Use --jobs=1, or --accelerator=cpu."
            )
        return 1
    if not hasattr(os, "sysconf"):  # Windows, where the memory is not known
        return asked or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return asked or max(1, min(len(_cores()), memory // (4 * 2**30)))


def _cores() -> list[int]:
    """The cores that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _shares(cores: Sequence[int], jobs: int) -> list[Sequence[int]]:
    """The cores of each job: none without, also where there are more jobs than cores."""
    return [cores[job::jobs] or [cores[job % len(cores)]] for job in range(jobs)]


def is_done(config: Config) -> bool:
    """Whether the run folder holds all folds of this configuration, and a report of them.

    Raises:
        ConfigError: it holds another one.
    """
    folder = folder_of(config)
    folder.refuse_other(config)
    asked = {*folds_asked(config.folds, config.num_folds)}
    if not folder.metrics.exists() or not asked <= {*(folder.read_results().folds_done or ())}:
        return False
    return folder.is_reported


def run_all(
    configs: Sequence[Config], asked: int | None, platform: str, done: Callable[[Path], str]
) -> None:
    """As many at a time as ``how_many`` allows; ``done`` as in ``run_here``."""
    at_a_time = min(how_many(asked, platform), max(len(configs), 1))
    if at_a_time == 1:
        run_here(configs, done)
    else:
        run_in_processes(configs, at_a_time, done)


def run_here(configs: Sequence[Config], done: Callable[[Path], str]) -> None:
    """One after another; neighbours that differ in their seed alone share compiled programs.

    ``done`` is called with the folder of each run at its end, and gives the line to be printed.
    """
    from experiments.studies import cross_validation  # slow to load, and not needed for --help

    shared: dict[Path, Programs] = {}
    for config in configs:
        row = folder_of(config).path.parent
        if row not in shared:
            shared = {row: compile_programs(config, select_accelerator(config.accelerator))}
        cross_validation.run(config, shared[row])
        log(done(folder_of(config).path))


def run_in_processes(configs: Sequence[Config], jobs: int, done: Callable[[Path], str]) -> None:
    """Several at a time, each a process with cores of its own, its account in a file.

    ``done`` as in ``run_here``.

    Raises:
        RunError: a run failed; the others were stopped, saved what they had, and can go on.
    """
    context = multiprocessing.get_context("spawn")
    free = _shares(_cores(), jobs)
    waiting = list(configs)
    running: dict[int, tuple[BaseProcess, Path, Sequence[int]]] = {}
    log(f"{jobs} at a time; the output of each is in the .log file beside its folder")
    with progress((), description="runs", total=len(configs)) as bar:
        try:
            while waiting or running:
                while waiting and free:
                    config, cores = waiting.pop(0), free.pop()
                    process = context.Process(target=_run_apart, args=(config, cores))
                    process.start()
                    running[process.sentinel] = (process, folder_of(config).path, cores)
                for sentinel in multiprocessing.connection.wait(list(running)):
                    process, folder, cores = running.pop(cast(int, sentinel))
                    process.join()
                    free.append(cores)
                    if process.exitcode:
                        raise RunError(_failure(folder, process.exitcode))
                    bar.write(done(folder))
                    bar.update()
        finally:
            for process, _, _ in running.values():
                process.terminate()
            for process, _, _ in running.values():
                process.join()


def _run_apart(config: Config, cores: Sequence[int]) -> None:
    """Run in a process of its own, which signals reach through its parent alone.

    At the end of its parent, whatever ended that, it saves what it has and ends as well.
    """
    from experiments.studies import cross_validation

    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
    end_with_parent(signal.SIGTERM)
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)
    account = _account(folder_of(config).path)
    account.parent.mkdir(parents=True, exist_ok=True)
    with (
        account.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        for stream in (1, 2):  # which XLA writes to, and Python as it ends
            os.dup2(file.fileno(), stream)
        run_main(functools.partial(cross_validation.run, config))


def _account(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _failure(folder: Path, status: int) -> str:
    account = _account(folder).read_text("utf-8") if _account(folder).exists() else ""
    said = account[max(account.rfind("\nerror: "), 0) :].strip().splitlines() or ["nothing"]
    return (
        f"every run must end well; {folder} ended with status {status} and said:\n"
        + "\n".join(f"  {line}" for line in said[-10:])
        + f"\nCorrect that (its whole output: {_account(folder)}) and run the same command again."
    )
