"""Faults by the dozen, and what survives them: ``make faults``.

Every row of the table is one kind of fault. A run that was struck is started again until it ends;
it survives if its weights, its masks and the scientific fields of its ``metrics.json`` are bit for
bit those of a run that nothing disturbed. ``--share 0.1`` runs a tenth of the tries.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from cmsad_jax.training import TrainState
from data_pipelines import loading
from data_pipelines.volume_io import read_volume
from experiments.checkpoints import Checkpoints, load_params
from experiments.cv import weights_sha256
from experiments.train import compile_programs, train_fold
from tests.faults import corruption, hostile
from tests.faults.job import PHASES, keep_compiled, tiny

GRACE_S = 10.0
"""Time within which a run must have ended after the step or case in which SIGTERM came."""
SOAK_STEPS, SOAK_WARM_STEPS = 2000, 200
CALLS = {
    "saving": 8,
    "predicting": 8,
    "validating": 4,
    "training": 2,
    "starting": 1,
    "reporting": 1,
}
"""How often an undisturbed run calls the function of each phase, at least."""

Result = list[str]
"""One text for each try: empty if it survived, else what went wrong."""


def digest(run: Path) -> dict[str, str]:
    """Hashes of everything in a finished run that must not depend on interruptions."""
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    for summary in metrics["fold_summaries"].values():
        for name in summary.keys() - {"loss", "best", "skipped_updates"}:  # times and memory
            del summary[name]
    found = {"metrics.json": hashlib.sha256(json.dumps(metrics).encode()).hexdigest()}
    for fold in metrics["folds_done"]:
        for checkpoint in ("last", "best"):
            params = load_params(run, fold, checkpoint=checkpoint)
            found[f"fold {fold} {checkpoint}"] = weights_sha256(params)
    for path in sorted(run.glob("fold_*/*/*.nii.gz")):
        volume = read_volume(path)
        found[str(path.relative_to(run))] = hashlib.sha256(
            volume.array.tobytes() + volume.affine.tobytes()
        ).hexdigest()
    left = [path for path in run.rglob(".*") if path.name != ".lock"]
    return found | ({"left behind": str(left)} if left else {})


def start(run: Path, cache: Path, *fault: str) -> subprocess.CompletedProcess[str]:
    """A process that works on ``run``; ``fault`` are the further arguments of the job."""
    command = [sys.executable, "-m", "tests.faults.job", str(run), str(cache), *fault]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def finish(run: Path, cache: Path, reference: dict[str, str]) -> str:
    """Start undisturbed and compare with the reference; what differs."""
    done = start(run, cache)
    if done.returncode:
        return f"{run.name}: restart ended with {done.returncode}: {done.stderr[-2000:]}"
    found = digest(run)
    wrong = [name for name in reference.keys() | found if reference.get(name) != found.get(name)]
    return f"{run.name}: differs in {sorted(wrong)}" if wrong else ""


def signals(
    name: str, tries: int, cache: Path, folder: Path, reference: dict[str, str], jobs: int
) -> Result:
    """Runs that a signal strikes up to three times each, in drawn phases, at drawn moments."""

    def one_run(seed: int, count: int) -> Result:
        rng = random.Random(f"{name} {seed}")
        run, faults = folder / f"{name}_{seed}", []
        phases = list(PHASES)
        while len(faults) < count:
            phase = phases[(seed * 3 + len(faults)) % len(phases)]
            call, delay_s = rng.randint(1, CALLS[phase]), round(rng.uniform(0, 0.5), 3)
            done = start(run, cache, phase, name, str(call), str(delay_s))
            ended = time.monotonic()
            if "\nstruck " not in done.stdout:  # that phase was over
                if done.returncode == 0:
                    phases.remove(phase)
                    shutil.rmtree(run)
                continue
            faults.append("")
            if name == "SIGTERM":
                took_s = ended - _unit_end(done.stdout)
                if done.returncode not in (0, 143):
                    faults[-1] = f"{run.name} {phase}: status {done.returncode}: {done.stderr}"
                elif took_s > GRACE_S and done.returncode:
                    faults[-1] = f"{run.name} {phase}: took {took_s:.1f} s"
        wrong = finish(run, cache, reference)
        return [fault or wrong for fault in faults]

    shares = [min(3, tries - first) for first in range(0, tries, 3)]
    with ThreadPoolExecutor(jobs) as threads:
        results = list(threads.map(one_run, range(len(shares)), shares))
    return [text for result in results for text in result]


def full_disks(tries: int, cache: Path, folder: Path, reference: dict[str, str]) -> Result | None:
    """A small file system that fills up in each phase, is said to be full, and gets room again."""
    results = []
    with small_file_system(folder / "small") as small:
        if small is None:
            return None
        for phase in [phase for phase in PHASES if phase != "starting"][:tries]:
            run, ballast = small / f"full_{phase}", small / "ballast"
            done = start(run, cache, phase, f"fill:{ballast}", "1", "0")
            said = done.returncode == 3 and str(run) in done.stderr and "space" in done.stderr
            ballast.unlink(missing_ok=True)
            wrong = finish(run, cache, reference)
            if not said:
                wrong = f"full while {phase}: status {done.returncode}: {done.stderr[-2000:]}"
            results.append(wrong)
            shutil.rmtree(run)
        run = small / "read_only"
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        done = start(run, cache)
        said = done.returncode == 3 and str(run) in done.stderr
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        wrong = finish(run, cache, reference)
        results.append(wrong if said else f"read-only: {done.returncode}: {done.stderr[-2000:]}")
    return results


def _unit_end(text: str) -> float:
    """When the step or case ended in which the fault struck; the strike itself if none did."""
    lines = text[text.index("\nstruck ") + 1 :].splitlines()
    times = [float(line.split()[1]) for line in lines if line.startswith(("struck ", "unit "))]
    return times[1] if len(times) > 1 else times[0]


@contextlib.contextmanager
def small_file_system(path: Path) -> Iterator[Path | None]:
    """A mounted tmpfs of 8 MB; None where this process may not mount."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def corruptions(tries: int, cache: Path, folder: Path, reference: dict[str, str]) -> Result:
    """Damaged checkpoints: the newest intact one is used, or an error; never other weights."""
    config = tiny(folder / "corrupted", cache)
    like = compile_programs(config, jax.devices()[:1]).init(jax.random.key(0))
    states = [corruption.filled(like, value) for value in (1.0, 2.0)]

    def save(directory: Path) -> Callable[[], tuple[TrainState, dict] | None]:
        kept = Checkpoints(directory, config)
        for step, state in enumerate(states, 1):
            kept.save("last", state, step=step)
        kept.close()
        return lambda: Checkpoints(directory, config).resume(like)

    return [corruption.survives(folder / f"c{seed}", save, states, seed) for seed in range(tries)]


def soak(cache: Path, folder: Path) -> Result:
    """Many steps: memory, threads, files and shared memory stay what they were."""
    config = tiny(folder / "soak", cache, steps=SOAK_STEPS, checkpoint_every=100)
    programs = compile_programs(config, jax.devices()[:1])
    source = loading.build(config.data)
    samples: dict[int, dict[str, int]] = {}
    step, made = programs.step.step, 0

    def sampled(state, batch):
        nonlocal made
        made += 1
        if made in (SOAK_WARM_STEPS, SOAK_STEPS):
            samples[made] = resources()
        return step(state, batch)

    object.__setattr__(programs.step, "step", sampled)
    ids = source.case_ids
    before = resources()
    train_fold(
        config,
        programs,
        source,
        fold=0,
        training=ids[2:],
        validation=ids[:2],
        directory=folder / "soak" / "fold_0",
    )
    after = resources()
    faults = []
    grown = samples[SOAK_STEPS]["rss_kib"] / samples[SOAK_WARM_STEPS]["rss_kib"] - 1
    print(f"  soak: memory {grown:+.2%} from step {SOAK_WARM_STEPS} to {SOAK_STEPS}; {after}")
    if grown > 0.02:
        faults.append(f"memory grew by {grown:.1%}")
    faults += [
        f"{name}: {before[name]} before, {after[name]} after"
        for name in ("files", "shared_memory")
        if after[name] > before[name]
    ]
    if samples[SOAK_STEPS]["threads"] > samples[SOAK_WARM_STEPS]["threads"]:
        faults.append(f"threads: {samples}")
    return ["; ".join(faults)]


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


def rows(
    share: float, jobs: int, only: Sequence[str], folder: Path
) -> Iterator[tuple[str, Result | None]]:
    """Every row of the table, as it is done."""
    cache = folder / "cache"

    def count(full: int) -> int:
        return max(1, round(full * share))

    reference: dict[str, str] = {}
    if {"kill", "term", "disk"} & set(only):
        done = start(folder / "reference", cache)
        assert done.returncode == 0, done.stderr
        reference = digest(folder / "reference")
    if "kill" in only:
        yield "SIGKILL", signals("SIGKILL", count(50), cache, folder, reference, jobs)
    if "term" in only:
        yield "SIGTERM", signals("SIGTERM", count(20), cache, folder, reference, jobs)
    if "corrupt" in only:
        yield "corrupted checkpoint", corruptions(count(30), cache, folder, reference)
    if "disk" in only:
        yield "full or read-only disk", full_disks(count(5), cache, folder, reference)
    if "hostile" in only:
        yield "hostile names", hostile.results(folder / "hostile", count(100))
    if "soak" in only:
        yield f"soak of {SOAK_STEPS} steps", soak(cache, folder)


KINDS = ("kill", "term", "corrupt", "disk", "hostile", "soak")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the tries of every row")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS)
    options = parser.parse_args()
    started, lost = time.perf_counter(), 0
    print(f"{'fault':<26}{'tries':>6}{'survived':>10}{'lost':>6}{'seconds':>9}", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        keep_compiled(Path(name) / "cache" / "xla")
        mark = time.perf_counter()
        for fault, result in rows(options.share, options.jobs, options.only, Path(name)):
            spent, mark = time.perf_counter() - mark, time.perf_counter()
            if result is None:
                print(f"{fault:<26}not run: mounting a file system needs privileges", flush=True)
                continue
            failed = [text for text in result if text]
            lost += len(failed)
            counts = f"{len(result):>6}{len(result) - len(failed):>10}{len(failed):>6}"
            print(f"{fault:<26}{counts}{spent:>9.0f}", flush=True)
            for text in failed:
                print(f"  {text}", flush=True)
    print(f"lost: {lost} ({time.perf_counter() - started:.0f} s)")
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main()
