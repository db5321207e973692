"""Every benchmark, one after another, and one table of all that was measured.

``python -m benchmarks --quick`` takes some minutes on two cores; ``--json FILE`` keeps the rows,
``--plot FILE`` draws the kernels' share of the copy bandwidth.
"""

import argparse
import importlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import timing

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PARTS: dict[str, tuple[list[str], list[str]]] = {
    "kernels": (["--quick"], []),
    "train_step": (
        ["--quick", "--presets", "volume3d", "slice2d", "--variants", "no augmentation"],
        ["--presets", "small", "volume3d", "slice2d"],
    ),
    "input_pipeline": (["--num-cases", "20", "--num-workers", "1"], []),
    "inference": (["--quick"], []),
    "cv": (["--quick"], []),
}
"""Module to its arguments, quick and in full."""

_NOT_RESULTS = ("device", "versions")


def run(parts: Sequence[str], *, quick: bool) -> dict[str, dict[str, Any]]:
    """What each part wrote as JSON; its own table goes to stdout."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in parts:
            file = Path(folder) / f"{name}.json"
            arguments = PARTS[name][0 if quick else 1]
            started = time.perf_counter()
            importlib.import_module(f"benchmarks.{name}").main([*arguments, "--json", str(file)])
            found[name] = json.loads(file.read_text("utf-8"))
            found[name]["seconds"] = time.perf_counter() - started
    return found


def long_table(found: dict[str, dict[str, Any]]) -> str:
    """One line for each row: the texts that say what it is, and every number with its name."""
    lines = [("benchmark", "what", "result")]
    for name, part in found.items():
        for row in part["rows"]:
            row = {key: value for key, value in row.items() if key not in _NOT_RESULTS}
            texts = [value for value in row.values() if isinstance(value, str)]
            numbers = [
                f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float)
            ]
            lines.append((name, " ".join(texts), ", ".join(numbers)))
    return timing.markdown(lines)


def plot(found: dict[str, dict[str, Any]], file: Path) -> None:
    """Bars: the share of the copy bandwidth that each kernel reached."""
    rows = [row for row in found.get("kernels", {"rows": []})["rows"] if "copy_share" in row]
    labels = [
        " ".join((row["op"], row["shape"], row["mode"], row["implementation"])) for row in rows
    ]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.25 * max(len(rows), 4)), layout="constrained")
    colours = ["C1" if row["implementation"] == "pytorch" else "C0" for row in rows]
    axes.barh(labels, [100 * row["copy_share"] for row in rows], color=colours)
    axes.invert_yaxis()
    axes.axvline(100, color="0.5", linewidth=1)
    axes.set_xlabel("share of the copy bandwidth of the same run (%)")
    axes.tick_params(axis="y", labelsize=6)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, few calls")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them into FILE (PNG)")
    options = parser.parse_args(arguments)
    found = run(options.parts, quick=options.quick)
    print(f"\n{timing.device()}; {timing.versions()}\n")
    print(long_table(found))
    print("\n" + ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in found.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
