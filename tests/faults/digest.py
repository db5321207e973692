"""Hashes of everything in a run folder that must not depend on interruptions."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.process.storage import HOLDER, LOCK
from experiments.training.checkpoints import newest_intact

TIMES = {
    "first_step_s",
    "train_s",
    "steady_s",
    "steady_steps",
    "examples_per_s",
    "steps_per_s",
    "input_wait_share",
    "predict_s",
    "peak_memory_gb",
}
"""Fields that tell time and memory: two undisturbed runs differ in them."""

_PLACE_AND_TIME = re.compile(
    r"Run `|\| (output|folds_file|data\.cache|Training examples per second|Fold \d+: .*) \|"
)
"""Lines of ``report.md`` that tell where and how fast; all after the heading Environment do."""


def digest(run: Path) -> dict[str, str]:
    """A hash for each file of a run folder, finished or not, and for each fold's checkpoints.

    Files are compared by their bytes, but without times and the run's own name where they tell
    them; of checkpoints the newest ``last`` and the ``best``: state, step and progress. What a
    killed process left half-written is a name of its own.
    """
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file() or path.name[0] == "."):
        name = str(path.relative_to(run))
        if path.name in (LOCK, HOLDER, "environment.json", "log.txt"):  # times, versions
            continue
        if name.startswith("fold_") and "/checkpoints/" in name and "/." not in name:
            continue  # below; Orbax draws the names of its files
        if "/tensorboard/" in name:  # times; written from history.csv
            name, content = f"{Path(name).parent}/events", b""
        else:
            content = _CONTENT.get(path.name, Path.read_bytes)(path) if path.is_file() else b""
        found[name] = hashlib.sha256(content).hexdigest()
    for fold in sorted(run.glob("fold_*")):
        for checkpoint in ("last", "best"):
            newest = newest_intact(fold / "checkpoints" / checkpoint)
            if newest is not None:
                found[f"{fold.name} {checkpoint}"] = _checkpoint(*newest)
    return found


def _checkpoint(path: Path, record: dict[str, Any]) -> str:
    """Hash of a checkpoint: every array of its state, and its record but for the configuration."""
    facts = _without_times({name: record[name] for name in record.keys() - {"config"}})
    sums = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path / "state").item_metadata.tree
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(
            path / "state", args=ocp.args.PyTreeRestore(restore_args=as_arrays)
        )
    for leaf, value in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(value)
        sums.update(f"{jax.tree_util.keystr(leaf)} {array.dtype} {array.shape}".encode())
        sums.update(array.tobytes())
    return sums.hexdigest()


def _without_times(value: Any) -> Any:
    """JSON values without the fields of ``TIMES``, at any depth."""
    if isinstance(value, dict):
        return {name: _without_times(v) for name, v in value.items() if name not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _json(path: Path) -> bytes:
    return json.dumps(_without_times(json.loads(path.read_bytes()))).encode()


def _config(path: Path) -> bytes:
    """``config.json`` without the places of data, folds and run."""
    record = json.loads(path.read_bytes())
    del record["config"]["output"], record["config"]["data"]["cache"]
    record["config"].pop("folds_file", None)  # earlier versions knew none
    return json.dumps(record).encode()


def _history(path: Path) -> bytes:
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
    return json.dumps(_without_times(rows)).encode()


def _markdown(path: Path) -> bytes:
    facts = path.read_text("utf-8").partition("\n## Environment\n")[0]
    kept = [line for line in facts.splitlines() if not _PLACE_AND_TIME.match(line)]
    return "\n".join(kept).encode()


def _pictures(path: Path) -> bytes:
    """The pictures of ``report.html``; its facts are those of ``report.md``."""
    return "\n".join(re.findall(r"data:image/png;base64,[^\"']+", path.read_text("utf-8"))).encode()


_CONTENT: dict[str, Callable[[Path], bytes]] = {
    "config.json": _config,
    "history.csv": _history,
    "metrics.json": _json,
    "report.html": _pictures,
    "report.md": _markdown,
}
