"""The loop that makes the steps of a fold, or of several side by side."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from cmsad_jax import parallel
from cmsad_jax.training import TrainState
from data_pipelines.case import Case
from data_pipelines.serving import loading
from experiments.measuring.metrics import to_mask
from experiments.prediction.windows import Params, predict_case
from experiments.process import hosts
from experiments.process.accelerator import uncollected
from experiments.process.console import progress
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
        if not case.label.any():
            continue
        probability = predict_case(
            programs.predict, params, case, config, config.network.num_classes
        )
        mask = to_mask(probability, config.predict.threshold)
        for index in range(1, len(config.data.classes) + 1):
            truth, found = case.label == index, mask == index
            if truth.any():
                scores.append(2 * (truth & found).sum() / (truth.sum() + found.sum()))
    return float(np.mean(scores)) if scores else None


def train_folds(
    config: Config, programs: Programs, source: loading.CaseSource, folds: Sequence[Fold]
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
    train, check_at = config.train, validation_steps(config)
    place, _ = programs.of_folds(len(folds))

    def saves(number: int) -> bool:
        due = number in check_at or number == train.steps
        return due or number % train.checkpoint_every == 0

    with contextlib.ExitStack() as closing, deferred_signals() as stop:
        members = [FoldInTraining(config, fold, source.fingerprint) for fold in folds]
        for member in members:
            closing.callback(member.close)
        seed = jax.random.key(config.seed)
        state = place.place_state(
            [
                member.resume(programs.init(jax.random.fold_in(seed, member.fold.number)))
                for member in members
            ]
        )
        (start,) = {member.start for member in members}  # see ``groups``
        shared = {"start": start, "num_folds": len(folds)}
        feeds = [
            train_batches(config, source, fold.training, fold=fold.number, **shared)
            for fold in folds
        ]
        opened = time.perf_counter()
        title = ", ".join(member.title for member in members)
        bar = progress((), description=f"{title} training", total=train.steps, initial=start)
        uncounted: list[tuple[list[Call], dict[str, jax.Array]]] = []
        compiled: set[int] = set()
        needed: memory.Estimate | None = None
        mark, number = time.perf_counter(), start
        while number < train.steps:
            with memory.explained(config):
                calls, placed, program = next_call(
                    config, programs, feeds, number, saves, [fold.training for fold in folds]
                )
                size = len(calls[0].batches)
                make = program.step
                if size not in compiled:
                    make = uncollected(make)
                    resident = sum(feed.resident_bytes for feed in feeds)
                    needed = uncollected(memory.check)(
                        config, program.step, state, placed, resident_bytes=resident
                    )
            with memory.explained(config, needed):
                state, metrics = make(state, placed)
                if size not in compiled:
                    jax.block_until_ready(state)
            number += size
            uncounted.append((calls, metrics))
            stopping = stop.after_step()
            saving = stopping or saves(number)
            # Looking at a call waits for it; one call behind, the device is kept busy.
            cut = len(uncounted) - (0 if saving or train.max_skipped == 1 else 1)
            counted, uncounted = uncounted[:cut], uncounted[cut:]
            jax.block_until_ready([metrics for _, metrics in counted])
            each_s = (time.perf_counter() - mark) / len(members)
            for member in members:
                member.done.time(each_s, size, first=size not in compiled)
            compiled.add(size)
            mark = time.perf_counter()
            count(members, counted)
            if any(member.done.skipped_in_a_row for member in members):
                # Nothing is started before it is known what came of the last.
                count(members, uncounted)
                uncounted = []
            bar.set_postfix(shown(members), refresh=False)
            bar.update(size)
            stuck = any(member.too_many for member in members)
            if not (saving or stuck):
                continue
            fetched = list(zip(members, place.fetch_state(state), strict=True))
            if stuck:
                give_up(fetched, number)
            if number in check_at and hosts.is_first():
                for member, of_fold in fetched:
                    cases = loading.eval_cases(source, member.fold.validation)
                    score = reference_dice(programs, of_fold.average, cases, config)
                    member.look(number, score, of_fold)
            for member in members:
                member.done.train_s += (time.perf_counter() - mark) / len(members)
            mark = time.perf_counter()
            if hosts.is_first():
                for member, of_fold in fetched:
                    member.save(number, of_fold)
            hosts.wait()
            if stopping:
                for member in members:
                    member.saved(number)
                break
    elapsed = time.perf_counter() - opened
    bar.close()
    waited_s = sum(feed.waited_s for feed in feeds)
    facts = {
        "steps_per_call": programs.steps_per_call,
        "folds_side_by_side": len(folds),
        "input_wait_share": round(waited_s / max(elapsed, 1e-9), 4),
    }
    return [
        (of_fold.average, dataclasses.replace(member.summary(), **facts))
        for member, of_fold in zip(members, place.fetch_state(state), strict=True)
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


def count(
    members: Sequence[FoldInTraining],
    called: Sequence[tuple[Sequence[Call], dict[str, jax.Array]]],
) -> None:
    """Let each fold account for the steps of calls that were made, by what they gave and came to.

    Metrics are numbers, with an axis of folds if there are several, and then one of steps likewise.
    """
    for calls, metrics in called:
        values = {name: np.asarray(v).reshape(len(members), -1) for name, v in metrics.items()}
        for i, (member, call) in enumerate(zip(members, calls, strict=True)):
            member.count(call.steps({name: of_folds[i] for name, of_folds in values.items()}))


def shown(members: Sequence[FoldInTraining]) -> dict[str, float | None]:
    """What the progress bar says of the last rows of their histories: means over the folds."""
    rows = [member.done.history[-1] for member in members if member.done.history]
    found = {}
    for name in ("loss", "examples_per_s"):
        values = [value for row in rows if (value := row[name]) is not None]
        found |= {name: float(np.mean(values))} if values else {}
    return found


def give_up(fetched: Sequence[tuple[FoldInTraining, TrainState]], number: int) -> NoReturn:
    """Save every fold with its state after step ``number``, and raise for one that is stuck."""
    errors = []
    for member, state in fetched:
        if member.too_many is not None:
            errors.append(member.give_up(number, state))
        elif hosts.is_first():
            member.save(number, state)
    raise errors[0]
