"""How processes end: workers with their parent, programs with whoever reads what they print."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h

READER_LEFT = 141  # 128 + SIGPIPE, which Windows does not have
"""Exit status of a program whose output nobody reads any more."""


_AT_ONCE = getattr(signal, "SIGKILL", signal.SIGTERM)
"""The signal that ends a process whatever it does; on Windows every signal does."""


def end_with_parent(number: signal.Signals = _AT_ONCE) -> None:
    """Have this process, which multiprocessing started, sent ``number`` when its parent ends.

    However the parent ends. On Linux the kernel sends the signal, also when the thread that started
    this process ends; elsewhere a thread of this process waits for the end of a pipe of which the
    parent alone holds the other end. Without a parent nothing happens.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if not _kernel_sends(number):
        watch = threading.Thread(
            target=send_at_end_of, args=(parent.sentinel, number), name="parent", daemon=True
        )
        watch.start()
    elif os.getppid() != parent.pid:  # it ended before the kernel was asked
        os.kill(os.getpid(), number)


def _kernel_sends(number: signal.Signals) -> bool:
    """Whether the kernel was asked to send ``number`` at the parent's end, and will."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) == 0


def send_at_end_of(sentinel: int, number: signal.Signals) -> None:
    """Wait until the process of a sentinel has ended, then send ``number`` to this one."""
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Inside, a reader of the output who leaves (``| head``) ends the program without a word.

    Its exit status is then ``READER_LEFT``, unless it has one that is not 0. Output that can be
    written nowhere, as to a full disk, is said on stderr and gives 3.
    """
    status: object = 0
    try:
        yield
    except BrokenPipeError:
        if not any(map(_reader_left, (sys.stdout, sys.stderr))):
            raise
        status = READER_LEFT
    except SystemExit as stopped:
        status = stopped.code
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)
            status = status or READER_LEFT
        except OSError as error:
            _discard(stream)
            say(f"error: standard output: {error.strerror}")
            status = status or 3
    if status:
        raise SystemExit(status)


def put(text: str) -> None:
    """All that a program has to print; what ``printing`` says of readers and full disks holds."""
    with printing():
        try:
            print(text, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            _discard(sys.stdout)
            say(f"error: standard output: {error.strerror}")
            raise SystemExit(3) from None


def say(message: str) -> None:
    """A line on stderr, if it is still there: a closed terminal takes none."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _reader_left(stream: TextIO) -> bool:
    """Whether a stream leads into a pipe whose other end is closed; so it is said on Windows."""
    if not hasattr(select, "poll"):
        return True
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # a stream without a file
        return False


def _discard(stream: TextIO) -> None:
    """Let a stream lead nowhere, lest what is left in it raise again when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
