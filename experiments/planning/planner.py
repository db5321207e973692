"""From a fingerprint and a device to a plan: the rules in their order, and the search by memory."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cmsad_jax.modules.encoder import EncoderConfig
from cmsad_jax.types import ConfigError
from data_pipelines.preparing.fingerprint import CaseFacts, Fingerprint, describe
from data_pipelines.serving import splits
from experiments.planning import record, rules, scale
from experiments.planning.chips import Target
from experiments.planning.record import Line, Plan, Trial
from experiments.planning.rules import DEVICE, Decision, Known
from experiments.settings.config import Config
from experiments.training.memory import GIB

SHARE = 0.9
"""Part of a device's memory that a step may take; the rest is for prediction and fragments."""

MOST_COMPILED = 3
"""Steps that are compiled for a plan."""

PLENTY = 0.1
"""Share of a CPU's memory below which a step is not compiled to be sure that it fits."""

WAYS = ((1, False), (2, False), (2, True))
"""Parts of a batch, and whether blocks are computed again: what costs nothing first."""

Compiled = Callable[[Config], int]
"""Memory of a step in bytes by XLA's account."""


class Search(NamedTuple):
    """What was found by memory."""

    crop: tuple[int, ...]
    batch_size: int
    accumulation: int
    rematerialize: bool
    fitting: int
    """Crops that fit at once."""


@dataclasses.dataclass
class Making:
    """A plan in the making.

    Attributes:
        asked: what was asked for; its data, folds and places hold.
        known: to the rules.
        given: values by hand, by field.
        compiled: tells the memory of a step; None where it cannot be compiled.
        lines, trials: of the plan so far.
        ratio: of compiled to scaled memory.
    """

    asked: Config
    known: Known
    given: Mapping[str, Any]
    compiled: Compiled | None
    lines: list[Line] = dataclasses.field(default_factory=list)
    trials: list[Trial] = dataclasses.field(default_factory=list)
    ratio: float = 1.0

    @property
    def base(self) -> str:
        """Preset that holds for all that no line names."""
        if self.known.device.is_cpu:
            return "small"
        return "slice2d" if self.known.planar else "volume3d"

    @property
    def limit(self) -> float:
        """Bytes that a step may take."""
        return SHARE * self.known.device.memory_gib * GIB

    def decide(self, field: str, decision: Decision) -> None:
        """A line for a field, and its value for the rules to come."""
        value = self.given.get(field, decision.value)
        rule, fact, basis = decision.rule, decision.fact, decision.basis
        by_hand = field in self.given
        self.known.values[field] = value
        self.lines.append(Line(field, _json(value), rule, fact, basis, by_hand))

    def config(self, **others: Any) -> Config:
        """The configuration of what is decided so far, and of some values that are tried."""
        named = {name.replace("__", "."): value for name, value in others.items()}
        values = {line.field: line.value for line in self.lines} | {
            name: _json(value) for name, value in named.items()
        }
        config = record.applied(self.base, values, self.asked)
        network = dataclasses.replace(
            config.network,
            modalities=config.data.modalities,
            num_classes=config.data.num_classes,
        )
        return dataclasses.replace(config, network=network)

    def network(self, crop: Sequence[int]) -> dict[str, Decision]:
        """The network for a crop."""
        known, device = self.known, self.known.device
        planar = known.planar
        spacing = known["data.preprocess.spacing_mm"]
        stages = rules.stages_of(
            spacing[1:] if planar else spacing,
            crop[1:] if planar else crop,
            most=rules.most_stages(device),
            alike=rules.alike(device),
        )
        count = len(stages.strides)
        why = (
            "an axis strides while it is not coarser than twice the finest and 4 voxels are left; "
            "kernels are 3 from there on (nnU-Net)"
        )
        if device.is_cpu:
            why += "; on a CPU 1.4 times, as 3x3x3 takes three times as long as 1x3x3, and 4 stages"
        fact = f"crop {_words(crop)} at {_words(spacing)} mm"
        return {
            "network.encoder.channels": rules.widths(device, count),
            "network.encoder.kernels": Decision(stages.kernels, why, fact, "all cases"),
            "network.encoder.strides": Decision(stages.strides, why, fact, "all cases"),
            "network.encoder.blocks": rules.blocks(device, count),
            "network.deep_supervision": Decision(
                min(1 if device.is_cpu else 3, count - 1),
                "coarser outputs that are supervised: one, on accelerators three (ours: presets)",
                f"{count} stages",
                DEVICE,
            ),
        }


def make(
    fingerprint: Fingerprint,
    folds: splits.Folds,
    asked: Config,
    given: Mapping[str, Any],
    device: Target,
    compiled: Compiled | None = None,
) -> Plan:
    """The plan.

    Args:
        fingerprint: of the data set.
        folds: of the run, whose training patients' statistics are used.
        asked: says data, target, modalities; of network and training nothing but what is ``given``.
        given: values by hand, by field: the rules go on from them.
        device: what is planned for.
        compiled: tells the memory of a step; None estimates it.

    Raises:
        ConfigError: nothing fits.
    """
    making = Making(asked, _known(fingerprint, folds, asked, device), given, compiled)
    for field, rule in rules.OF_DATA.items():
        making.decide(field, rule(making.known))
    making.decide("network.dtype", rules.OF_TRAINING["network.dtype"](making.known))
    _decide_by_memory(making)
    for field, rule in rules.OF_TRAINING.items():
        if field not in making.known.values:
            making.decide(field, rule(making.known))
    plan = Plan(
        base=making.base,
        data=tuple(describe(fingerprint, asked.data.classes)),
        data_sha256=fingerprint.sha256,
        device=_device_in_words(device),
        lines=tuple(making.lines),
        trials=tuple(making.trials),
        notes=tuple(_notes(making, fingerprint)),
    )
    if not given:
        return plan
    alone = make(fingerprint, folds, asked, {}, device)
    return dataclasses.replace(
        plan,
        lines=tuple(_beside(line, alone) for line in plan.lines),
        changed_by_hand=tuple(_changes(alone, plan)),
    )


def _beside(line: Line, alone: Plan) -> Line:
    """A line by hand with what the rule alone would have said."""
    if not line.by_hand:
        return line
    said = record.in_words(alone.values[line.field])
    return dataclasses.replace(line, rule=f"given; the rule says {said}: {line.rule}")


def _known(fingerprint: Fingerprint, folds: splits.Folds, asked: Config, device: Target) -> Known:
    training: list[tuple[CaseFacts, ...]] = []
    for fold in range(len(folds)):
        training.append(fingerprint.of(folds.training(fold)))
    return Known(fingerprint.cases, training, asked.data.classes, asked.data.modalities, device)


def _changes(alone: Plan, plan: Plan) -> Iterator[str]:
    """What values by hand changed, beside themselves."""
    for line in plan.lines:
        before = alone.values.get(line.field)
        if not line.by_hand and before != line.value:
            yield f"{line.field}: {record.in_words(before)} became {record.in_words(line.value)}"


def _notes(making: Making, fingerprint: Fingerprint) -> Iterator[str]:
    larger = rules.targets_fit(making.known, making.known["train.crop"])
    if larger:
        yield f"note: {larger}."
    if not any(case.positive for case in fingerprint.cases):
        yield "note: no case holds any target: nothing can be trained."
    for case_id, why in fingerprint.unreadable.items():
        yield f"note: {case_id} was left out: {why}"


# The search by memory ---------------------------------------------------------------------------


def _decide_by_memory(making: Making) -> None:
    """Crop, network, batch, and how it is worked on, so that a step fits."""
    found = _search(making)
    if making.known.device.is_cpu and _scaled(making, found) < PLENTY * making.limit:
        making.compiled = None  # where time is scarce, none of it is spent on what is plentiful
    for attempt in range(MOST_COMPILED):
        needed, fits = _try(making, found, final=making.compiled is not None)
        if making.compiled is None:
            break
        scaled = _scaled(making, found)
        making.ratio *= needed / max(scaled, 1)
        if fits and (attempt or making.known.device.is_cpu or needed > 0.6 * making.limit):
            break
        again = _search(making)
        if again == found:
            break
        if fits and attempt == MOST_COMPILED - 1:
            break
        found = again
    if not making.trials[-1].fits:
        fitting = [trial for trial in making.trials if trial.fits]
        if not fitting:
            raise ConfigError(
                f"a training step must fit into memory; got {making.trials[-1].gib:.1f} GiB for "
                f"{record.trial_in_words(making.trials[-1])}, and "
                f"{making.limit / GIB:.1f} GiB. Use a device with more memory, or "
                "narrower --network.encoder.channels."
            )
        last = fitting[-1]
        found = Search(
            last.crop, last.batch_size, last.accumulation, last.rematerialize, last.batch_size
        )
    _decide_found(making, found)


def _decide_found(making: Making, found: Search) -> None:
    known, device = making.known, making.known.device
    why = (
        "the grid, shortened where it is longest until it has the voxels of a CPU's crop (ours)"
        if device.is_cpu
        else "the largest part of the grid whose step fits, shortened where it is longest (nnU-Net)"
    )
    how = "compiled" if making.compiled is not None else "scaled from other chips' accounts"
    fact = f"grid {_words(known['data.preprocess.size'])}; {device.memory_gib:.4g} GiB, {how}"
    making.decide("train.crop", Decision(found.crop, why, fact, DEVICE))
    for field, decision in making.network(found.crop).items():
        making.decide(field, decision)
    batch = rules.batch_size(known, found.crop, found.fitting)
    making.decide("train.batch_size", batch._replace(value=found.batch_size))
    for field, value in (
        ("train.accumulation", found.accumulation),
        ("network.rematerialize", found.rematerialize),
    ):
        making.decide(
            field,
            Decision(
                value,
                "only where crops that hold a target would not fit otherwise (ours)",
                fact,
                DEVICE,
            ),
        )


def _search(making: Making) -> Search:
    """The largest crop that fits in the cheapest way, and the batch for it."""
    known, device = making.known, making.known.device
    least = making.given.get("train.batch_size") or max(2, device.count)
    crops = [making.given["train.crop"]] if "train.crop" in making.given else _crops(making)
    needed = _needed(known)
    ways = [
        (
            making.given.get("train.accumulation", parts),
            making.given.get("network.rematerialize", again),
        )
        for parts, again in WAYS
    ]
    ways = [(parts, again) for parts, again in dict.fromkeys(ways) if least % parts == 0]
    chosen = None
    for enough in (True, False):
        for parts, again in ways if enough else ways[::-1]:
            for crop in crops:
                if enough and not _holds(crop, needed, known):
                    continue
                one = _step_bytes(making, crop, least, parts, again)
                if one <= making.limit:
                    chosen = (crop, parts, again)
                    break
            if chosen:
                break
        if chosen:
            break
    if chosen is None:
        chosen = (crops[-1], *ways[-1])
    crop, parts, again = chosen
    fitting = _fitting(making, crop, least, parts, again)
    batch = making.given.get("train.batch_size")
    if batch is None:
        batch = least if parts > 1 else rules.batch_size(known, crop, fitting).value
    return Search(tuple(crop), batch, parts, again, fitting)


def _crops(making: Making) -> list[tuple[int, int, int]]:
    """Crops from the largest that may be tried to the smallest."""
    known = making.known
    most = math.prod(known["data.preprocess.size"])
    if known.device.is_cpu:
        most = min(most, rules.CPU_CROP_VOXELS * 3 / max(len(known.modalities), 1))
    return rules.crops(known, most)


def _needed(known: Known) -> tuple[float, ...]:
    """Sides in mm of a crop that holds a usual target; nothing where the folds disagree."""
    found = known.agreed(
        lambda cases: tuple(
            float(np.median([c.box_mm[axis] for c in cases if c.positive] or [0]) // 8 * 8)
            for axis in range(3)
        )
    )
    return found or (0.0, 0.0, 0.0)


def _holds(crop: Sequence[int], sides_mm: Sequence[float], known: Known) -> bool:
    spacing, size = known["data.preprocess.spacing_mm"], known["data.preprocess.size"]
    return all(
        n == whole or n * mm >= side
        for n, mm, side, whole in zip(crop, spacing, sides_mm, size, strict=True)
    )


def _config_of(
    making: Making, crop: Sequence[int], batch_size: int, parts: int, again: bool
) -> Config:
    network = {
        field.replace(".", "__"): making.given.get(field, decision.value)
        for field, decision in making.network(crop).items()
    }
    return making.config(
        train__crop=crop,
        train__batch_size=batch_size,
        train__accumulation=parts,
        network__rematerialize=again,
        **network,
    )


def _step_bytes(
    making: Making, crop: Sequence[int], batch_size: int, parts: int, again: bool
) -> float:
    """Scaled memory of a step."""
    known, device = making.known, making.known.device
    stages = {
        field.rpartition(".")[2]: making.given.get(field, decision.value)
        for field, decision in making.network(crop).items()
        if field.startswith("network.encoder.")
    }
    return making.ratio * scale.bytes_of(
        EncoderConfig(**stages),
        crop[1:] if known.planar else crop,
        num_modalities=len(known.modalities),
        examples=math.ceil(batch_size / device.count / parts),
        itemsize=2 if known["network.dtype"] == "bfloat16" else 4,
        rematerialize=again,
        platform=device.platform,
    )


def _fitting(making: Making, crop: Sequence[int], least: int, parts: int, again: bool) -> int:
    """How many crops fit, in steps of one for each device and part."""
    unit = making.known.device.count * parts
    one, two = (_step_bytes(making, crop, n * unit, parts, again) for n in (1, 2))
    units = int((making.limit - (one - (two - one))) // max(two - one, 1))
    return max(units, 0) * unit if units > 0 else least


def _scaled(making: Making, found: Search) -> float:
    return _step_bytes(making, *found[:4])


def _try(making: Making, found: Search, *, final: bool) -> tuple[float, bool]:
    """Ask for the memory of a step, and keep the answer."""
    config = _config_of(making, *found[:4])
    if final and making.compiled is not None:
        needed, how = float(making.compiled(config)), "compiled"
    else:
        needed, how = _scaled(making, found), "scaled"
    fits = needed <= making.limit
    making.trials.append(
        Trial(
            found.crop,
            found.batch_size,
            found.accumulation,
            found.rematerialize,
            round(needed / GIB, 2),
            fits,
            how,
        )
    )
    return needed, fits


def _device_in_words(device: Target) -> str:
    here = "at hand" if device.at_hand else "not at hand"
    return (
        f"{device.count} x {device.kind} ({device.platform}), {device.memory_gib:.4g} GiB, {here}"
    )


def _json(value: Any) -> Any:
    return [_json(item) for item in value] if isinstance(value, list | tuple) else value


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
