"""What a command says, and how it ends: log lines, progress, errors without tracebacks."""

import errno
import signal
from collections.abc import Callable
from types import FrameType

import jax

from cmsad_jax.types import ConfigError
from data_pipelines.faults import DataError
from data_pipelines.process import printing, say
from data_pipelines.progress import alive, say_line
from experiments.process.signals import Interrupted, Stop, answered, handled


def log(message: str) -> None:
    """A line of the run's account on stdout, at once; of several processes, the first says it."""
    if jax.distributed.is_initialized() and jax.process_index() > 0:
        return
    say_line(message)


class RunError(RuntimeError):
    """A run that cannot go on until its cause is removed; the message holds cause and remedy."""


_OF_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
"""Faults of storage, also where Python does not say of which file."""


def run_main(main: Callable[[], object]) -> None:
    """Run a program and end with its status; what a user can mend ends in one message.

    0 done; 1 a fault of the program, with a traceback; 2 the request or the data cannot work; 3
    stopped by something outside it (full disk, memory, values that are not finite): mend that and
    run the same command again; 129, 130 and 143 stopped by SIGHUP, SIGINT and SIGTERM: run it again
    to continue; 141 nobody reads its output any more.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        Stop.unanswered = number
        raise Interrupted(number)

    with handled(interrupt), printing(), alive("working"), answered():
        try:
            main()
        except (ConfigError, DataError) as error:
            say(f"error: {error}")
            raise SystemExit(2) from None
        except RunError as error:
            say(f"error: {error}")
            raise SystemExit(3) from None
        except OSError as error:
            if error.filename is None and error.errno not in _OF_STORAGE:
                raise
            say(
                f"error: {error.filename or 'a file'}: {error.strerror}. "
                "What was finished before is intact. "
                "Repair the storage and run the same command again to continue."
            )
            raise SystemExit(3) from None
        except KeyboardInterrupt as error:
            Stop.unanswered = None
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            say("interrupted; what is done is kept, run again to continue")
            raise SystemExit(128 + number) from None
