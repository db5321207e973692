"""Configurations as JSON: written, read again, compared."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from cmsad_jax.modules.encoder import EncoderConfig
from cmsad_jax.types import ConfigError
from data_pipelines.config import MOVED, DataConfig

T = TypeVar("T")


# Fields that say where and how much of a run is done, not what it is.
_NOT_IDENTITY = (
    "accelerator",
    "deterministic",
    "output",
    "plan",
    "folds",
    "folds_at_once",
    "parallel",
    "profile",
    "compilation_cache",
    "data.cache",
    "data.residency",
    "train.read_threads",
    "train.steps_per_call",
    "distributed.launcher",
    "distributed.coordinator",
    "distributed.num_processes",
    "distributed.process_id",
    "train.accumulation",
    "network.rematerialize",
    "train.checkpoint_every",
    "train.max_skipped",
    "report.max_mb",
)


_BEFORE: Mapping[str, dict[str, Any]] = {"LossConfig": {"teachers": ["all"]}}
"""What runs did that were stored before a field existed, where today's default is another."""


_ATTENTION_BEFORE: Mapping[str, Any] = {"onward": True, "opening": 0.0}
"""The same of attention across slices, where there is some: without it, nothing was otherwise."""


def to_json(config: Any) -> Any:
    """A configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type[T], values: Any) -> T:
    """A configuration from its JSON values; a field that is not there has its default.

    Options of data sets are read where older versions had them, too.

    Raises:
        ConfigError: for a field that ``kind`` does not have.
    """
    hints = typing.get_type_hints(kind)
    if kind is DataConfig:
        values = _with_options_moved(values)
    if kind is EncoderConfig and values.get("slices", "none") != "none":
        values = values | {"slice_attention": _ATTENTION_BEFORE | values.get("slice_attention", {})}
    values = _BEFORE.get(kind.__name__, {}) | values
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ConfigError(
            f"a stored configuration must have the fields of this version; got {unknown[0]!r} in "
            f"{kind.__name__}. Use the version of cmsad-jax that wrote it."
        )
    return kind(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _with_options_moved(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data's settings, with the options of one data set under its name."""
    moved = {name: value for name, value in data.items() if name not in MOVED}
    for old, (data_set, name) in MOVED.items():
        if old in data:
            moved[data_set] = {name: data[old], **moved.get(data_set, {})}
    return moved


def _from_json(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(cast(type, hint), value)
    if isinstance(value, list):
        return tuple(_from_json(None, item) for item in value)
    if isinstance(value, str) and typing.get_origin(hint) is tuple:
        return (value,)  # a field that had one value where it has several today
    if isinstance(value, str) and Path in (hint, *typing.get_args(hint)):
        return Path(value)
    return value


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines ``field: old -> new`` for what makes two runs different (JSON configurations)."""
    before, after = flatten(old), flatten(new)
    return [
        f"{field}: {before.get(field)} -> {after.get(field)}"
        for field in sorted(before.keys() | after.keys())
        if field not in _NOT_IDENTITY and before.get(field) != after.get(field)
    ]
