"""The first minutes on an accelerator: does it work, and how fast is it?

``make accelerator`` runs, within nine minutes and without a network, the tests that need one, the
kernels, the train step of every preset beside PyTorch (where it is installed for the device), the
prediction, and a short cross-validation. Every part has its share of the time and a process of its
own: one that fails or takes longer costs no other, and what it printed is kept. The folder then
holds ``accelerator.json`` (all rows), ``accelerator.png`` and ``accelerator.md``, a section for
``benchmarks/RESULTS.md``; they are written after every part. ``--tiny`` is for trying the command
itself on a processor.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks import pictures, timing

MINUTES = 9.0
"""Within which everything ends."""

CV = (
    "experiments.cv",
    "--num-folds=2",
    "--folds",
    "0",
    "--train.validations=1",
    "--train.checkpoint-every=1000",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of the part.
        share: of the time that is left when it begins, which it may take.
        arguments: of Python, after ``-m``; ``{json}`` and ``{folder}`` are filled in.
        tiny: the same for a processor.
        needs: a package without which the part is left out.
    """

    name: str
    share: float
    arguments: tuple[str, ...]
    tiny: tuple[str, ...]
    needs: str | None = None


PARTS = (
    Part("tests", 0.2, ("pytest", "-m", "gpu", "-q"), ("pytest", "-m", "gpu", "-q"), "pytest"),
    Part(
        "kernels",
        0.2,
        ("benchmarks.kernels", "--quick", "--json", "{json}"),
        ("benchmarks.kernels", "--quick", "--json", "{json}"),
    ),
    Part(
        "train_step",
        0.55,
        (
            "benchmarks.train_step", "--presets", "volume3d", "slice2d", "small",
            "--variants", "full", "no augmentation", "--json", "{json}",
        ),
        (
            "benchmarks.train_step", "--quick", "--presets", "small", "--variants",
            "no augmentation", "--json", "{json}",
        ),
    ),
    Part(
        "inference",
        0.4,
        ("benchmarks.inference", "--quick", "--json", "{json}"),
        ("benchmarks.inference", "--quick", "--json", "{json}"),
    ),
    Part(
        "cv",
        1.0,
        (*CV, "--data.phantom.num-cases=40", "--train.steps=300", "--output={folder}"),
        (*CV, "--data.phantom.num-cases=8", "--train.steps=4", "--output={folder}"),
        "tensorflow_datasets",
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a part.

    Attributes:
        part: its name.
        command: as it can be typed.
        status: passed, failed, stopped (its time was over) or left out.
        seconds: that it took.
        rows: that it measured.
        printed: its last lines.
    """

    part: str
    command: str
    status: str
    seconds: float
    rows: Sequence[Mapping[str, Any]] = ()
    printed: Sequence[str] = ()


def run_part(part: Part, *, tiny: bool, seconds: float, folder: Path) -> Outcome:
    """Run one part in a process of its own, which ends with all its children after ``seconds``."""
    file, run_folder = folder / f"{part.name}.json", folder / part.name
    shutil.rmtree(run_folder, ignore_errors=True)
    file.unlink(missing_ok=True)
    arguments = [
        text.format(json=file, folder=run_folder)
        for text in (part.tiny if tiny else part.arguments)
    ]
    command = "python -m " + " ".join(arguments).replace(str(folder), folder.name)
    if part.needs is not None and not _is_installed(part.needs):
        return Outcome(part.name, command, f"left out: {part.needs} is not installed", 0.0)
    log, started = folder / f"{part.name}.txt", time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status = f"failed with status {code}"
    if code is None:
        status = f"stopped after {seconds:.0f} s"
    elif code == 0 or (part.name == "tests" and code == _NOTHING_TO_TEST):
        status = "passed"
    rows = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else ()
    lines = log.read_text("utf-8", errors="replace").splitlines()
    return Outcome(part.name, command, status, time.perf_counter() - started, rows, lines[-40:])


_NOTHING_TO_TEST = 5
"""Status of pytest where every test was left out."""


def _is_installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    import importlib.util

    return importlib.util.find_spec(package) is not None


def section(outcomes: Sequence[Outcome], *, command: str) -> str:
    """A section for RESULTS: where, when, by which command, and what every part came to."""
    day = datetime.date.today().isoformat()
    lines = [
        f"## {timing.device()}, {day}",
        "",
        f"{timing.versions()}. Command: `{command}`.",
        "",
        "| part | result | seconds | command |",
        "|---|---|---:|---|",
    ]
    for one in outcomes:
        lines.append(f"| {one.part} | {one.status} | {one.seconds:.0f} | `{one.command}` |")
    for one in outcomes:
        if not one.rows and not one.printed:
            continue
        lines += ["", f"### {one.part}", ""]
        table = [line for line in one.printed if line.startswith("|")]
        if table and one.status == "passed":
            lines += table
        else:
            lines += ["```", *one.printed[-15:], "```"]
    return "\n".join(lines) + "\n"


def plot(outcomes: Sequence[Outcome], file: Path, of: Mapping[str, str | None]) -> None:
    """Two panels: examples a second of every train step, and what each kernel reached."""
    of_part = {one.part: one.rows for one in outcomes}
    figure, (steps, kernels) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    figure.suptitle(pictures.title("Train steps, and kernels against their limit", of))
    rows = of_part.get("train_step", ())
    places = range(len(rows))
    steps.barh(places, [row["examples_per_s"] for row in rows])
    labels = [f"{row['preset']}, {row['variant']}\n{row['crop']} {row['dtype']}" for row in rows]
    steps.set_yticks(places, labels, fontsize=7)
    steps.invert_yaxis()
    steps.set_xlabel("training examples a second")
    rows = [row for row in of_part.get("kernels", ()) if row.get("copy_share") is not None]
    names = [f"{row['op']} {row['shape']} {row['mode']} {row['implementation']}" for row in rows]
    pictures.draw_shares(kernels, rows, names)
    kernels.tick_params(axis="y", labelsize=5)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def run(
    folder: Path, *, tiny: bool, minutes: float, parts: Sequence[Part] = PARTS
) -> list[Outcome]:
    """All parts, one after another; what is known is written after each."""
    folder.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.accelerator" + (" --tiny" if tiny else "")
    of = pictures.account(command)
    end, outcomes = time.perf_counter() + 60 * minutes, []
    for part in parts:
        left = max(end - time.perf_counter(), 0.0)
        print(f"{part.name}: up to {part.share * left:.0f} s", flush=True)
        outcome = run_part(part, tiny=tiny, seconds=part.share * left, folder=folder)
        print(f"{part.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
        found = {**of, "parts": [dataclasses.asdict(one) for one in outcomes]}
        text = json.dumps(found, indent=1) + "\n"
        (folder / "accelerator.json").write_text(text, encoding="utf-8")
        (folder / "accelerator.md").write_text(section(outcomes, command=command), "utf-8")
        plot(outcomes, folder / "accelerator.png", of)
    return outcomes


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; status 1 if a part failed or was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=Path("runs/accelerator"), metavar="FOLDER")
    parser.add_argument("--tiny", action="store_true", help="settings for a processor")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="within which all ends")
    options = parser.parse_args(argv)
    outcomes = run(options.output, tiny=options.tiny, minutes=options.minutes)
    print(f"\n{(options.output / 'accelerator.md').read_text('utf-8')}")
    print(f"{options.output}/accelerator.json, .md and .png")
    if any(one.status.startswith(("failed", "stopped")) for one in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
