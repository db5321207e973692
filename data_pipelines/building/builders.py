"""The data sets that can be built, by name, and their builders."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.config import DataConfig
from data_pipelines.faults import DataError

if TYPE_CHECKING:
    from data_pipelines.building.case_builder import CaseBuilder


def builder_names() -> tuple[str, ...]:
    """Data sets that can be built: folders of this package with a builder of their name."""
    package = Path(__file__).parents[1]
    return tuple(
        sorted(
            file.parent.name
            for file in package.glob("*/*_dataset_builder.py")
            if file.name == f"{file.parent.name}_dataset_builder.py"
        )
    )


def open_builder(config: DataConfig) -> "CaseBuilder":
    """The builder of a data set, which has listed its cases and built nothing.

    Raises:
        DataError: no builder has that name, or the folder is not of its layout.
    """
    from data_pipelines.reading import layout  # slow to load, and not needed for names

    config = layout.resolved(config)
    names = builder_names()
    if config.name not in names:
        raise DataError(
            f"data set must be one of {', '.join(names)}; got {config.name!r}. "
            "Use one of these with --data.name; nifti_folder reads your own files."
        )
    from data_pipelines.reading.own_classes import with_own_classes

    config = with_own_classes(config)
    module = importlib.import_module(f"data_pipelines.{config.name}.{config.name}_dataset_builder")
    return module.Builder(config)
