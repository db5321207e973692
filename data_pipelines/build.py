"""Build a data set ahead of the runs that use it, in several processes or on several machines.

``python -m data_pipelines.build --data.name=picai --data.path=/data/picai --num-workers=8``
examines all cases first and stops with one table if there are errors. Interrupted, it goes on where
it was.
``--beam.runner=DirectRunner``, or any other that Apache Beam knows, builds with TFDS's own pipeline
over the same function for each case; the files and ``data.cache`` must then be seen from all
machines. A run finds what was built by the same ``--data`` options.
"""

import dataclasses

from data_pipelines import command_line
from data_pipelines.config import DataConfig
from data_pipelines.files import expanded, naming_path


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """How Apache Beam is used, which is an extra: ``pip install -e ".[experiments,beam]"``."""

    runner: str | None = None
    """Name of a Beam runner; none uses processes of this machine."""
    options: tuple[str, ...] = ()
    """Options of the runner, such as --direct_num_workers=4."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is built, and where the work is done."""

    data: DataConfig = DataConfig()
    num_workers: int | None = None
    """Processes that read the cases; by default one for a small data set, else one for each CPU."""
    beam: BeamConfig = BeamConfig()


def main(arguments: Arguments) -> int:
    """Build the data set, unless it is built; the exit status."""
    from data_pipelines.building import (  # slow to load, and not needed for --help
        builders,
        validation,
    )
    from data_pipelines.reading import layout

    with naming_path(expanded(arguments.data.cache, "--data.cache"), "build the data set"):
        builder = builders.open_builder(layout.resolved(arguments.data, print))
        if arguments.beam.runner is None:
            validation.check(builder, print, num_workers=arguments.num_workers)
        builder.prepare(
            num_workers=arguments.num_workers,
            beam_runner=arguments.beam.runner,
            beam_options=arguments.beam.options,
        )
    positive = sum(info.positive for info in builder.infos)
    print(
        f"{len(builder.infos)} cases, {positive} with {arguments.data.target}: {builder.data_dir}"
    )
    return 0


if __name__ == "__main__":
    command_line.run(
        main,
        Arguments,
        module="data_pipelines.build",
        description="Build a data set ahead of the runs that use it.",
    )
