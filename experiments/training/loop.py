"""The loop that makes the steps of a fold, or of several side by side."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from cmsad_jax import parallel
from cmsad_jax.training import TrainState
from data_pipelines.case import Case
from data_pipelines.progress import doing, duration, progress
from data_pipelines.serving import loading
from data_pipelines.targets import IGNORED, foreground
from experiments.measuring.metrics import to_mask
from experiments.prediction.windows import Params, predict_case
from experiments.process import hosts
from experiments.process.accelerator import uncollected
from experiments.process.console import log
from experiments.process.signals import deferred_signals
from experiments.run_folder import FoldSummary
from experiments.settings.config import Config
from experiments.training import memory
from experiments.training.feed import Feed
from experiments.training.fold import Call, Fold, FoldInTraining, train_batches
from experiments.training.programs import Programs, validation_steps


def reference_dice(
    programs: Programs, params: Params, cases: Iterator[Case], config: Config
) -> float | None:
    """Mean Dice on the reference grid over the foreground classes of cases that have them.

    A quick look for choosing a checkpoint; results are computed in the original T2W frame.
    """
    scores = []
    for case in cases:
        if not foreground(case.label).any():
            continue
        probability = predict_case(programs.predict, params, case, config)
        mask = to_mask(probability, config.predict.threshold)
        target = config.data.definition
        mask[case.label == IGNORED] = 0
        for index in range(len(target.classes)):
            truth, found = target.mask_of(case.label, index), target.mask_of(mask, index)
            if truth.any():
                scores.append(2 * (truth & found).sum() / (truth.sum() + found.sum()))
    return float(np.mean(scores)) if scores else None


class Rest(NamedTuple):
    """What a run has still to do after some folds: how often as much, and how long it took so far.

    Attributes:
        times: how many groups of folds follow.
        each_s: what a group took from its first step to its last figure; None before one is done.
    """

    times: int = 0
    each_s: float | None = None


NOTHING_LEFT = Rest()


def train_folds(
    config: Config,
    programs: Programs,
    source: loading.CaseSource,
    folds: Sequence[Fold],
    rest: Rest = NOTHING_LEFT,
) -> list[tuple[Params, FoldSummary]]:
    """Train a fold, or several that stand at the same step side by side, or what is left of them.

    Writes ``history.csv`` and the checkpoints ``last`` and ``best`` into the folder of each, and
    goes on from the newest intact ``last`` there: in the same groups on the same devices, the
    result is bit for bit that of a run never interrupted. Of several processes, the first alone
    reads and writes there.

    Returns:
        For each fold the weights to evaluate, and a summary. The weights are the last ones (their
        moving average if configured), never ``best``.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
        RunError: too many updates in a row were not finite, or a step needs too much memory.
        OSError: a checkpoint cannot be written; it names the path.
    """
    with contextlib.ExitStack() as closing, deferred_signals() as stop:
        members = [FoldInTraining(config, fold, source.fingerprint) for fold in folds]
        for member in members:
            closing.callback(member.close)
        training = Training(config, programs, source, members, rest)
        # Until the first program is compiled, which may take minutes in which Python stands still.
        stop.nothing_to_save = not jax.distributed.is_initialized()
        while training.number < config.train.steps:
            training.make()
            stop.nothing_to_save = False
            stopping = stop.after_step()
            saving = stopping or training.saves(training.number)
            training.count(everything=saving)
            if training.stuck:
                training.give_up()
            if not saving:
                continue
            states = training.states()
            if training.number in training.check_at:
                training.look(states)
            training.save(states)
            if stopping:
                training.say_saved()
                break
    return training.results()


class Made(NamedTuple):
    """A call that was made: what each fold gave, what came of it, and whether it was compiled."""

    calls: list[Call]
    metrics: dict[str, jax.Array]
    """Numbers, with an axis of folds if there are several, and then one of steps likewise."""
    first: bool

    @property
    def size(self) -> int:
        """How many steps it made."""
        return len(self.calls[0].batches)


class Training:
    """Folds in training side by side: their state on the devices, and the calls not counted yet.

    Looking at a call waits for it: one call behind, the device is kept busy.

    Args:
        config: of the run.
        programs: of the run.
        source: all cases.
        members: the folds, which all go on from the same step.
        rest: of the run, for the time that is left.

    Attributes:
        number: of steps made.
        check_at: steps after which the validation folds are looked at.
    """

    def __init__(
        self,
        config: Config,
        programs: Programs,
        source: loading.CaseSource,
        members: Sequence[FoldInTraining],
        rest: Rest = NOTHING_LEFT,
    ):
        self._config, self._programs, self._source = config, programs, source
        self._members = members
        self._place, _ = programs.of_folds(len(members))
        self.check_at = validation_steps(config)
        seed = jax.random.key(config.seed)
        self._state = self._place.place_state(
            [
                member.resume(programs.init(jax.random.fold_in(seed, member.fold.number)))
                for member in members
            ]
        )
        (self.number,) = {member.start for member in members}  # see ``groups``
        self._feeds = [
            train_batches(config, source, member.fold, start=self.number, num_folds=len(members))
            for member in members
        ]
        self._uncounted: list[Made] = []
        self._compiled: set[int] = set()
        self._needed: memory.Estimate | None = None
        self._opened = self._mark = time.perf_counter()
        title = ", ".join(member.title for member in members)
        self._bar = progress(
            (),
            description=f"{title} training",
            total=config.train.steps,
            initial=self.number,
        )
        self._rest = rest
        self._bar.remark = self.time_left

    def time_left(self) -> str:
        """Of the whole run, where it goes on after these folds; what is not known is left out."""
        left_s, made = self._bar.left_s, self._bar.n - self._bar.initial
        if left_s is None or not self._rest.times or made >= self._config.train.steps:
            return ""
        each_s = self._rest.each_s
        if each_s is None:
            each_s = (
                left_s * self._config.train.steps / max(self._config.train.steps - self.number, 1)
            )
        return f"; of the run about {duration(left_s + self._rest.times * each_s)}"

    def saves(self, number: int) -> bool:
        """Whether something is saved after a step."""
        train = self._config.train
        due = number in self.check_at or number == train.steps
        return due or number % train.checkpoint_every == 0

    def make(self) -> None:
        """Start the next call."""
        training = [member.fold.training for member in self._members]
        with memory.explained(self._config):
            calls, placed, program = next_call(
                self._config, self._programs, self._feeds, self.number, self.saves, training
            )
            step, size = program.step, len(calls[0].batches)
            first = size not in self._compiled
            if first:
                step = uncollected(step)
                resident = sum(feed.resident_bytes for feed in self._feeds)
                self._needed = uncollected(memory.check)(
                    self._config, program.step, self._state, placed, resident_bytes=resident
                )
        with memory.explained(self._config, self._needed), self._compiling(first, size):
            self._state, metrics = step(self._state, placed)
            if first:
                jax.block_until_ready(self._state)
        self._compiled.add(size)
        self.number += size
        self._uncounted.append(Made(calls, metrics, first))

    @contextlib.contextmanager
    def _compiling(self, first: bool, size: int) -> Iterator[None]:
        """Say that a program is compiled, the first time in the process, and how long it took."""
        if not first or size in self._programs.compiled_s:
            yield
            return
        what = "the training step" if size == 1 else f"{size} training steps in one"
        kept = ", kept for later runs" if self._config.compilation_cache else ""
        log(f"compiling {what}{kept}")
        started = time.perf_counter()
        with doing(f"compiling {what}"):
            yield
        taken_s = self._programs.compiled_s[size] = time.perf_counter() - started
        log(f"compiled in {duration(taken_s)}, with the first step")

    def count(self, *, everything: bool) -> None:
        """Let each fold account for the calls that are done: all but the last, or ``everything``.

        The last one too where a fold may have to stop at it.
        """
        last = self._uncounted[-1]
        ahead = 0 if everything or self._config.train.max_skipped == 1 else 1
        due = len(self._uncounted) - ahead
        jax.block_until_ready([made.metrics for made in self._uncounted[:due]])
        each_s = self._lap()
        for member in self._members:
            member.done.time(each_s, last.size, first=last.first)
        self._count(due)
        if any(member.done.skipped_in_a_row for member in self._members):
            # Nothing is started before it is known what came of the last.
            self._count(len(self._uncounted))
        remark = self.time_left()
        more = {"run": remark.rpartition("about ")[2]} if remark else {}
        self._bar.set_postfix({**shown(self._members), **more}, refresh=False)
        self._bar.update(last.size)
        if last.first:
            self._bar.without_start()

    def _count(self, num_calls: int) -> None:
        for made in self._uncounted[:num_calls]:
            values = {
                name: np.asarray(value).reshape(len(self._members), -1)
                for name, value in made.metrics.items()
            }
            for i, (member, call) in enumerate(zip(self._members, made.calls, strict=True)):
                member.count(call.steps({name: of_folds[i] for name, of_folds in values.items()}))
        del self._uncounted[:num_calls]

    def _lap(self) -> float:
        """Each fold's part of the time since the last lap."""
        before, self._mark = self._mark, time.perf_counter()
        return (self._mark - before) / len(self._members)

    def states(self) -> list[TrainState]:
        """The state of each fold, on the host."""
        return self._place.fetch_state(self._state)

    @property
    def stuck(self) -> bool:
        """Whether too many updates in a row of a fold were not finite."""
        return any(member.too_many for member in self._members)

    def give_up(self) -> NoReturn:
        """Save every fold, and raise for one that is stuck."""
        errors = []
        for member, state in zip(self._members, self.states(), strict=True):
            if member.too_many is not None:
                errors.append(member.give_up(self.number, state))
            elif hosts.is_first():
                member.save(self.number, state)
        raise errors[0]

    def look(self, states: Sequence[TrainState]) -> None:
        """Measure the validation fold of each, and keep a state that is the best so far."""
        if not hosts.is_first():
            return
        for member, state in zip(self._members, states, strict=True):
            cases = loading.eval_cases(self._source, member.fold.validation)
            score = reference_dice(self._programs, state.average, cases, self._config)
            member.look(self.number, score, state)

    def save(self, states: Sequence[TrainState]) -> None:
        """Begin to write the checkpoints ``last``; of several processes the first does."""
        each_s = self._lap()
        for member in self._members:
            member.done.train_s += each_s
        if hosts.is_first():
            for member, state in zip(self._members, states, strict=True):
                member.save(self.number, state)
        hosts.wait()

    def say_saved(self) -> None:
        """Return, and say so, once the checkpoints are written."""
        for member in self._members:
            member.saved(self.number)

    def results(self) -> list[tuple[Params, FoldSummary]]:
        """For each fold the weights to evaluate and a summary; see ``train_folds``."""
        elapsed = time.perf_counter() - self._opened
        self._bar.close()
        waited_s = sum(feed.waited_s for feed in self._feeds)
        facts = {
            "steps_per_call": self._programs.steps_per_call,
            "folds_side_by_side": len(self._members),
            "input_wait_share": round(waited_s / max(elapsed, 1e-9), 4),
        }
        return [
            (state.average, dataclasses.replace(member.summary(), **facts))
            for member, state in zip(self._members, self.states(), strict=True)
        ]


def next_call(
    config: Config,
    programs: Programs,
    feeds: Sequence[Feed],
    number: int,
    saves: Callable[[int], bool],
    training: Sequence[Sequence[str]],
) -> tuple[list[Call], Any, parallel.ParallelStep]:
    """What to call after step ``number``: several steps if none but the last saves, else one.

    Args:
        config: of the run.
        programs: of the run.
        feeds: the batches of each fold.
        number: of steps made before.
        saves: whether something is saved after a step.
        training: the training cases of each fold.

    Returns:
        What each fold gives to the call, their batches as its program wants them, and the program.
    """
    (program, several), size = programs.of_folds(len(feeds)), 1
    most = programs.steps_per_call
    if (
        several is not None
        and number + most <= config.train.steps
        and not any(saves(number + i) for i in range(1, most))
    ):
        program, size = several, most
    calls = []
    for feed, names in zip(feeds, training, strict=True):
        case_ids, group = [], []
        for batch in itertools.islice(feed, size):
            case_ids.append([names[int(i)] for i in batch.pop("case_index")])
            if config.network.encoder.rank == 2:
                batch |= {name: batch[name][:, 0] for name in ("image", "label")}
            group.append(batch)
        calls.append(Call(number + 1, case_ids, group))
    given = [parallel.stack(call.batches) if size > 1 else call.batches[0] for call in calls]
    return calls, program.place_batch(given), program


def shown(members: Sequence[FoldInTraining]) -> dict[str, float | None]:
    """What the progress bar says of the last rows of their histories: means over the folds."""
    rows = [member.done.history[-1] for member in members if member.done.history]
    found = {}
    for name in ("loss", "examples_per_s"):
        values = [value for row in rows if (value := row[name]) is not None]
        found |= {name: float(np.mean(values))} if values else {}
    return found
