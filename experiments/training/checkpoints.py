"""Checkpoints that are whole or not there: written by Orbax, sealed by a manifest of SHA-256 sums.

A checkpoint is a folder ``<run>/fold_<i>/checkpoints/<last|best>/<step>`` that holds

* ``state/``: a ``TrainState`` as Orbax writes it, of host arrays, so that it restores onto any
  device and any number of them;
* ``record.json``: schema version, step, fold, fingerprint of the data, configuration (with the
  preprocessing, so that a checkpoint is enough to predict with) and the progress of training;
* ``manifest.json``: the SHA-256 of every other file.

It is written in a thread under a temporary name, the manifest last, and renamed. Whoever reads it
verifies the manifest first, because Orbax restores flipped bytes without noticing.
"""

import dataclasses
import errno
import json
import logging
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import jax
import numpy as np

from cmsad_jax.training import TrainState
from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError, MissingDataError
from data_pipelines.files import naming_path
from experiments.prediction.windows import Params
from experiments.process.console import log
from experiments.process.storage import file_sha256
from experiments.run_folder import RunFolder
from experiments.settings.config import Config
from experiments.settings.stored import differences, from_json, to_json

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

SCHEMA = 2
"""Version of the layout above. Raise it with any change of it, and add to ``MIGRATIONS``.

1: the optimizer's moments were trees as the weights are; 2: they are one array for all weights.
"""


class Record(TypedDict):
    """What a checkpoint says of itself: ``record.json``.

    ``progress`` is what was given to be found again, ``written_schema`` the schema of a file that
    was migrated.
    """

    schema: int
    step: int
    fold: int
    data_fingerprint: str
    config: dict[str, Any]
    progress: Mapping[str, object]
    written_schema: NotRequired[int]


MIGRATIONS: dict[int, Callable[[Record], Record]] = {1: lambda record: record}
"""From version ``n`` to ``n + 1``: what turns a record of the one into a record of the other."""


KEEP = {"last": 2, "best": 1}
"""How many checkpoints of each name are kept; the older ``last`` serves if the newer is damaged."""


_STATE, _RECORD, _MANIFEST = "state", "record.json", "manifest.json"


class CorruptCheckpointError(DataError):
    """A checkpoint whose files are not those that were written."""


class Checkpoints:
    """The checkpoints ``last`` and ``best`` of one fold.

    Args:
        directory: of the fold's checkpoints; created at the first ``save``.
        config: of the run; a checkpoint of another configuration is never restored.
        fold: likewise.
        data_fingerprint: likewise; empty accepts any data.
    """

    def __init__(
        self, directory: Path, config: Config, *, fold: int = 0, data_fingerprint: str = ""
    ):
        self._directory = directory.absolute()
        self._config = config
        self._fold, self._data_fingerprint = fold, data_fingerprint
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: deque[Future[None]] = deque()
        self._failed = False

    def save(
        self,
        name: str,
        state: TrainState,
        *,
        step: int | None = None,
        progress: Mapping[str, object] | None = None,
    ) -> None:
        """Begin to write ``state``; older ones of that name go once this one is complete.

        Args:
            name: ``last`` or ``best``.
            state: copied at once, so it may be donated to the next step.
            step: of the run; by default ``state.step``. Where a step is there, it is replaced.
            progress: JSON values to find again at ``resume``.

        Raises:
            OSError: a write before this one failed; it names the path.
        """
        while len(self._writing) > 1 or (self._writing and self._writing[0].done()):
            self._writing.popleft().result()
        host = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        step = int(host.step) if step is None else step
        record: Record = {
            "schema": SCHEMA,
            "step": step,
            "fold": self._fold,
            "data_fingerprint": self._data_fingerprint,
            "config": to_json(self._config),
            "progress": dict(progress or {}),
        }
        self._writing.append(self._writer.submit(self._write_in_turn, name, host, record))

    def restore(self, name: str, like: TrainState) -> TrainState:
        """The newest intact checkpoint of that name, with the structure and placement of ``like``.

        Raises:
            MissingDataError: there is none.
            CorruptCheckpointError: none of those that are there is intact.
            ConfigError: it belongs to another run.
        """
        found = self._newest(name)
        if found is None:
            raise MissingDataError(
                f"a checkpoint {name!r} is needed; none in {self._directory}. Train the fold first."
            )
        return _restore_state(*found, like)

    def resume(self, like: TrainState) -> tuple[TrainState, Record] | None:
        """State, and record, of the newest intact ``last``; None if nothing was saved yet."""
        found = self._newest("last")
        return None if found is None else (_restore_state(*found, like), found[1])

    def wait(self) -> None:
        """Return once everything is written; a fault of the writing is raised here."""
        while self._writing:
            self._writing.popleft().result()

    def close(self) -> None:
        """Wait for everything that is being written, and end the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _newest(self, name: str) -> tuple[Path, Record] | None:
        self.wait()
        found = newest_intact(self._directory / name)
        if found is None:
            return None
        path, record = found
        changed = differences(to_json(from_json(Config, record["config"])), to_json(self._config))
        if record["fold"] != self._fold:
            changed.append(f"fold: {record['fold']} -> {self._fold}")
        if self._data_fingerprint not in ("", record["data_fingerprint"]):
            changed.append(
                f"data_fingerprint: {record['data_fingerprint']} -> {self._data_fingerprint}"
            )
        if changed:
            raise ConfigError(
                f"a checkpoint must belong to the run that continues it; {path} differs:\n  "
                + "\n  ".join(changed)
                + "\nRemove the fold's folder to train it anew."
            )
        return path, record

    def _write_in_turn(self, name: str, state: TrainState, record: Record) -> None:
        """Write, unless a write before this one failed.

        What was to be written next may wait already. A ``last`` whose ``best`` is not there would
        be gone on from, and ``best`` never written.
        """
        if self._failed:
            return
        try:
            self._write(name, state, record)
        except BaseException:
            self._failed = True
            raise

    def _write(self, name: str, state: TrainState, record: Record) -> None:
        import orbax.checkpoint as ocp

        folder = self._directory / name
        final = folder / f"{record['step']:08d}"
        partial = folder / f".{final.name}.tmp"
        with naming_path(final, "write the checkpoint", faults=(Exception,)):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".*.tmp"):  # of a process that was killed
                shutil.rmtree(left)
            _need_room(folder, state)
            try:
                partial.mkdir()
                with _checkpointer() as checkpointer:
                    checkpointer.save(partial / _STATE, args=ocp.args.PyTreeSave(state))
                (partial / _RECORD).write_text(json.dumps(record), encoding="utf-8")
                (partial / _MANIFEST).write_text(
                    json.dumps(_sums(partial), indent=1), encoding="utf-8"
                )
                if final.exists():
                    final.rename(folder / f".{final.name}.old.tmp")
                partial.rename(final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(folder / f".{final.name}.old.tmp", ignore_errors=True)
            older = [path for path in _steps(folder) if path.name < final.name]
            kept = [final, *older[: KEEP[name] - 1]]
            for path in _steps(folder):
                if path not in kept:  # older, or newer and skipped as damaged
                    shutil.rmtree(path)


def _need_room(folder: Path, state: TrainState) -> None:
    """Raise what a full disk raises, before Orbax meets it, whose threads print pages of errors.

    Raises:
        OSError: there is less room than the arrays and their descriptions take.
    """
    leaves = jax.tree.leaves(state)
    needed = sum(leaf.nbytes for leaf in leaves) + 1024 * len(leaves)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _news(record: logging.LogRecord) -> bool:
    """Whether a message is none of the tracebacks that Orbax logs for errors that it raises too."""
    return "_SignalingThread" not in record.getMessage()


logging.getLogger("absl").addFilter(_news)


def _without_late_answers(fault: "sys.UnraisableHookArgs") -> None:
    """Pass over what TensorStore's threads answer after a write failed, to whom nobody listens."""
    late = fault.object is None and str(fault.exc_value) == "Event loop is closed"
    if not late:
        _report_unraisable(fault)


_report_unraisable = sys.unraisablehook


sys.unraisablehook = _without_late_answers


def newest_intact(folder: Path) -> tuple[Path, Record] | None:
    """Path and record of the newest checkpoint in ``folder`` that is as it was written.

    Damaged ones are skipped and named in the log.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        CorruptCheckpointError: there are some, and none is intact.
    """
    faults = []
    for path in _steps(folder):
        try:
            record = read_record(path)
        except CorruptCheckpointError as error:
            faults.append(str(error))
            log(f"skipped: {error}")
            continue
        if faults:
            log(f"using the newest intact checkpoint instead: {path}")
        return path, record
    if faults:
        raise CorruptCheckpointError(
            f"one checkpoint in {folder} must be intact; got {len(faults)} damaged. "
            "Restore them from a copy, or remove the fold's folder to train it anew."
        )
    return None


def read_record(path: Path) -> Record:
    """The record of the checkpoint ``path``, in today's schema, after verifying every file.

    Where it was written in an older one, ``written_schema`` says which.

    Raises:
        CorruptCheckpointError: a file is missing, added or changed.
        DataError: it was written by a later version.
    """
    try:
        expected = json.loads((path / _MANIFEST).read_text("utf-8"))
        found = _sums(path)
    except (OSError, ValueError) as error:
        raise CorruptCheckpointError(
            f"a checkpoint must hold a readable manifest; {path}: {error}. Use another one."
        ) from error
    if expected != found:
        names = sorted(
            name
            for name in (expected.keys() if isinstance(expected, dict) else set()) | found.keys()
            if not isinstance(expected, dict) or expected.get(name) != found.get(name)
        )
        raise CorruptCheckpointError(
            f"a checkpoint's files must be as they were written; {path} differs in "
            f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}. Use another one."
        )
    record: Record = json.loads((path / _RECORD).read_text("utf-8"))
    if record["schema"] > SCHEMA:
        raise DataError(
            f"checkpoints of schema {SCHEMA} and before can be read; {path} has "
            f"{record['schema']}. Use the version that wrote it, or a later one."
        )
    while record["schema"] < SCHEMA:
        schema = record["schema"]
        written = record.get("written_schema", schema)
        migrated = MIGRATIONS[schema](record)
        record = {**migrated, "schema": schema + 1, "written_schema": written}
    return record


def load_params(run: Path, fold: int, *, checkpoint: str = "last") -> Params:
    """The weights to predict with, of a fold of the run folder ``run``.

    They are the moving average where the run kept one, which is what its results were measured
    with.

    Args:
        run: run folder of ``experiments.cv``.
        fold: from 0.
        checkpoint: ``last``, or ``best`` (chosen on the validation fold).

    Returns:
        Nested dictionaries of NumPy arrays: the ``params`` of ``cmsad_jax.CMSAD``.

    Raises:
        MissingDataError: the fold has no such checkpoint.
        DataError: its training has not ended.
        CorruptCheckpointError: no checkpoint of it is intact.
    """
    folder = RunFolder(Path(run).absolute()).fold(fold).checkpoints / checkpoint
    found = newest_intact(folder)
    if found is None:
        raise MissingDataError(
            f"fold {fold} must have a checkpoint {checkpoint!r}; none in {folder}. "
            "Train it with python -m experiments.cv."
        )
    path, record = found
    steps = record["config"]["train"]["steps"]
    if checkpoint == "last" and record["step"] < steps:
        raise DataError(
            f"training must have ended; {path} is of step {record['step']} of {steps}. "
            "Finish the fold with python -m experiments.cv."
        )
    with _checkpointer() as checkpointer:
        tree = checkpointer.metadata(path / _STATE).item_metadata.tree
        wanted = jax.tree.map(lambda _: 0, {"average": tree["average"]})
        return checkpointer.restore(
            path / _STATE,
            args=_as_arrays(wanted, partial_restore=True),
        )["average"]


def _restore_state(path: Path, record: Record, like: TrainState) -> TrainState:
    """The state of a verified checkpoint, placed as ``like`` is."""
    separate = record.get("written_schema", SCHEMA) < 2
    stored = _with_separate_moments(like) if separate else like
    with _checkpointer() as checkpointer:
        try:
            state = checkpointer.restore(path / _STATE, args=_as_arrays(stored))
        except (KeyError, ValueError) as error:
            raise ConfigError(_other_network(path, record, str(error).splitlines()[0])) from error

    if separate:
        state = _with_joined_moments(state, like)

    def place(key_path, value, target):
        if value.shape != target.shape or value.dtype != target.dtype:
            name = jax.tree_util.keystr(key_path)
            came = f"{name} is {value.dtype}{value.shape}, not {target.dtype}{target.shape}"
            raise ConfigError(_other_network(path, record, came))
        return jax.device_put(value, target.sharding)

    return jax.tree_util.tree_map_with_path(place, state, like)


def _with_separate_moments(state: TrainState) -> TrainState:
    """As schema 1 has it: moments are trees as the weights are."""
    opt_state = jax.tree.map(
        lambda leaf: state.params if _is_moment(leaf, state) else leaf, state.opt_state
    )
    return dataclasses.replace(state, opt_state=opt_state)


def _with_joined_moments(state: TrainState, like: TrainState) -> TrainState:
    """``state`` of schema 1 with each moment as one array, where ``like`` has one."""

    def joined(target, value):
        if not _is_moment(target, like):
            return value
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(value)])

    opt_state = jax.tree.map(joined, like.opt_state, state.opt_state)
    return dataclasses.replace(state, opt_state=opt_state)


def _is_moment(leaf: Any, state: TrainState) -> bool:
    return leaf.shape == (sum(weight.size for weight in jax.tree.leaves(state.params)),)


def _checkpointer() -> "ocp.Checkpointer":
    """Orbax for this process alone: of several, only one writes and reads, and waits for none."""
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="checkpoint",
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    )


def _other_network(path: Path, record: Record, came: str) -> str:
    return (
        f"a checkpoint must hold the weights of the network that asks for them; {path} (step "
        f"{record['step']}): {came}. Use the version and configuration that it was written with."
    )


def _as_arrays(tree: Any, *, partial_restore: bool = False) -> "ocp.args.PyTreeRestore":
    """To restore a tree of this structure as host arrays."""
    import orbax.checkpoint as ocp

    return ocp.args.PyTreeRestore(
        item=tree,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree),
        partial_restore=partial_restore,
    )


def _steps(folder: Path) -> list[Path]:
    """Folders of the checkpoints in ``folder``, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), reverse=True)


def _sums(path: Path) -> dict[str, str]:
    """SHA-256 of every file below ``path`` but the manifest, by relative name."""
    return {
        str(file.relative_to(path)): file_sha256(file)
        for file in _files(path)
        if file != path / _MANIFEST
    }


def _files(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.rglob("*")) if not file.is_dir())
