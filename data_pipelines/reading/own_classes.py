"""Classes of a target of the user's own, from ``dataset.json`` where they are not typed."""

import dataclasses
from typing import Any

from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError
from data_pipelines.files import expanded
from data_pipelines.modalities import plain
from data_pipelines.reading import dataset_json
from data_pipelines.targets import TARGET_CLASSES, target_of


def with_own_classes(config: DataConfig) -> DataConfig:
    """The configuration with the classes of its target, as they are typed or in ``dataset.json``.

    Raises:
        DataError: a target of the user's own that has no classes, or faulty ones.
    """
    if config.target not in TARGET_CLASSES and not config.labels and config.path is not None:
        file = expanded(config.path, "--data.path") / dataset_json.NAME
        if file.is_file():
            named = dataset_json.labels(dataset_json.read(file)) or {}
            lines = tuple(line for name, value in named.items() if (line := _line(name, value)))
            config = dataclasses.replace(config, labels=lines)
            try:
                target_of(config.target, config.labels)
            except DataError as error:
                raise DataError(f"the labels of {file}: {error}") from None
    target_of(config.target, config.labels, config.lesions)
    return config


def _line(name: str, value: Any) -> str:
    """``name=value``, as one types it; blanks become ``_``. Empty for the background."""
    values = value if isinstance(value, list) else [value]
    if values == [0] or values == ["0"]:
        return ""
    short = plain(name)
    return f"{'ignore' if short in _IGNORE else short}={'+'.join(map(str, values))}"


_IGNORE = ("ignore", "ignored", "ignore_label")
