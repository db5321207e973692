"""One fold in training: what it is trained on, what it has measured so far, and what it keeps.

``train`` makes the steps, of one fold or of several side by side; each fold accounts for its own.
"""

import csv
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmsad_jax.losses.distillation import COLLAPSED
from cmsad_jax.training import MAP_DISTANCE, TrainState
from data_pipelines.files import atomic_file
from data_pipelines.serving import loading
from data_pipelines.serving.sampling import Sampling
from experiments.process import hosts
from experiments.process.console import RunError, log
from experiments.process.records import decode
from experiments.run_folder import SCHEMA, Best, FoldFolder, FoldSummary, fold_title, fold_words
from experiments.settings.config import Config
from experiments.settings.stored import to_json
from experiments.training.checkpoints import Checkpoints, newest_intact
from experiments.training.feed import Feed, hidden_labels, residency, training_feed
from experiments.training.given_weights import given_weights, start_from

LOG_POINTS = 100
"""Rows of ``history.csv`` that a run's training losses are averaged into."""


RISING = 0.02
"""Dice by which the last look at the validation fold must be the best for it to be still rising."""

MAP_ROWS = 10
"""Rows of which the first mean distance between maps is taken; the last one of twice as many."""


class Fold(NamedTuple):
    """What a fold is: its number from 0, the ids of its cases, and its part of the run folder."""

    number: int
    training: Sequence[str]
    validation: Sequence[str]
    directory: Path

    def standing(self) -> int:
        """Step of its newest intact checkpoint ``last``; 0 if there is none."""
        found = newest_intact(self.checkpoints / "last")
        return 0 if found is None else found[1]["step"]

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints."""
        return FoldFolder(self.directory).checkpoints


class Step(NamedTuple):
    """One step that was made: its number from 1, the cases of its batch, the batch, its metrics."""

    number: int
    case_ids: Sequence[str]
    batch: loading.Batch
    metrics: dict[str, float]


class Call(NamedTuple):
    """What a fold gave to one call of a program: the first of its steps, and of each the batch."""

    first: int
    case_ids: list[list[str]]
    batches: list[loading.Batch]

    def steps(self, metrics: dict[str, np.ndarray]) -> Iterator[Step]:
        """Its steps, with their metrics, once they are made."""
        for i, (case_ids, batch) in enumerate(zip(self.case_ids, self.batches, strict=True)):
            values = {name: float(value[i]) for name, value in metrics.items()}
            yield Step(self.first + i, case_ids, batch, values)


@dataclasses.dataclass
class Progress:
    """What a fold has measured so far: JSON values, saved with every checkpoint.

    Folds side by side share their time: each has an equal part of it, so that their times add up
    and their speeds compare with those of folds in turn.

    Attributes:
        history: rows of ``history.csv``.
        pending: metrics of the counted steps since the last row.
        best: step and score of the best look at the validation fold.
        collapse_said: whether it was said that the distilled maps have collapsed.
        started_from: whose weights it started from, in words.
        skipped, skipped_in_a_row: updates left out because something was not finite.
        first_step_s: of the first step, most of it to compile.
        train_s: all time spent, over all starts.
        steady_s, steady_steps: the same without the first step after each start, and its steps.
    """

    history: list[dict[str, float | None]] = dataclasses.field(default_factory=list)
    pending: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: Best = Best()
    collapse_said: bool = False
    started_from: str = ""
    skipped: int = 0
    skipped_in_a_row: int = 0
    first_step_s: float = 0.0
    train_s: float = 0.0
    steady_s: float = 0.0
    steady_steps: int = 0

    def add_row(self, **facts: float | None) -> dict[str, float | None]:
        """Turn the pending metrics into a row: their means over the steps that made an update."""
        made = [row for row in self.pending if not row["skipped"]]
        row = {
            name: _mean([row[name] for row in made])
            for name in self.pending[0]
            if name != "skipped"
        }
        self.pending = []
        self.history.append(row | facts)
        return self.history[-1]

    def kept_map_distance(self) -> float | None:
        """Which share of the first distance between maps of two examples is left; None too early.

        That is: of the mean over the first rows, in the mean over twice as many of the last.
        """
        of_rows = (row.get(MAP_DISTANCE) for row in self.history)
        rows = [distance for distance in of_rows if distance is not None]
        if len(rows) < 3 * MAP_ROWS:
            return None
        first, last = np.mean(rows[:MAP_ROWS]), np.mean(rows[-2 * MAP_ROWS :])
        return float(last / first) if first > 0 else None

    def count(self, step: Step, title: str) -> None:
        """Keep the metrics of a step, and note whether it made its update."""
        self.pending.append(step.metrics)
        if not step.metrics["skipped"]:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        log(
            f"{title}: step {step.number}: loss or gradient not finite, update skipped; cases "
            + ", ".join(step.case_ids)
        )

    def time(self, seconds: float, steps: int, *, first: bool) -> None:
        """Add the time of a call of some steps, the ``first`` of its program or not."""
        self.train_s += seconds
        if first:
            self.first_step_s = self.first_step_s or seconds
        else:
            self.steady_s += seconds
            self.steady_steps += steps


class FoldInTraining:
    """A fold with its checkpoints and its account; of several processes, the first writes.

    Args:
        config: of the run.
        fold: which one, and where.
        data_fingerprint: of the data set.

    Attributes:
        fold: as given.
        title: for the run's account.
        done: what it has measured.
        start: step after which it goes on.
        too_many: the step by which too many updates in a row were skipped; None as long as there
            is none.
    """

    def __init__(self, config: Config, fold: Fold, data_fingerprint: str):
        self.fold, self.title = fold, fold_title(fold.number, config.num_folds)
        self.done, self.start = Progress(), 0
        self.too_many: Step | None = None
        self._config = config
        self._schedule = config.train.optimizer.schedule(config.train.steps)
        self._log_every = max(1, config.train.steps // LOG_POINTS)
        self._row_from = 0, 0.0
        self._checkpoints = Checkpoints(
            fold.checkpoints, config, fold=fold.number, data_fingerprint=data_fingerprint
        )

    def close(self) -> None:
        """Wait until all checkpoints are written."""
        self._checkpoints.close()

    def resume(self, fresh: TrainState) -> TrainState:
        """The state to go on from, as process 0 finds it; if nothing was saved yet, ``fresh``.

        The latter with the weights that the run is given, as far as they fit.
        """
        state, done, start = fresh, Progress(), 0
        with hosts.first_alone("read its checkpoints"):
            resumed = self._checkpoints.resume(fresh) if hosts.is_first() else None
            if resumed is not None:
                state, record = resumed
                done, start = decode(Progress, record["progress"], "progress"), record["step"]
        start, done.skipped_in_a_row = map(
            int, hosts.broadcast_from_first(np.array([start, done.skipped_in_a_row], np.int32))
        )
        self.done, self.start = done, start
        self._row_from = done.steady_steps, done.steady_s
        if not start:
            return self._with_given_weights(fresh)
        log(f"{self.title}: going on after step {start} of {self._config.train.steps}")
        return hosts.broadcast_from_first(state)

    def _with_given_weights(self, fresh: TrainState) -> TrainState:
        """``fresh``, with the weights that the run is given, which process 0 reads."""
        init, fold, state = self._config.init, self.fold, fresh
        if init is None:
            return fresh
        with hosts.first_alone("read the weights to start from"):
            if hosts.is_first():
                given = given_weights(init, self._config, fold.number, fold.validation)
                state, self.done.started_from = start_from(fresh, given)
                log(f"{self.title}: {self.done.started_from}")
        return hosts.broadcast_from_first(state)

    def count(self, steps: Iterator[Step]) -> None:
        """Account for steps that were made: rows of the history, and whether it can go on."""
        train, done = self._config.train, self.done
        for step in steps:
            done.count(step, self.title)
            if done.skipped_in_a_row >= train.max_skipped:
                self.too_many = self.too_many or step
            if step.number % self._log_every and step.number != train.steps:
                continue
            made = done.steady_steps - self._row_from[0]
            seconds = done.steady_s - self._row_from[1]
            done.add_row(
                step=step.number,
                learning_rate=float(jnp.asarray(self._schedule(step.number - 1))),
                examples_per_s=made * train.batch_size / seconds if seconds else None,
                validation_dice=None,
            )
            self._row_from = done.steady_steps, done.steady_s
            self._warn_of_collapse(step.number)

    def _warn_of_collapse(self, number: int) -> None:
        """Say once if the distilled maps have stopped to depend on the case."""
        kept = self.done.kept_map_distance()
        if self.done.collapse_said or kept is None or kept >= COLLAPSED:
            return
        self.done.collapse_said = True
        log(
            f"{self.title}: step {number}: the distilled attention maps have collapsed: two cases "
            f"differ by {kept:.0%} of what they did at first, so that hardly anything of the image "
            "is taught. Add label to --loss.teachers, or lower --loss.cross-modal-weight and "
            "--loss.self-weight."
        )

    def look(self, number: int, score: float | None, state: TrainState) -> None:
        """Note the validation Dice after step ``number``, and keep the state if it is the best."""
        if self.done.history:
            self.done.history[-1]["validation_dice"] = score
        best = self.done.best.validation_dice
        if score is not None and (best is None or score > best):
            self.done.best = Best(number, score)
            self._checkpoints.save("best", state, step=number)

    def say_if_still_rising(self) -> None:
        """Say if the schedule ended while the last look was clearly the best, and what more costs.

        Of two looks or more. A rise is no promise: the rate of learning falls to the end of any
        schedule, and with it the noise.
        """
        rows = (row["validation_dice"] for row in self.done.history)
        looks = [score for score in rows if score is not None]
        if len(looks) < 2 or (rise := looks[-1] - max(looks[:-1])) < RISING:
            return
        steps, seconds = self._config.train.steps, self.done.train_s
        log(
            f"{self.title}: the schedule ended while validation Dice still rose, by {rise:.3f} to "
            f"{looks[-1]:.3f} at its last look. Twice the steps may find more, for about "
            f"{max(seconds / 60, 0.1):.1f} minutes more a fold: --train.steps={2 * steps} with a "
            "new --output."
        )

    def save(self, number: int, state: TrainState) -> None:
        """Begin to write the checkpoint ``last``, of the state after step ``number``."""
        self._checkpoints.save("last", state, step=number, progress=dataclasses.asdict(self.done))

    def saved(self, number: int) -> None:
        """Return, and say so, once the state after step ``number`` is written."""
        self._checkpoints.wait()
        log(f"{self.title}: saved after step {number} of {self._config.train.steps}")

    def give_up(self, number: int, state: TrainState) -> RunError:
        """Save the state after step ``number``, and what is needed to repeat ``too_many``.

        Skipped steps leave the state as it was, so that it is also that before the step, unless a
        finite step followed in the same call of several. Of several processes the first writes,
        with its part of the batch.

        Returns:
            The error that ends the run.
        """
        step = self.too_many
        assert step is not None, "a fold that can go on is saved"
        file = FoldFolder(self.fold.directory).not_finite(step.number)
        error = RunError(
            f"loss and gradient must be finite; got {self._config.train.max_skipped} steps in a "
            f"row of {fold_words(self.fold.number)} that are not, up to step {step.number}. See "
            f"python -m experiments.reproduce {file}; use a lower "
            "--train.optimizer.learning-rate, or run again to go on regardless."
        )
        if not hosts.is_first():
            return error
        facts = {
            "schema": SCHEMA,
            "config": to_json(self._config),
            "fold": self.fold.number,
            "step": step.number,
            "case_ids": step.case_ids,
        }
        arrays = {f"state/{name}": value for name, value in state_arrays(state).items()}
        arrays |= {f"batch/{name}": np.asarray(value) for name, value in step.batch.items()}
        with atomic_file(file) as partial:
            np.savez_compressed(partial, allow_pickle=False, facts=json.dumps(facts), **arrays)
        self.done.skipped_in_a_row = 0
        self.save(number, state)
        self._checkpoints.wait()
        return error

    def summary(self) -> FoldSummary:
        """What its training took and came to, after ``history.csv`` is written."""
        done = self.done
        if hosts.is_first():
            self.say_if_still_rising()
            write_history(FoldFolder(self.fold.directory).history, done.history)
        steady_s = max(done.steady_s, 1e-9)
        return FoldSummary(
            first_step_s=round(done.first_step_s, 2),
            train_s=round(done.train_s, 2),
            examples_per_s=round(done.steady_steps * self._config.train.batch_size / steady_s, 2),
            steps_per_s=round(done.steady_steps / steady_s, 3),
            loss=done.history[-1]["loss"] if done.history else None,
            skipped_updates=done.skipped,
            best=done.best,
            started_from=done.started_from,
        )


def train_batches(
    config: Config,
    source: loading.CaseSource,
    fold: Fold,
    *,
    start: int = 0,
    num_folds: int = 1,
) -> Feed:
    """Batches for the steps of a fold after ``start``; the same however often it was resumed.

    ``num_folds`` are fed at a time, which is a matter of memory alone.
    """
    train = config.train
    if start == train.steps:
        return Feed(iter(()))
    share, seed = train.foreground_share, config.seed * 1000 + fold.number
    unlabelled: frozenset[str] = frozenset()
    if train.unlabelled:
        unlabelled = hidden_labels(source, fold.training, share=train.unlabelled, seed=seed)
        log(
            f"{fold_words(fold.number)}: {len(fold.training) - len(unlabelled)} training cases "
            f"with a label, {len(unlabelled)} without"
        )
    labelled = [case_id for case_id in fold.training if case_id not in unlabelled]
    if share and not any(source.foreground(case_id).size for case_id in labelled):
        share = 0.0
        title = fold_words(fold.number)
        log(f"{title}: no training case holds the target; crops are drawn at random")
    sampling = Sampling(
        crop=train.crop,
        batch_size=train.batch_size,
        num_steps=train.steps,
        seed=seed,
        foreground_share=share,
        unlabelled=unlabelled,
        start_step=start,
        part=hosts.part(),
        num_threads=train.read_threads,
    )
    where, _ = residency(config, source, num_folds=num_folds)
    return training_feed(source, fold.training, sampling, where=where)


def _mean(values: Sequence[float]) -> float | None:
    """Mean of what was measured; a metric that a step could not measure is NaN."""
    if np.isnan(values).all():
        return None
    return float(np.nanmean(values))


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Every array of a state by the path of its leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def write_history(path: Path, history: Sequence[dict[str, float | None]]) -> None:
    """Training curves as CSV; empty cells where nothing was measured."""
    names = ["step", *(name for name in history[0] if name != "step")]
    with atomic_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
