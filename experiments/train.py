"""Folds, alone or side by side: compiled programs, and the loop that makes their steps.

``cv`` runs it for every fold.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from cmsad_jax import kernels, parallel
from cmsad_jax.inference import sliding_window
from cmsad_jax.modules.network import CMSAD, apply, probabilities
from cmsad_jax.training import TrainState, init_state, train_step, train_steps
from cmsad_jax.types import ConfigError, Device
from data_pipelines.case import STORED_UNIT, Case
from data_pipelines.serving import loading
from experiments import memory
from experiments.feed import Feed
from experiments.fold import Call, Fold, FoldInTraining, train_batches
from experiments.process import hosts
from experiments.process.accelerator import uncollected
from experiments.process.console import progress
from experiments.process.signals import deferred_signals
from experiments.settings.config import Config, window

MOST_STEPS_PER_CALL = 10
"""On accelerators, without being asked; signals are heeded between calls."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is compiled, once for all folds.

    Attributes:
        init: fresh state from a key.
        step: the train step with its placement over devices.
        several: ``steps_per_call`` train steps in one; None if that is 1.
        steps_per_call: see ``several``.
        predict: ``(params, windows, present) -> b *window k`` probabilities.
        attention: ``(params, windows, present) -> b *window a`` attention energy of each modality
            and, within it, of each encoder stage, resized to the window; none for early fusion.
        side_by_side: ``step`` and ``several`` of a number of folds above 1, of which they take
            lists.
    """

    init: Callable[[jax.Array], TrainState]
    step: parallel.ParallelStep
    several: parallel.ParallelStep | None
    steps_per_call: int
    predict: Callable[..., jax.Array]
    attention: Callable[..., jax.Array]
    side_by_side: Callable[[int], tuple[parallel.ParallelStep, parallel.ParallelStep | None]]

    def of_folds(self, count: int) -> tuple[parallel.ParallelStep, parallel.ParallelStep | None]:
        """``step`` and ``several`` of so many folds, of which they take lists, also of one."""
        if count > 1:
            return self.side_by_side(count)
        return of_list(self.step), None if self.several is None else of_list(self.several)


def of_list(program: parallel.ParallelStep) -> parallel.ParallelStep:
    """The program of a fold, placing and fetching lists that hold this fold alone."""
    return dataclasses.replace(
        program,
        place_state=lambda states: program.place_state(*states),
        place_batch=lambda batches: program.place_batch(*batches),
        fetch_state=lambda state: [program.fetch_state(state)],
    )


def compile_programs(config: Config, devices: Sequence[Device]) -> Programs:
    """The jitted functions of a run; XLA compiles each at its first call.

    Raises:
        ConfigError: for folds side by side where they cannot be, or a batch that the devices of a
            fold cannot share.
    """
    slices = math.gcd(folds_at_once(config, devices), len(devices))
    parallel.check_batch_size(config.train.batch_size, len(devices) // slices)
    network = CMSAD(config.network)
    optimizer = config.train.optimizer.optimizer(config.train.steps)
    step = partial(
        train_step,
        network=network,
        optimizer=optimizer,
        loss=config.loss,
        augmentation=config.train.augmentation,
        modality_dropout=config.train.modality_dropout,
        average_decay=config.train.average_decay,
        accumulation=config.train.accumulation,
        rolled=devices[0].platform != "cpu",
    )
    image_shape = (1, *window(config), len(config.data.modalities))

    options = compiler_options(devices[0].platform, deterministic=config.deterministic)
    stages = range(config.network.encoder.num_stages)
    per_call = steps_per_call(config, devices[0].platform)

    @cache
    def of_folds(count: int) -> tuple[parallel.ParallelStep, parallel.ParallelStep | None]:
        placed: Any = {
            "devices": devices_of(count, config.train.batch_size, devices),
            "compiler_options": options,
        }
        parallelize = partial(parallel.parallelize, mode=config.parallel)
        if count > 1:
            parallelize = partial(parallel.parallelize_folds, num_folds=count)
        several = partial(train_steps, step=step)
        return (
            parallelize(step, **placed),
            None if per_call == 1 else parallelize(several, stacked=True, **placed),
        )

    one, several = of_folds(1)
    return Programs(
        init=uncollected(lambda key: init_state(network, optimizer, image_shape, key=key)),
        step=one,
        several=several,
        steps_per_call=per_call,
        predict=jax.jit(predict_window(config), compiler_options=options),
        attention=jax.jit(attention_window(config, stages), compiler_options=options),
        side_by_side=of_folds,
    )


def folds_at_once(config: Config, devices: Sequence[Device]) -> int:
    """As asked for; else one on each equal part of several accelerators, and otherwise 1.

    Raises:
        ConfigError: several are asked for in a run of several processes.
    """
    asked, processes = config.folds_at_once, jax.process_count()
    if asked == "auto":
        if processes > 1 or config.parallel == "pmap" or devices[0].platform == "cpu":
            return 1
        count = config.num_folds if config.folds is None else len(config.folds)
        return max(1, math.gcd(count, len(devices)))
    if asked > 1 and processes > 1:
        raise ConfigError(
            "folds are trained side by side in one process; "
            f"got --folds-at-once={asked} and {processes} processes. Use --folds-at-once=1."
        )
    return asked


def devices_of(num_folds: int, batch_size: int, devices: Sequence[Device]) -> Sequence[Device]:
    """Those that folds of a run share: one equal part for each, as far as numbers allow.

    All of them, unless a batch does not divide by a part, which can come of the last folds of a
    run, fewer than the others before.
    """
    parts = math.gcd(num_folds, len(devices))
    return devices[: parts * math.gcd(batch_size, len(devices) // parts)]


def steps_per_call(config: Config, platform: str) -> int:
    """As asked for; else 1 on CPUs, and on accelerators what divides the steps between savings."""
    if config.train.steps_per_call is not None:
        return config.train.steps_per_call
    if platform == "cpu":
        return 1
    common = math.gcd(config.train.checkpoint_every, config.train.steps, *validation_steps(config))
    return max(n for n in range(1, MOST_STEPS_PER_CALL + 1) if common % n == 0)


def validation_steps(config: Config) -> set[int]:
    """Steps after which the validation fold is looked at."""
    steps, count = config.train.steps, config.train.validations
    return {round(steps * (i + 1) / count) for i in range(count)}


def compiler_options(platform: str, *, deterministic: bool) -> dict[str, Any] | None:
    """XLA's options for the programs of a run."""
    if platform == "cpu":
        # The full effort doubles the time to compile and gains no speed: the convolutions are
        # library calls.
        return {"xla_backend_optimization_level": 1}
    # Implies xla_gpu_exclude_nondeterministic_ops, and that none is chosen by timing it.
    return {"xla_gpu_deterministic_ops": True} if platform == "gpu" and deterministic else None


def predict_window(config: Config) -> Callable[..., jax.Array]:
    """``Programs.predict`` of a configuration, not yet jitted."""
    network = CMSAD(config.network)

    def predict(params, windows, present):
        return probabilities(apply(network, params, windows, present).logits)

    return predict


def attention_window(config: Config, stages: Sequence[int]) -> Callable[..., jax.Array]:
    """Attention energies of some stages, not yet jitted: modalities first, their stages within."""
    network = CMSAD(config.network)

    def attention(params, windows, present):
        features = apply(network, params, windows, present).features
        maps = [
            kernels.attention_energy(
                features[name][stage],
                kind=config.loss.attention.kind,
                exponent=config.loss.attention.exponent,
            )
            for name in config.data.modalities
            for stage in stages
        ]
        return jnp.stack([kernels.resize_map(q, window(config)) for q in maps], -1)

    return attention


def scaled_image(case: Case) -> np.ndarray:
    """Stored intensities of a case as float32."""
    return case.image.astype(np.float32) * STORED_UNIT


def predict_case(
    program: Callable[..., jax.Array], params: Any, case: Case, config: Config, num_outputs: int
) -> np.ndarray:
    """``d h w k`` output of ``Programs.predict`` or ``.attention`` on a whole reference grid."""
    space = window(config)
    return sliding_window(
        partial(program, params),
        scaled_image(case),
        case.present,
        window=space,
        num_classes=num_outputs,
        overlap=config.predict.overlap,
        batch_size=config.predict.batch_size,
        flip_axes=(len(space) - 1,) if config.predict.flip else (),
    )


def reference_dice(
    programs: Programs, params: Any, cases: Iterator[Case], config: Config
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


def to_mask(probability: np.ndarray, threshold: float) -> np.ndarray:
    """uint8 classes of ``... k`` probabilities: above the threshold, or the largest of several."""
    if probability.shape[-1] == 1:
        return (probability[..., 0] > threshold).astype(np.uint8)
    return probability.argmax(-1).astype(np.uint8)


def groups(folds: Sequence[Fold], at_once: int) -> list[list[Fold]]:
    """Folds that are trained side by side, at most ``at_once``: such as stand at the same step."""
    if at_once == 1:
        return [[fold] for fold in folds]
    standing: dict[int, list[Fold]] = {}
    for fold in folds:
        standing.setdefault(fold.standing(), []).append(fold)
    return [
        same[i : i + at_once] for same in standing.values() for i in range(0, len(same), at_once)
    ]


def train_folds(
    config: Config, programs: Programs, source: loading.CaseSource, folds: Sequence[Fold]
) -> list[tuple[Any, dict[str, Any]]]:
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
    facts = {
        "steps_per_call": programs.steps_per_call,
        "folds_side_by_side": len(folds),
        "input_wait_share": round(sum(feed.waited_s for feed in feeds) / max(elapsed, 1e-9), 4),
    }
    return [
        (of_fold.average, member.summary() | facts)
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
