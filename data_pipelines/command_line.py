"""How the programs of this folder read their arguments and end."""

import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import tyro

from data_pipelines.faults import DataError

T = TypeVar("T")


def run(main: Callable[[T], int], arguments: type[T], *, module: str, description: str) -> NoReturn:
    """Run a program on its arguments and exit with its status; faults end in one message.

    2 the data cannot work; 3 stopped by the storage; 130 by Ctrl-C: mend that and run it again.
    """
    try:
        status = main(
            tyro.cli(
                arguments,
                prog=f"python -m {module}",
                description=description,
                config=(tyro.conf.FlagConversionOff, tyro.conf.DisallowNone),
            )
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        print(
            f"error: {error}. Repair the storage and run the same command again: finished cases "
            "are kept.",
            file=sys.stderr,
        )
        status = 3
    except KeyboardInterrupt:
        print("interrupted; finished cases are kept, run again to continue", file=sys.stderr)
        status = 130
    raise SystemExit(status)
