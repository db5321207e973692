"""Every benchmark, one after another, and one table of all that was measured.

``python -m benchmarks --quick`` takes some minutes on two cores; ``--json FILE`` keeps the rows,
``--plot FILE`` draws the kernels' share of what a copy or a matrix product reaches. A part that
fails is named at the end, with exit status 1, and costs no other.
"""

import argparse
import importlib
import json
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks import pictures, timing

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


def run(
    parts: Sequence[str],
    *,
    quick: bool,
    of: dict[str, str | None],
    keep: Path | None = None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What each part wrote as JSON, and those that failed; a part's own table goes to stdout.

    ``keep``: file for the rows of all parts, written after each, headed by ``of``, their account.
    """
    found, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in parts:
            file = Path(folder) / f"{name}.json"
            arguments = PARTS[name][0 if quick else 1]
            started = time.perf_counter()
            part = importlib.import_module(f"benchmarks.{name}")
            try:
                part.main([*arguments, "--json", str(file)])
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            found[name] = json.loads(file.read_text("utf-8"))
            found[name]["seconds"] = time.perf_counter() - started
            if keep:
                keep.write_text(
                    json.dumps({"about": of, **found}, indent=2) + "\n", encoding="utf-8"
                )
    return found, failed


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


def plot(found: dict[str, dict[str, Any]], file: Path, of: dict[str, str | None]) -> None:
    """Bars: what each kernel reached of its limit; ``of`` is the account of the figures."""
    rows = [row for row in found.get("kernels", {"rows": []})["rows"] if "copy_share" in row]
    labels = [
        " ".join((row["op"], row["shape"], row["dtype"], row["mode"], row["implementation"]))
        for row in rows
    ]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.25 * max(len(rows), 4)), layout="constrained")
    figure.suptitle(pictures.title("Kernels against their limit", of), fontsize=9)
    pictures.draw_shares(axes, rows, labels)
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
    words = ["--quick"] if options.quick else []
    words += [] if options.parts == list(PARTS) else ["--parts", *options.parts]
    of = pictures.account(" ".join(["python -m benchmarks", *words]))
    found, failed = run(options.parts, quick=options.quick, of=of, keep=options.json)
    print(f"\n{timing.device()}; {timing.versions()}\n")
    print(long_table(found))
    print("\n" + ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in found.items()))
    if options.plot:
        plot(found, options.plot, of)
    if failed:
        raise SystemExit(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
