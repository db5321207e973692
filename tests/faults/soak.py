"""Many steps in one process: memory, threads, files and shared memory stay what they were."""

import os
from pathlib import Path

import jax

from data_pipelines.serving import loading
from experiments.training.fold import Fold
from experiments.training.loop import train_folds
from experiments.training.programs import compile_programs
from tests.faults.job import tiny

STEPS, WARM_STEPS = 2000, 200
MOST_GROWTH = 0.02
"""Of memory, from step ``WARM_STEPS`` to the end."""


class Ended(Exception):
    """Ends the training that only warms up."""


def soak(cache: Path, folder: Path) -> tuple[str, str]:
    """Train ``STEPS`` steps with a checkpoint and a look at the validation fold every 100.

    A fold before it is broken off by an error after 5 steps, so that everything that a process
    opens once is open when counting begins, and that the error leaves nothing behind.

    Returns:
        What grew, empty if nothing did; and the figures.
    """
    config = tiny(folder / "soak", cache, steps=STEPS, checkpoint_every=100, validations=20)
    programs = compile_programs(config, jax.devices()[:1])
    source = loading.build(config.data)
    samples: dict[int, dict[str, int]] = {}
    step, made, last = programs.step.step, 0, 5

    def sampled(state, batch):
        nonlocal made
        if made == last:
            raise Ended
        made += 1
        if made % 100 == 50 or made in (WARM_STEPS, STEPS):
            samples[made] = resources()
        return step(state, batch)

    object.__setattr__(programs.step, "step", sampled)
    ids = source.case_ids

    def train(number: int) -> None:
        fold = Fold(number, ids[2:], ids[:2], folder / "soak" / f"fold_{number}")
        train_folds(config, programs, source, [fold])

    try:
        train(0)
    except Ended:
        before = resources()
    else:
        raise AssertionError("the first fold was to end early")
    made, last = 0, None
    samples.clear()
    train(1)
    after = resources()
    grown = samples[STEPS]["rss_kib"] / samples[WARM_STEPS]["rss_kib"] - 1
    faults = [f"memory grew by {grown:.2%}"] if grown > MOST_GROWTH else []
    for name, lazily in (("threads", 2), ("files", 0), ("shared_memory", 0)):
        # Between two checkpoints nothing is being written. A thread for each of them would be 12
        # more from the early samples to the late ones; pools that fill up late are one or two.
        counts = [samples[number][name] for number in sorted(samples) if number % 100 == 50]
        early, late = counts[2:8], counts[-6:]
        if min(late) > max(early) + lazily:
            faults.append(f"{name}: {early} early, {late} late")
    if after["files"] > before["files"] or after["shared_memory"] > before["shared_memory"]:
        faults.append(f"left open: {before} before, {after} after")
    figures = (
        f"memory {grown:+.2%} from step {WARM_STEPS} to {STEPS}; "
        f"{samples[STEPS]['threads']} threads ({samples[WARM_STEPS]['threads']}), "
        f"{after['files']} files ({before['files']}), {after['shared_memory']} in shared memory"
    )
    return "; ".join(faults), figures


def resources() -> dict[str, int]:
    """What this process holds, by Linux's own account."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines()
    )
    return {
        "rss_kib": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
        "shared_memory": len(os.listdir("/dev/shm")),
    }
