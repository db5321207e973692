"""What pictures of benchmarks share: where and when they are of, and bars with an end."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from benchmarks import timing
from experiments.process.environment import git_commit

matplotlib.use("Agg")
from matplotlib.axes import Axes

END = 120.0
"""Where the scale ends, in percent of the limit; bars that go on say their number."""


def account(command: str) -> dict[str, str | None]:
    """What figures are of, for the head of a JSON file: device, versions, time, commit, command."""
    return {
        "command": command,
        "device": timing.device(),
        "versions": timing.versions(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": git_commit(),
    }


def title(what: str, of: Mapping[str, str | None]) -> str:
    """The title of a picture of figures with this ``account``."""
    commit = f", commit {of['commit'][:14]}" if of["commit"] else ""
    return f"{what}\n{of['device']}, {str(of['date'])[:10]}{commit}"


def draw_shares(axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """A bar for each row of ``benchmarks.kernels``: what it reached of a copy or a product.

    Args:
        axes: to draw into.
        rows: each with ``copy_share``, and ``rate_share`` where there is one.
        names: of the rows.
    """
    places = range(len(rows))
    shares = [100 * max(row["copy_share"], row.get("rate_share") or 0) for row in rows]
    colours = ["C1" if row["implementation"] == "pytorch" else "C0" for row in rows]
    axes.barh(places, [min(share, END) for share in shares], color=colours)
    for place, share in zip(places, shares, strict=True):
        if share > END:
            axes.annotate(
                f"{share:.0f} % ▸",
                (END, place),
                xytext=(-2, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=5,
                color="white",
            )
    axes.set_xlim(0, END)
    axes.set_yticks(places, names)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(100, color="0.5", linewidth=1)
    axes.set_xlabel("% of a copy, or of a matrix product, in the same run (orange: PyTorch)")
