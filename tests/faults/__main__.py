"""Faults by the dozen, and what survives them: ``make faults``.

Every row of the table is one kind of fault. A run that was struck is started again until it ends;
it survives if every file that it leaves (but for times) and every array of its checkpoints are bit
for bit those of a run that nothing disturbed. ``--share 0.1`` runs a tenth of the tries.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

from cmsad_jax.training import TrainState
from experiments.training.checkpoints import Checkpoints
from experiments.training.programs import compile_programs
from tests.faults import commands, corruption, hostile
from tests.faults.digest import digest
from tests.faults.job import PHASES, tiny
from tests.faults.soak import STEPS, soak

GRACE_S = 10.0
"""Time within which a run must have ended after the step or case in which SIGTERM came."""
TIMEOUT_S = 600.0
"""For which a start may run; one that hangs is killed, and lost."""


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        fault: its kind.
        results: a text for each try, empty if it survived, else what went wrong; None if this
            machine does not allow the tries.
        note: more about them.
    """

    fault: str
    results: list[str] | None
    note: str = ""


class Ended(NamedTuple):
    """How a process of a run ended.

    Attributes:
        status: negative for a signal that killed it.
        out, err: what it printed.
        struck_s: when a signal was sent to it, by the monotonic clock; None if it ended before.
        ended_s: when it had ended.
    """

    status: int
    out: str
    err: str
    struck_s: float | None
    ended_s: float

    def marks(self) -> Iterator[tuple[str, str, float]]:
        """What, phase and time of the marks of ``tests.faults.job``, in order."""
        for line in self.out.splitlines():
            if line.startswith("mark "):
                _, what, phase, seconds = line.split()
                yield what, phase, float(seconds)

    def spans(self) -> dict[str, list[tuple[float, float]]]:
        """Begin and end of the calls of each phase; without end for one that was cut off."""
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for what, phase, seconds in self.marks():
            if what == "enter":
                found[phase].append((seconds, float("inf")))
            elif what == "leave":
                found[phase][-1] = (found[phase][-1][0], seconds)
        return found

    def phases_struck(self) -> list[str]:
        """The phases that were going on when the signal came; two where a thread was saving."""
        assert self.struck_s is not None
        found = [
            phase
            for phase, spans in self.spans().items()
            if any(begin <= self.struck_s < end for begin, end in spans)
        ]
        return found or ["between"]


class Strike(NamedTuple):
    """A signal to send ``delay_s`` after the start of a call of a phase."""

    number: signal.Signals
    phase: str
    call: int
    delay_s: float


def start(run: Path, cache: Path, *fault: str, strike: Strike | None = None) -> Ended:
    """Let a process work on ``run``; ``fault`` are the further arguments of the job."""
    command = [sys.executable, "-m", "tests.faults.job", str(run), str(cache), *fault]
    struck_s, lines = None, []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        ) as process,
    ):
        assert process.stdout is not None
        watchdog = threading.Timer(TIMEOUT_S, process.kill)
        watchdog.start()
        calls = 0
        for line in process.stdout:
            lines.append(line)
            if strike is None or not line.startswith(f"mark enter {strike.phase} "):
                continue
            calls += 1
            if calls == strike.call:
                time.sleep(strike.delay_s)
                if process.poll() is None:
                    struck_s = time.monotonic()
                    process.send_signal(strike.number)
        process.wait()
        ended_s = time.monotonic()
        watchdog.cancel()
        errors.seek(0)
        return Ended(process.returncode, "".join(lines), errors.read(), struck_s, ended_s)


def finish(run: Path, cache: Path, reference: dict[str, str]) -> str:
    """Start undisturbed and compare with the reference; what differs."""
    done = start(run, cache)
    if done.status:
        return f"{run.name}: restart ended with {done.status}: {done.err[-2000:]}"
    return compare(run, reference)


def compare(run: Path, reference: dict[str, str]) -> str:
    """What of a finished run differs from the reference; empty if nothing does."""
    found = digest(run)
    wrong = [name for name in reference.keys() | found if reference.get(name) != found.get(name)]
    return f"{run.name}: differs in {sorted(wrong)}" if wrong else ""


def signals(
    number: signal.Signals,
    tries: int,
    folder: Path,
    reference: dict[str, str],
    durations: dict[str, list[float]],
    jobs: int,
) -> Row:
    """Runs that a signal strikes up to three times each: every phase alike, at drawn moments.

    Each run begins with a data set that is not built. A try counts once the signal has ended the
    process: if that was over before, the run is compared and another one is struck instead.
    """
    rng = random.Random(number.name)
    order = list(PHASES)
    phases = [order[i % len(order)] for i in range(tries)]
    rng.shuffle(phases)
    shares = [sorted(phases[i : i + 3], key=order.index) for i in range(0, tries, 3)]
    struck_in: Counter[str] = Counter()

    def one_share(index: int, share: Sequence[str]) -> list[str]:
        rng = random.Random(f"{number.name} {index}")
        results: list[str] = []
        waiting = list(share)
        for attempt in range(100):
            run = folder / f"{number.name}_{index}_{attempt}"
            cache = folder / f"{run.name}_cache"
            faults, over = [], False
            while waiting and not over:
                phase = waiting[0]
                lengths = durations[phase]
                # Few calls are left after a strike: the first one of them.
                call = 1 if faults else rng.randint(1, len(lengths))
                delay_s = rng.uniform(0, lengths[call - 1])
                done = start(run, cache, strike=Strike(number, phase, call, delay_s))
                over = any(mark[:2] == ("leave", "reporting") for mark in done.marks())
                if done.struck_s is not None and not over:
                    waiting.pop(0)
                    struck_in.update(done.phases_struck())
                    faults.append(_wrong_end(done, number, f"{run.name} {phase}"))
                elif not over or done.status not in (0, -number, 128 + number):
                    waiting.pop(0)
                    over = True
                    faults.append(f"{run.name} {phase}: {done.status}: {done.err[-2000:]}")
            wrong = compare(run, reference) if over else finish(run, cache, reference)
            results += [fault or wrong for fault in faults]
            if wrong and not faults:
                results.append(wrong)
            if not waiting:
                return results
        raise AssertionError(f"no strike hit {waiting}")

    with ThreadPoolExecutor(jobs) as threads:
        results = [
            text for part in threads.map(one_share, range(len(shares)), shares) for text in part
        ]
    counts = ", ".join(f"{phase} {struck_in[phase]}" for phase in (*order, "between"))
    return Row(number.name, results, f"while {counts}")


def _wrong_end(done: Ended, number: signal.Signals, title: str) -> str:
    """What is wrong with the end of a process that was struck; empty if nothing is."""
    expected = -number if number == signal.SIGKILL else 128 + number
    if done.status != expected:
        return f"{title}: status {done.status}: {done.err[-2000:]}"
    if number == signal.SIGKILL:
        return ""
    assert done.struck_s is not None
    units = [at for what, _, at in done.marks() if what == "unit" and at >= done.struck_s]
    took_s = done.ended_s - (units[0] if units else done.struck_s)
    return f"{title}: took {took_s:.1f} s" if took_s > GRACE_S else ""


def full_disks(tries: int, folder: Path, reference: dict[str, str], calls: dict[str, int]) -> Row:
    """A small file system that fills up in each phase of the second fold, then gets room again.

    And one that becomes read-only: before a run, and in the middle of one.
    """
    fault, results = "full or read-only disk", []

    def judge(title: str, done: Ended, named: Path, run: Path, cache: Path) -> str:
        """The message, what was finished before, and what a restart makes of it."""
        if done.status != 3 or str(named) not in done.err or "Traceback" in done.err:
            return f"{title}: status {done.status}: {done.err[-2000:]}"
        before = {name: value for name, value in digest(run).items() if name.startswith("fold_0")}
        harmed = [name for name in before if before[name] != reference.get(name)]
        return f"{title}: harmed {harmed}" if harmed else finish(run, cache, reference)

    with small_file_system(folder / "small") as small:
        if small is None:
            return Row(fault, None, "mounting a file system needs privileges")
        for phase in list(PHASES)[:tries]:
            run, ballast = small / f"full_{phase}", small / "ballast"
            cache = small / "cache" if phase == "building" else folder / "full_cache"
            call = calls[phase] // 2 + 1
            done = start(run, cache, phase, str(call), f"fill:{ballast}")
            if ballast.exists():
                ballast.unlink()
            named = cache if phase == "building" else run
            said = "" if "space" in done.err else "no word of space; "
            results.append(said + judge(f"full while {phase}", done, named, run, cache))
            shutil.rmtree(run, ignore_errors=True)
            shutil.rmtree(small / "cache", ignore_errors=True)
        for name in ("read-only before", "read-only within"):
            run, cache = small / name.replace(" ", "_"), folder / "full_cache"
            if name.endswith("within"):
                shutil.copytree(folder / "reference", run)
                shutil.rmtree(run / "fold_1")
                (run / "metrics.json").unlink()
            subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
            done = start(run, cache)
            subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
            results.append(judge(name, done, run, run, cache))
            shutil.rmtree(run)
    return Row(fault, results)


def lost_data(tries: int, folder: Path, reference: dict[str, str], calls: dict[str, int]) -> Row:
    """A data file that loses its content in a phase, is said to have, and is put back."""
    results = []
    for phase in ("training", "predicting", "building")[:tries]:
        run, cache = folder / f"lost_{phase}", folder / f"lost_{phase}_cache"
        shutil.copytree(folder / "reference_cache", cache)
        (file,) = cache.rglob("*.array_record-*")
        call = calls[phase] // 2 + 1
        done = start(run, cache, phase, str(call), f"remove:{file}")
        file.with_name(f"{file.name}.away").replace(file)
        said = done.status == 2 and "must stay as it was written" in done.err
        said &= str(file.parent) in done.err and "Traceback" not in done.err
        wrong = finish(run, cache, reference)
        results.append(wrong if said else f"{phase}: status {done.status}: {done.err[-2000:]}")
    return Row("lost data file", results)


@contextlib.contextmanager
def small_file_system(path: Path, room: int = 0) -> Iterator[Path | None]:
    """A mounted tmpfs of 12 MB, or of ``room`` bytes if that is more; None without the right."""
    path.mkdir()
    size = max(12 * 2**20, room)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def corruptions(tries: int, cache: Path, folder: Path) -> Row:
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

    results = [corruption.survives(folder / f"c{i}", save, states, i) for i in range(tries)]
    return Row("corrupted checkpoint", results)


def rows(share: float, jobs: int, only: Sequence[str], folder: Path) -> Iterator[Row]:
    """Every row of the table, as it is done."""
    cache = folder / "reference_cache"

    def count(full: int) -> int:
        return max(1, round(full * share))

    reference: dict[str, str] = {}
    durations: dict[str, list[float]] = {}
    if {"kill", "term", "disk", "data"} & set(only):
        for run in ("reference", "again"):  # the first one compiles
            done = start(folder / run, folder / f"{run}_cache")
            assert done.status == 0, done.err
        wrong = compare(folder / "again", digest(folder / "reference"))
        yield Row("nothing: a second run", [wrong])
        reference = digest(folder / "reference")
        durations = {
            phase: [end - begin for begin, end in spans] for phase, spans in done.spans().items()
        }
    calls = {phase: len(lengths) for phase, lengths in durations.items()}
    for name, number, full in (("kill", signal.SIGKILL, 50), ("term", signal.SIGTERM, 20)):
        if name in only:
            yield signals(number, count(full), folder, reference, durations, jobs)
    if "corrupt" in only:
        yield corruptions(count(30), cache, folder)
    if "disk" in only:
        yield full_disks(count(6), folder, reference, calls)
    if "data" in only:
        yield lost_data(count(3), folder, reference, calls)
    if "hostile" in only:
        yield Row("hostile names", hostile.results(folder / "hostile", count(100)))
    if "strangers" in only:
        yield Row("strangers' artifacts", commands.strangers(folder / "strangers", count(55)))
    if {*COMMANDS} & {*only}:
        yield from commands_struck([name for name in COMMANDS if name in only], count, folder)
    if "soak" in only:
        grown, figures = soak(cache, folder)
        yield Row(f"soak of {STEPS} steps", [grown], figures)


def commands_struck(
    names: Sequence[str], count: Callable[[int], int], folder: Path
) -> Iterator[Row]:
    """Signals at drawn moments of other commands, and a disk that fills up."""
    (folder / "given").mkdir()
    known = commands.kinds(folder / "given")
    for name in names:
        out = folder / f"{name}_whole"
        reference, took_s = commands.undisturbed(known[name], out)
        results = commands.struck(name, known[name], count(12), folder, reference, took_s)
        yield Row(f"{name}: KILL, TERM, HUP", list(results), f"undisturbed {took_s:.1f} s")
        size = commands.size_of(out)
        with small_file_system(folder / f"small_{name}", 3 * size) as small:
            if small is None:
                yield Row(f"{name}: full disk", None, "mounting a file system needs privileges")
                continue
            found = commands.filled(name, known[name], count(4), small, reference, size)
            yield Row(f"{name}: full disk", list(found))


COMMANDS = ("predict", "export", "build", "ablation")
KINDS = ("kill", "term", "corrupt", "disk", "data", "hostile", "strangers", *COMMANDS, "soak")


def keep_compiled(cache: Path) -> None:
    """Let every start, and this process, take what an earlier one compiled."""
    for name, value in (
        ("jax_compilation_cache_dir", str(cache)),
        ("jax_persistent_cache_min_compile_time_secs", 0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


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
        keep_compiled(Path(name) / "xla")
        mark = time.perf_counter()
        for row in rows(options.share, options.jobs, options.only, Path(name)):
            spent, mark = time.perf_counter() - mark, time.perf_counter()
            failed = [text for text in row.results or () if text]
            lost += len(failed)
            tries = 0 if row.results is None else len(row.results)
            counts = f"{tries:>6}{tries - len(failed):>10}{len(failed):>6}"
            print(f"{row.fault:<26}{counts}{spent:>9.0f}", flush=True)
            for text in (*([row.note] if row.note else []), *failed):
                print(f"  {text}", flush=True)
    print(f"lost: {lost} ({time.perf_counter() - started:.0f} s)")
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main()
