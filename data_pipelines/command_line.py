"""How the programs of this folder read their arguments and end."""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from data_pipelines.config import MOVED
from data_pipelines.faults import DataError
from data_pipelines.process import printing, say
from data_pipelines.progress import alive
from data_pipelines.short_help import OF_READING, Options, full, program, show

T = TypeVar("T")


def current_names(arguments: Sequence[str]) -> list[str]:
    """The arguments with options of data sets under the names that they have today.

    An older name is understood, with a ``FutureWarning``.
    """
    renamed = {
        f"--data.{old}".replace("_", "-"): f"--data.{data_set}.{name}".replace("_", "-")
        for old, (data_set, name) in MOVED.items()
    }
    current = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        new = renamed.get(option.replace("_", "-"))
        if new is not None:
            warnings.warn(f"{option} is {new} now; use that name", FutureWarning, stacklevel=2)
        current.append(argument if new is None else new + equals + value)
    return current


def run(
    main: Callable[[T], int],
    arguments: type[T],
    *,
    module: str,
    description: str,
    options: Options = OF_READING,
) -> NoReturn:
    """Run a program on its arguments and exit with its status; faults end in one message.

    ``options`` are those of the short help.

    2 the data cannot work; 3 stopped by the storage; 130 by Ctrl-C: mend that and run it again; 141
    nobody reads its output any more.
    """
    status = 0
    if show(module, description, options):
        raise SystemExit(0)
    with printing(), alive(module.rpartition(".")[2]):
        try:
            status = main(
                tyro.cli(
                    arguments,
                    args=current_names(full(sys.argv[1:])),
                    prog=program(module),
                    description=description,
                    config=(tyro.conf.FlagConversionOff, tyro.conf.DisallowNone),
                )
            )
        except DataError as error:
            say(f"error: {error}")
            status = 2
        except BrokenPipeError:
            raise
        except OSError as error:
            say(
                f"error: {error.filename or 'a file'}: {error.strerror or error}. Repair the "
                "storage and run the same command again: finished cases are kept."
            )
            status = 3
        except KeyboardInterrupt:
            say("interrupted; finished cases are kept, run again to continue")
            status = 130
    raise SystemExit(status)
