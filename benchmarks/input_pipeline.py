"""How fast a data set is built and read, and how much memory that takes.

``python -m benchmarks.input_pipeline --picai FOLDER`` builds the patients of a PI-CAI folder and
300 phantom cases, each from nothing in a process of its own whose peak memory, with that of its
workers, is watched; then it reads training batches of crops and whole cases from what was built.
Without ``--picai`` the phantom is built alone.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks import timing
from data_pipelines.config import DataConfig
from data_pipelines.phantom.options import PhantomOptions
from data_pipelines.serving import loading
from data_pipelines.serving.sampling import Sampling

CROP = (12, 48, 48)
BATCH_SIZE = 2
NUM_BATCHES = 400
_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    work: str
    cases: int
    workers: int
    seconds: float
    per_s: float
    unit: str
    peak_mib: float | None


def build(config: DataConfig, num_workers: int) -> Row:
    """Build a data set in a fresh process; seconds are those of ``loading.build`` there."""
    name, path = config.name, config.path
    code = (
        "import json, time\n"
        "from pathlib import Path\n"
        "from data_pipelines.config import DataConfig\n"
        "from data_pipelines.phantom.options import PhantomOptions\n"
        "from data_pipelines.serving import loading\n"
        "if __name__ == '__main__':\n"
        f"    config = DataConfig(name={name!r}, path={path and str(path)!r} and "
        f"Path({str(path)!r}), phantom={config.phantom}, cache=Path({str(config.cache)!r}))\n"
        "    start = time.perf_counter()\n"
        f"    source = loading.build(config, num_workers={num_workers})\n"
        "    print(json.dumps([len(source), time.perf_counter() - start]))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "build_data.py"
        script.write_text(code, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, encoding="utf-8", env=environment
        )
        peaks: list[int] = []
        watcher = threading.Thread(target=_watch, args=(process, peaks))
        watcher.start()
        output, _ = process.communicate()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"building '{name}' failed with status {process.returncode}")
    cases, seconds = json.loads(output.strip().splitlines()[-1])
    peak = max(peaks, default=0) / 2**20
    return Row(f"build {name}", cases, num_workers, seconds, cases / seconds, "cases", peak)


def _watch(process: subprocess.Popen, peaks: list[int]) -> None:
    """Memory of a process and its children, each page counted once (PSS), until it ends."""
    try:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for member in (parent, *parent.children(recursive=True)):
                try:
                    total += member.memory_full_info().pss
                except psutil.Error:
                    continue
            peaks.append(total)
            time.sleep(_POLL_S)
    except psutil.Error:
        return


def read(config: DataConfig) -> list[Row]:
    """Training batches and whole cases of a data set that is built."""
    source = loading.build(config)
    start = time.perf_counter()
    for _ in loading.eval_cases(source, source.case_ids):
        pass
    whole = time.perf_counter() - start
    sampling = Sampling(crop=CROP, batch_size=BATCH_SIZE, seed=0, num_steps=NUM_BATCHES)
    batches = loading.train_batches(source, source.case_ids, sampling)
    next(batches)  # starts the threads
    start = time.perf_counter()
    count = sum(1 for _ in batches) * BATCH_SIZE
    crops = time.perf_counter() - start
    name = config.name
    size = "x".join(map(str, CROP))
    return [
        Row(
            f"read whole cases of {name}", len(source), 1, whole, len(source) / whole, "cases", None
        ),
        Row(f"read crops {size} of {name}", len(source), 2, crops, count / crops, "crops", None),
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    header = ("work", "cases", "workers", "seconds", "per second", "peak MiB")
    cells = [
        (
            row.work,
            str(row.cases),
            str(row.workers),
            f"{row.seconds:.1f}",
            f"{row.per_s:.1f} {row.unit}",
            timing.number(row.peak_mib, ".0f"),
        )
        for row in rows
    ]
    return timing.markdown([header, *cells])


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and read, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline", description=__doc__
    )
    parser.add_argument("--picai", type=Path, metavar="FOLDER", help="patients to build as well")
    parser.add_argument("--num-cases", type=int, default=300, help="phantom cases")
    parser.add_argument("--num-workers", type=int, nargs="+", default=[1, 2], help="to compare")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.input_pipeline {shlex.join(given)}".strip()
    print(f"{timing.device()}; {timing.versions()}\n`{command}`\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sets = [DataConfig(name="picai", path=options.picai)] if options.picai else []
        sets.append(DataConfig(phantom=PhantomOptions(num_cases=options.num_cases)))
        for workers in options.num_workers:
            for config in sets:
                cache = Path(folder) / f"{config.name}_{workers}"
                rows.append(build(dataclasses.replace(config, cache=cache), workers))
        cache = Path(folder) / f"phantom_{options.num_workers[0]}"
        rows += read(dataclasses.replace(sets[-1], cache=cache))
    print(table(rows))
    if options.json:
        timing.save_json(options.json, rows, command=command)


if __name__ == "__main__":
    main()
