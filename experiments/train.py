"""One fold: compiled programs, the training loop, checkpoints. ``cv`` runs it for every fold."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from cmsad_jax import kernels, parallel
from cmsad_jax.inference import sliding_window
from cmsad_jax.modules.network import CMSAD, apply, probabilities
from cmsad_jax.training import TrainState, init_state, train_step, train_steps
from cmsad_jax.types import Device
from data_pipelines import loading
from data_pipelines.case import STORED_UNIT, Case
from experiments import hosts, memory
from experiments.checkpoints import Checkpoints
from experiments.config import Config, to_json, window
from experiments.feed import Feed, training_feed
from experiments.runtime import (
    RunError,
    deferred_signals,
    log,
    progress,
    whole_file,
)

LOG_POINTS = 100
"""Rows of ``history.csv`` that a run's training losses are averaged into."""

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
    """

    init: Callable[[jax.Array], TrainState]
    step: parallel.ParallelStep
    several: parallel.ParallelStep | None
    steps_per_call: int
    predict: Callable[..., jax.Array]
    attention: Callable[..., jax.Array]


def compile_programs(config: Config, devices: Sequence[Device]) -> Programs:
    """The jitted functions of a run; XLA compiles each at its first call."""
    parallel.check_batch_size(config.train.batch_size, len(devices))
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
    placed: Any = {"mode": config.parallel, "devices": devices, "compiler_options": options}
    per_call = steps_per_call(config, devices[0].platform)
    return Programs(
        init=lambda key: init_state(network, optimizer, image_shape, key=key),
        step=parallel.parallelize(step, **placed),
        several=None
        if per_call == 1
        else parallel.parallelize(partial(train_steps, step=step), stacked=True, **placed),
        steps_per_call=per_call,
        predict=jax.jit(predict_window(config), compiler_options=options),
        attention=jax.jit(attention_window(config, stages), compiler_options=options),
    )


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


class Step(NamedTuple):
    """One step that was made: its number from 1, the cases of its batch, the batch, its metrics."""

    number: int
    case_ids: Sequence[str]
    batch: dict[str, Any]
    metrics: dict[str, float]


class Call(NamedTuple):
    """One call of a program, perhaps still running: what ``Step`` holds, for each of its steps."""

    first: int
    case_ids: list[list[str]]
    batches: list[dict[str, Any]]
    metrics: dict[str, jax.Array]

    def steps(self) -> list[Step]:
        """Its steps, once they are made."""
        metrics = {name: np.atleast_1d(np.asarray(v)) for name, v in self.metrics.items()}
        return [
            Step(self.first + i, ids, batch, {name: float(v[i]) for name, v in metrics.items()})
            for i, (ids, batch) in enumerate(zip(self.case_ids, self.batches, strict=True))
        ]


@dataclasses.dataclass
class Progress:
    """What a fold has measured so far: JSON values, saved with every checkpoint.

    Attributes:
        history: rows of ``history.csv``.
        pending: metrics of the counted steps since the last row.
        best: step and score of the best look at the validation fold.
        skipped, skipped_in_a_row: updates left out because something was not finite.
        first_step_s: of the first step, most of it to compile.
        train_s: all time spent, over all starts.
        steady_s, steady_steps: the same without the first step after each start, and its steps.
    """

    history: list[dict[str, float | None]] = dataclasses.field(default_factory=list)
    pending: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"step": None, "validation_dice": None}
    )
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
            name: float(np.mean([row[name] for row in made])) if made else None
            for name in self.pending[0]
            if name != "skipped"
        }
        self.pending = []
        self.history.append(row | facts)
        return self.history[-1]

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


def train_fold(
    config: Config,
    programs: Programs,
    source: loading.CaseSource,
    *,
    fold: int,
    training: Sequence[str],
    validation: Sequence[str],
    directory: Path,
) -> tuple[Any, dict[str, Any]]:
    """Train one fold, or what is left of it; returns the weights to evaluate and a summary.

    Writes ``history.csv`` and the checkpoints ``last`` and ``best`` into ``directory``, and goes on
    from the newest intact ``last`` there: on the same devices, the result is bit for bit that of a
    run never interrupted. The weights returned are the last ones (their moving average if
    configured), never ``best``. Of several processes, the first alone reads and writes there.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
        RunError: too many updates in a row were not finite, or a step needs too much memory.
        OSError: a checkpoint cannot be written; it names the path.
    """
    train, title = config.train, f"fold {fold + 1}/{config.num_folds}"
    state = programs.init(jax.random.fold_in(jax.random.key(config.seed), fold))
    checkpoints = Checkpoints(
        directory / "checkpoints", config, fold=fold, data_fingerprint=source.fingerprint
    )
    with contextlib.closing(checkpoints), deferred_signals() as stop:
        state, done, start = _resume(checkpoints, state)
        if start:
            log(f"{title}: going on after step {start} of {train.steps}")
        state = programs.step.place_state(state)
        schedule = train.optimizer.schedule(train.steps)
        log_every = max(1, train.steps // LOG_POINTS)
        check_at = validation_steps(config)

        def saves(number: int) -> bool:
            due = number in check_at or number == train.steps
            return due or number % train.checkpoint_every == 0

        def count(calls: Sequence[Call]) -> Step | None:
            """Account for their steps; that by which too many were skipped in a row, if any."""
            nonlocal row_from
            too_many = None
            for step in itertools.chain.from_iterable(call.steps() for call in calls):
                done.count(step, title)
                if done.skipped_in_a_row >= train.max_skipped:
                    too_many = too_many or step
                if step.number % log_every == 0 or step.number == train.steps:
                    made, seconds = done.steady_steps - row_from[0], done.steady_s - row_from[1]
                    row = done.add_row(
                        step=step.number,
                        learning_rate=float(jnp.asarray(schedule(step.number - 1))),
                        examples_per_s=made * train.batch_size / seconds if seconds else None,
                        validation_dice=None,
                    )
                    bar.set_postfix(loss=row["loss"], examples_per_s=row["examples_per_s"])
                    row_from = done.steady_steps, done.steady_s
            return too_many

        batches = train_batches(config, source, training, fold=fold, start=start)
        opened = time.perf_counter()
        bar = progress((), description=f"{title} training", total=train.steps, initial=start)
        uncounted: list[Call] = []
        compiled: set[int] = set()
        needed: memory.Estimate | None = None
        row_from = done.steady_steps, done.steady_s
        mark, number = time.perf_counter(), start
        while number < train.steps:
            with memory.explained(config):
                call, placed, program = next_call(
                    config, programs, batches, number, saves, training
                )
                size = len(call.batches)
                if size not in compiled:
                    needed = memory.check(config, program.step, state, placed)
            with memory.explained(config, needed):
                state, metrics = program.step(state, placed)
                if size not in compiled:
                    jax.block_until_ready(state)
            number += size
            uncounted.append(call._replace(metrics=metrics))
            stopping = stop.after_step()
            saving = stopping or saves(number)
            # Looking at a call waits for it; one call behind, the device is kept busy.
            cut = len(uncounted) - (0 if saving or train.max_skipped == 1 else 1)
            counted, uncounted = uncounted[:cut], uncounted[cut:]
            jax.block_until_ready([one.metrics for one in counted])
            done.time(time.perf_counter() - mark, size, first=size not in compiled)
            compiled.add(size)
            mark = time.perf_counter()
            too_many = count(counted)
            if done.skipped_in_a_row:  # nothing is started before it is known what came of the last
                too_many = too_many or count(uncounted)
                uncounted = []
            bar.update(size)
            if too_many is not None:
                fetched = programs.step.fetch_state(state)
                _give_up(config, checkpoints, fetched, too_many, number, done, fold, directory)
            if not saving:
                continue
            fetched = programs.step.fetch_state(state)
            if number in check_at and hosts.is_first():
                score = reference_dice(
                    programs, fetched.average, loading.eval_cases(source, validation), config
                )
                if done.history:
                    done.history[-1]["validation_dice"] = score
                best = done.best["validation_dice"]
                if score is not None and (best is None or score > best):
                    done.best = {"step": number, "validation_dice": score}
                    checkpoints.save("best", fetched, step=number)
            done.train_s += time.perf_counter() - mark
            mark = time.perf_counter()
            if hosts.is_first():
                checkpoints.save("last", fetched, step=number, progress=dataclasses.asdict(done))
            hosts.wait()
            if stopping:
                checkpoints.wait()
                log(f"{title}: saved after step {number} of {train.steps}")
                break
    trained = time.perf_counter()
    bar.close()
    if hosts.is_first():
        write_history(directory / "history.csv", done.history)
    return programs.step.fetch_state(state).average, {
        "first_step_s": round(done.first_step_s, 2),
        "train_s": round(done.train_s, 2),
        "examples_per_s": round(done.steady_steps * train.batch_size / max(done.steady_s, 1e-9), 2),
        "steps_per_s": round(done.steady_steps / max(done.steady_s, 1e-9), 3),
        "steps_per_call": programs.steps_per_call,
        "input_wait_share": round(batches.waited_s / max(trained - opened, 1e-9), 4),
        "loss": done.history[-1]["loss"] if done.history else None,
        "skipped_updates": done.skipped,
        "best": done.best,
    }


def _resume(checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, Progress, int]:
    """State, progress and step to go on from, as process 0 finds them; the given state at first."""
    done, start = Progress(), 0
    with hosts.first_alone("read its checkpoints"):
        resumed = checkpoints.resume(state) if hosts.is_first() else None
        if resumed is not None:
            state, record = resumed
            done, start = Progress(**record["progress"]), record["step"]
    start, done.skipped_in_a_row = map(
        int, hosts.of_first(np.array([start, done.skipped_in_a_row], np.int32))
    )
    return hosts.of_first(state) if start else state, done, start


def next_call(
    config: Config,
    programs: Programs,
    batches: Feed,
    number: int,
    saves: Callable[[int], bool],
    training: Sequence[str],
) -> tuple[Call, Any, parallel.ParallelStep]:
    """What to call after step ``number``: several steps if none but the last saves, else one.

    Returns:
        The call, its batches as its program wants them, and the program.
    """
    program, size = programs.step, 1
    most = programs.steps_per_call
    if (
        programs.several is not None
        and number + most <= config.train.steps
        and not any(saves(number + i) for i in range(1, most))
    ):
        program, size = programs.several, most
    case_ids, group = [], []
    for batch in itertools.islice(batches, size):
        case_ids.append([training[int(i)] for i in batch.pop("case_index")])
        if config.network.encoder.rank == 2:
            batch |= {name: batch[name][:, 0] for name in ("image", "label")}
        group.append(batch)
    given = group[0]
    if size > 1:
        given = {
            name: (jnp if isinstance(value, jax.Array) else np).stack([one[name] for one in group])
            for name, value in given.items()
        }
    return Call(number + 1, case_ids, group, {}), program.place_batch(given), program


def train_batches(
    config: Config,
    source: loading.CaseSource,
    training: Sequence[str],
    *,
    fold: int,
    start: int = 0,
) -> Feed:
    """Batches for the steps of a fold after ``start``; the same however often it was resumed."""
    train = config.train
    if start == train.steps:
        return Feed(iter(()))
    share = train.foreground_share
    if share and not any(source.foreground(case_id).size for case_id in training):
        share = 0.0
        log(f"fold {fold + 1}: no training case holds the target; crops are drawn at random")
    return training_feed(
        config,
        source,
        training,
        seed=config.seed * 1000 + fold,
        foreground_share=share,
        start_step=start,
        part=hosts.part(),
    )


def _give_up(
    config: Config,
    checkpoints: Checkpoints,
    state: TrainState,
    step: Step,
    number: int,
    done: Progress,
    fold: int,
    directory: Path,
) -> NoReturn:
    """Save, keep what is needed to repeat ``step``, and raise.

    ``state`` is that after step ``number``. Skipped steps leave it as it was, so that it is also
    that before ``step``, unless a finite step followed in the same call of several. Of several
    processes the first writes, with its part of the batch.
    """
    file = directory / f"not_finite_{step.number:08d}.npz"
    facts = {
        "config": to_json(config),
        "fold": fold,
        "step": step.number,
        "case_ids": step.case_ids,
    }
    message = (
        f"loss and gradient must be finite; got {config.train.max_skipped} steps in a row of fold "
        f"{fold + 1} that are not, up to step {step.number}. See python -m experiments.reproduce "
        f"{file}; use a lower --train.optimizer.learning-rate, or run again to go on regardless."
    )
    if not hosts.is_first():
        raise RunError(message)
    arrays = {f"state/{name}": value for name, value in state_arrays(state).items()}
    arrays |= {f"batch/{name}": np.asarray(value) for name, value in step.batch.items()}
    with whole_file(file) as partial:
        np.savez_compressed(partial, allow_pickle=False, facts=json.dumps(facts), **arrays)
    again = dataclasses.replace(done, skipped_in_a_row=0)
    checkpoints.save("last", state, step=number, progress=dataclasses.asdict(again))
    checkpoints.wait()
    raise RunError(message)


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Every array of a state by the path of its leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def write_history(path: Path, history: Sequence[dict[str, float | None]]) -> None:
    """Training curves as CSV; empty cells where nothing was measured."""
    names = ["step", *(name for name in history[0] if name != "step")]
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)
