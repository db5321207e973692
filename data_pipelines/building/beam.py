"""Apache Beam, where it is installed: the one place that imports it.

It is an extra, ``pip install -e ".[experiments,beam]"``, best in an environment of its own, as it
takes older protobuf and pyarrow with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_pipelines.faults import DataError


def map_all(function: Callable[[Any], Any], items: Sequence[Any]) -> Any:
    """A Beam transform that applies ``function`` to all items, on whatever machines there are."""
    import apache_beam  # pyright: ignore[reportMissingImports]

    return apache_beam.Create(items) | apache_beam.Map(function)


def download_config(runner: str, options: Sequence[str]) -> tfds.download.DownloadConfig:
    """TFDS's settings for a Beam runner of that name.

    Raises:
        DataError: Apache Beam is not installed, or knows no such runner.
    """
    try:
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
        )
        from apache_beam.runners import create_runner  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"a Beam runner needs Apache Beam; got --beam.runner={runner} and no apache_beam. "
            'Use pip install -e ".[experiments,beam]", in an environment of its own.'
        ) from None
    try:
        known = create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise DataError(
            f"a Beam runner must be one that Beam knows; got {runner!r}: {error}. "
            "Use --beam.runner=DirectRunner."
        ) from None
    return tfds.download.DownloadConfig(
        beam_runner=known, beam_options=PipelineOptions(list(options))
    )
