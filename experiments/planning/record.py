"""What a plan is: lines with reasons, what was tried, and ``plan.json``."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmsad_jax.types import ConfigError
from experiments.process import records
from experiments.settings.config import Config
from experiments.settings.presets import PRESETS
from experiments.settings.stored import from_json, to_json

SCHEMA = 1
"""Version of ``plan.json``."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One setting.

    Attributes:
        field: its name, as on the command line.
        value: JSON value.
        rule: why, with its source.
        fact: to which the rule was applied.
        basis: what the fact is of: all cases, training patients, device, fixed.
        by_hand: whether the value was given instead; rule and fact then say what it replaced.
    """

    field: str
    value: object
    rule: str
    fact: str
    basis: str
    by_hand: bool = False


@dataclasses.dataclass(frozen=True)
class Trial:
    """A training step whose memory was asked for.

    Attributes:
        crop, batch_size, accumulation, rematerialize: of the step.
        gib: of each device.
        fits: whether the device has as much.
        how: ``compiled``: XLA's account; ``scaled``: from the account of other chips.
    """

    crop: tuple[int, ...]
    batch_size: int
    accumulation: int
    rematerialize: bool
    gib: float
    fits: bool
    how: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """``plan.json``.

    Attributes:
        base: preset whose values hold for all that no line names.
        data: the fingerprint in a few lines, and its hash.
        data_sha256: of all facts of the data.
        device: what was planned for, in words.
        lines: the settings.
        trials: the memory of steps.
        changed_by_hand: what followed from values given by hand.
        notes: what is worth knowing: what the grid costs, targets larger than the crop.
    """

    base: str
    data: tuple[str, ...]
    data_sha256: str
    device: str
    lines: tuple[Line, ...]
    trials: tuple[Trial, ...] = ()
    changed_by_hand: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """Value of each field."""
        return {line.field: line.value for line in self.lines}

    @property
    def sha256(self) -> str:
        """Hash of base and values: plans of equal hash ask for equal runs."""
        content = json.dumps([self.base, self.values], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def write(plan: Plan, path: Path) -> None:
    """Write ``plan.json``, whole or not at all."""
    records.write_record(path, plan, schema=SCHEMA)


def read(path: Path) -> Plan:
    """Read ``plan.json``, edited or not.

    Raises:
        ConfigError: there is none.
        DataError: it is not as this version writes it.
    """
    if not path.is_file():
        raise ConfigError(
            f"a plan must be a file that python -m experiments.plan wrote; got none at {path}. "
            "Check --plan."
        )
    return records.read_record(Plan, path, schema=SCHEMA)


def applied(base: str, values: Mapping[str, Any], asked: Config) -> Config:
    """What was asked for, with the values of a plan, and those of its base for all else.

    Args:
        base: preset for settings of network, objective and training that no value names.
        values: by field.
        asked: says the data, the device, and where things lie.

    Raises:
        ConfigError: a field that does not exist, or a value of another kind.
    """
    preset = PRESETS[base]
    config = dataclasses.replace(
        asked,
        preset="auto",
        network=preset.network,
        loss=preset.loss,
        train=preset.train,
        predict=preset.predict,
    )
    content = to_json(config)
    for field, value in values.items():
        *path, name = field.split(".")
        owner = content
        for part in path:
            owner = owner.get(part, {}) if isinstance(owner, dict) else {}
        if not isinstance(owner, dict) or name not in owner:
            raise ConfigError(
                f"a plan must name settings of experiments.cv; got {field!r}. Correct the line, or "
                "leave it out: its base then holds."
            )
        if not _alike(value, owner[name]):
            raise ConfigError(
                f"a plan must give {field} a value such as {json.dumps(owner[name])}; got "
                f"{json.dumps(value)}. Correct the line."
            )
        owner[name] = value
    return from_json(Config, content)


def _alike(value: Any, usual: Any) -> bool:
    """Whether a value is of the kind of another one; lists may differ in length."""
    if usual is None or value is None:
        return True
    if isinstance(usual, list):
        if not isinstance(value, list):
            return False
        return not usual or all(_alike(item, usual[0]) for item in value)
    if isinstance(usual, bool) or isinstance(value, bool):
        return type(value) is type(usual)
    if isinstance(usual, float):
        return isinstance(value, int | float)
    return type(value) is type(usual)


def format_plan(plan: Plan) -> str:
    """The plan as a person reads it."""
    lines = ["data:", *(f"  {line}" for line in plan.data), f"device: {plan.device}", ""]
    width = max(len(line.field) for line in plan.lines)
    for line in plan.lines:
        hand = " (by hand)" if line.by_hand else ""
        lines.append(f"{line.field:<{width}}  {in_words(line.value)}{hand}")
        basis = "" if line.basis == "fixed" else f" [{line.basis}]"
        lines += [f"    rule: {line.rule}", f"    fact: {line.fact}{basis}"]
    if plan.trials:
        lines += ["", "memory of a training step on each device:"]
        lines += [f"  {trial_in_words(trial)}" for trial in plan.trials]
    if plan.notes:
        lines += ["", *plan.notes]
    if plan.changed_by_hand:
        lines += ["", "what values given by hand changed:"]
        lines += [f"  {change}" for change in plan.changed_by_hand]
    return "\n".join(lines)


def trial_in_words(trial: Trial) -> str:
    """Crop, batch and what they take."""
    ways = f", in {trial.accumulation} parts" if trial.accumulation > 1 else ""
    ways += ", blocks computed again" if trial.rematerialize else ""
    return (
        f"{trial.batch_size} crops of {' '.join(map(str, trial.crop))}{ways}: {trial.gib:.2f} GiB "
        f"({trial.how}), {'fits' if trial.fits else 'does not fit'}"
    )


def in_words(value: Any) -> str:
    """A value as one writes it on a command line."""
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], list | tuple):
            return "  ".join("x".join(map(str, item)) for item in value)
        return " ".join(in_words(item) for item in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
