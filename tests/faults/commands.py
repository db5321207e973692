"""Commands beside ``cv`` under signals and on a full disk, each started again to the same bytes.

``python -m tests.faults.commands ablation RUNS CACHE`` is the one that no command line makes small
enough: two runs side by side, as ``experiments.ablation`` starts them.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cmsad_jax.types import ConfigError
from data_pipelines.serving import loading
from experiments import ablation
from experiments.exporting.artifact import write_artifact
from experiments.process.console import run_main
from experiments.process.storage import HOLDER, LOCK
from experiments.studies import cross_validation, jobs
from tests.data_pipelines.fabricate import raw_case, write_folder
from tests.experiments.untrained_run import make_untrained_run, tiny_config
from tests.faults.digest import digest
from tests.faults.job import fill, tiny

TIMES = ("wall_s", "compute_s", "processor_s", "processor_beside_s")
"""Keys of ``predictions.json`` that tell time."""

GONE_S = 30.0
"""Time within which no process of a command that was struck may be left."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
GRID = ("--data.preprocess.spacing-mm", "3", "1", "1", "--data.preprocess.size", "6", "16", "16")


class Kind(NamedTuple):
    """A command: its words for an output folder, and what of that folder must be the same.

    Attributes:
        words: after ``python -m``, for an output folder.
        digest: a text for each thing in that folder that must not depend on interruptions.
    """

    words: Callable[[Path], Sequence[str]]
    digest: Callable[[Path], dict[str, str]]


def kinds(folder: Path) -> dict[str, Kind]:
    """The commands, with what they work on written into ``folder``."""
    run, data, model = folder / "run", folder / "cases", folder / "model.cmsad"
    make_untrained_run(run, tiny_config(), done=2)
    write_artifact(run, model)
    write_folder(data, *(raw_case(f"c{n:02d}", seed=n) for n in range(12)))
    options = ("--accelerator", "cpu", "--model", str(model), "--input", str(data), "--uncertainty")
    build = ("--data.name=nifti_folder", f"--data.path={data}", "--num-workers=2", *GRID)
    return {
        "predict": Kind(
            lambda out: ("experiments.predict", *options, "--output", str(out)), _predictions
        ),
        "export": Kind(
            lambda out: ("experiments.export", str(run), "--output", str(out / "m.cmsad")), _files
        ),
        "build": Kind(
            lambda out: ("data_pipelines.build", *build, f"--data.cache={out}"), _data_set
        ),
        "ablation": Kind(
            lambda out: ("tests.faults.commands", "ablation", str(out), str(folder / "built")),
            _runs,
        ),
    }


def _files(out: Path) -> dict[str, str]:
    """A hash of each file, hidden ones too, but for that by which a process holds the folder."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in (LOCK, HOLDER)
    }


def _predictions(out: Path) -> dict[str, str]:
    found = _files(out)
    record = json.loads((out / "predictions.json").read_text("utf-8"))
    kept = {key: value for key, value in record.items() if key not in TIMES}
    return found | {"predictions.json": json.dumps(kept, sort_keys=True)}


def _data_set(out: Path) -> dict[str, str]:
    """Facts and hash of what is stored, which TFDS surrounds with files of its own."""
    found = {path.parent.name: path.read_text("utf-8") for path in out.rglob("cases.json")}
    hidden = [path.name for path in out.rglob(".*") if path.is_file()]
    return found | dict.fromkeys(hidden, "left over")


def _runs(out: Path) -> dict[str, str]:
    return {
        f"{run.name}/{name}": value
        for run in sorted(out.glob("seed_*"))
        if run.is_dir()
        for name, value in digest(run).items()
    }


def ablate(out: Path, cache: Path) -> None:
    """Two runs side by side."""
    config = tiny(out, cache)
    source = loading.build(config.data)
    out.mkdir(parents=True, exist_ok=True)
    folds_file = ablation.keep_folds(out, cross_validation.make_folds(config, source))
    runs = [
        dataclasses.replace(config, output=out / f"seed_{n}", seed=n, folds_file=folds_file)
        for n in (1, 2)
    ]
    jobs.run_in_processes([run for run in runs if not jobs.is_done(run)], 2, str)


def start(
    words: Sequence[str], strike: tuple[signal.Signals, float] | None = None
) -> tuple[int, str, str]:
    """Run a command, maybe with a signal after some seconds: status, what it says, what is wrong.

    Wrong is a process of it that is left some time after it ended.
    """
    mark = f"CMSAD_FAULTS={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    with subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {name: value},
        start_new_session=True,
    ) as process:
        if strike is not None:
            number, delay_s = strike
            try:
                process.wait(delay_s)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
        status = process.wait(600)
        deadline = time.monotonic() + GONE_S
        while (left := _processes(mark.encode())) and time.monotonic() < deadline:
            time.sleep(0.2)
        wrong = ""
        if left:
            wrong = f"{len(left)} processes left"
            for number in left:
                os.kill(number, signal.SIGKILL)
        assert process.stderr is not None
        return status, process.stderr.read(), wrong


def _processes(mark: bytes) -> list[int]:
    """Processes that have this in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def undisturbed(kind: Kind, out: Path) -> tuple[dict[str, str], float]:
    """What the command leaves, and how long it takes, when nothing happens."""
    for _ in range(2):  # the first one compiles, or builds what all share
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        status, said, wrong = start(kind.words(out))
        assert (status, wrong) == (0, ""), (status, said[-2000:], wrong)
    return kind.digest(out), time.perf_counter() - started


def struck(
    name: str, kind: Kind, tries: int, folder: Path, reference: Mapping[str, str], took_s: float
) -> Iterator[str]:
    """Texts of what went wrong, empty ones of tries that survived: each signal in turn."""
    rng = random.Random(name)
    for number in range(tries):
        strike = SIGNALS[number % len(SIGNALS)]
        out = folder / f"{name}_{number}"
        delay_s = rng.uniform(0.1, 0.95) * took_s
        status, said, wrong = start(kind.words(out), (strike, delay_s))
        title = f"{name} {strike.name} after {delay_s:.1f} s"
        if status not in (0, -strike, 128 + strike):
            wrong = wrong or f"status {status}: {said[-500:]}"
        yield f"{title}: {wrong}" if wrong else _again(title, kind, out, reference)
        shutil.rmtree(out, ignore_errors=True)


def filled(
    name: str, kind: Kind, tries: int, small: Path, reference: Mapping[str, str], size: int
) -> Iterator[str]:
    """The same on a file system that has room for a part of the result alone."""
    rng = random.Random(name)
    for number in range(tries):
        out, ballast = small / f"{name}_{number}", small / "ballast"
        fill(ballast)
        os.truncate(ballast, max(ballast.stat().st_size - int(rng.uniform(0.05, 0.9) * size), 0))
        status, said, wrong = start(kind.words(out))
        ballast.unlink()
        title = f"{name} on a full disk"
        if status != 3 or "Traceback" in said or str(small) not in said:
            wrong = wrong or f"status {status}: {said[-1500:]}"
        yield f"{title}: {wrong}" if wrong else _again(title, kind, out, reference)
        shutil.rmtree(out, ignore_errors=True)


def _again(title: str, kind: Kind, out: Path, reference: Mapping[str, str]) -> str:
    """What is wrong with the result of a command that is run again."""
    status, said, wrong = start(kind.words(out))
    if status or wrong:
        return f"{title}: again: status {status}: {said[-1500:]} {wrong}"
    found = kind.digest(out)
    differs = sorted(n for n in reference.keys() | found if reference.get(n) != found.get(n))
    return f"{title}: differs in {differs}" if differs else ""


def size_of(out: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def strangers(folder: Path, count: int) -> list[str]:
    """Artifacts with tricks in them: refused by name, and nothing is written."""
    from tests import test_export

    folder.mkdir()
    whole = folder / "whole.cmsad"
    config = tiny_config()
    make_untrained_run(folder / "run", config, done=1)
    write_artifact(folder / "run", whole, folds=[0])
    results = []
    for name, (trick, _) in [*test_export.TRICKS.items()][:count]:
        options = trick(whole) if callable(trick) else dict(trick)
        change = options.pop("change", test_export.nothing)
        results.append(_refused(name, whole, change, options, folder))
    return results


def _refused(name: str, whole: Path, change: Callable, options: dict, folder: Path) -> str:
    from cmsad_jax import export
    from tests import test_export

    try:
        file = test_export.edit(whole, folder / "trick.cmsad", change, **options)
    except KeyError as error:  # a file that this artifact does not have
        return f"{name}: cannot be made: {error}"
    before = set(folder.rglob("*"))
    try:
        export.load(file)
    except ConfigError as error:
        odd = set(folder.rglob("*")) - before
        return "" if str(error).isprintable() and not odd else f"{name}: {error!r:.200} {odd}"
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return f"{name}: accepted"


if __name__ == "__main__":
    _, _, out, cache = sys.argv
    run_main(lambda: ablate(Path(out), Path(cache)))
